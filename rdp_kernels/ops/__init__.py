"""The public functional ops. Each checks its arguments and then calls the backend that `kernels.dispatch` chooses.

On small tensors the checks would cost more than the work. Adds and gathers are therefore first tried without them
(`unchecked_add`, `unchecked_add_norm`, `unchecked_gather` of `kernels.autograd`). The compiled library checks their
arguments itself, and Triton serves calls of a kind that was checked before. The checks here run where neither serves a
call.
"""

from .drop_path import drop_path, drop_path_add
from .gather_rows import gather_rows
from .residual_add import residual_add
from .residual_add_norm import residual_add_norm

__all__ = ["drop_path", "drop_path_add", "gather_rows", "residual_add", "residual_add_norm"]
