"""Stochastic depth that skips the dropped work, and the two-iteration ResidualDroppath scheme (arXiv 2411.09475).

`help` of one of these names has its arguments and an example:

- Other libraries' models: `convert`, `revert`, `ConversionReport`, `ConversionError`.
- Your own networks: `ResidualBranch`, `ResidualSequence`, `DropPath`.
- The scheme: `ResidualDropPath`, `PathPlan`, `drop_path_rates`.
- Functions: `drop_path`, `drop_path_add`, `residual_add`, `residual_add_norm`, `gather_rows`.
- Backends (Triton, C++, eager): `available_backends`, `use_backend`.
- Modules: `rdp_kernels.integrations` for training stacks, `rdp_kernels.diagnostics` for what training did to the paths,
  `rdp_kernels.estimate` for the costs of iterations.

Example:
    >>> model = timm.create_model("vit_tiny_patch16_224", drop_path_rate=0.2)
    >>> print(rdp.convert(model))  # a dropped branch isn't computed
    >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.3, seed=0)
    >>> for images, labels in loader:
    ...     for phase in scheme.iterations(len(images)):  # "drop", then "reuse"
    ...         cross_entropy(model(images), labels).backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad(set_to_none=True)
"""

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
