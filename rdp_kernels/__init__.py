"""Stochastic depth that skips the dropped work, and the two-iteration ResidualDroppath scheme (arXiv 2411.09475)."""

from .convert import ConversionError, ConversionReport, convert, revert
from .kernels.dispatch import available_backends, use_backend
from .ops import drop_path, drop_path_add, gather_rows, residual_add, residual_add_norm
from .paths.modules import DropPath, ResidualBranch, ResidualSequence
from .plan import PathPlan, drop_path_rates
from .scheme.scheme import ResidualDropPath

__version__ = "0.1.0"

__all__ = [
    "ConversionError",
    "ConversionReport",
    "DropPath",
    "PathPlan",
    "ResidualBranch",
    "ResidualDropPath",
    "ResidualSequence",
    "available_backends",
    "convert",
    "drop_path",
    "drop_path_add",
    "drop_path_rates",
    "gather_rows",
    "residual_add",
    "residual_add_norm",
    "revert",
    "use_backend",
]
