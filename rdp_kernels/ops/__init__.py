"""The public functional ops. Each checks its arguments and then calls the backend that `kernels.dispatch` chooses.

On small CPU tensors the checks would cost more than the work. There the compiled library checks (`unchecked_add` and
`unchecked_gather`), and the checks here run only where it refuses.
"""

from .drop_path import drop_path, drop_path_add
from .gather_rows import gather_rows
from .residual_add import residual_add
from .residual_add_norm import residual_add_norm

__all__ = ["drop_path", "drop_path_add", "gather_rows", "residual_add", "residual_add_norm"]
