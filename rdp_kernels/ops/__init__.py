"""The public functional ops: arguments are checked, then the backend that `_backend` chooses computes."""

from .drop_path import drop_path, drop_path_add
from .gather_rows import gather_rows
from .residual_add import residual_add
from .residual_add_norm import residual_add_norm

__all__ = ["drop_path", "drop_path_add", "gather_rows", "residual_add", "residual_add_norm"]
