"""The names that other libraries give to drop-paths and their rates.

A drop-path of a new library is one row of `DROP_PATHS`. Any other module without weights counts as a drop-path too if
it is seen to drop rows when it is run.
"""

from __future__ import annotations

import math
import re
import warnings
from typing import NamedTuple

from torch import nn

from .drop_code import is_number, reads_training
from .observed import Law, drops_now, drops_rows, known_law_of


class DropPathKind(NamedTuple):
    """How the drop-paths of some libraries are recognised.

    Args:
        class_name: a part of the class's name, in any case.
        child_name: a part of the name under which blocks hold it, as a pattern, in any case. If the rate is 0, many
            blocks hold an `nn.Identity` under this name.
        rates: the attributes that may hold P(drop). They are used only if running the module doesn't show the rate.
    """

    class_name: str
    child_name: str
    rates: tuple[str, ...]


DROP_PATHS = (
    DropPathKind("DropPath", r"drop_?path", ("drop_prob", "drop_path", "drop_rate")),  # timm, transformers
    DropPathKind("StochasticDepth", r"stochastic_?depth", ("p",)),  # torchvision
    DropPathKind("DropConnect", r"drop_?connect", ("drop_prob",)),  # the first EfficientNets for PyTorch
)
_TYPE = re.compile("|".join(kind.class_name for kind in DROP_PATHS), re.IGNORECASE)
_NAME = re.compile("|".join(kind.child_name for kind in DROP_PATHS), re.IGNORECASE)
_RATES = tuple(dict.fromkeys(rate for kind in DROP_PATHS for rate in kind.rates))

CONCATENATED = {"torchvision.models.densenet._DenseLayer", "timm.models.densenet.DenseLayer"}
"""Blocks whose callers concatenate the output with the input. A dropped output is replaced by zeros."""
MODULE_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
REFUSED = "_rdp_refused"
"""The attribute under which a block keeps the names of drop-paths that `convert` has refused."""


def is_drop_path(name: str, module: nn.Module) -> bool:
    """Whether a module, which its parent holds under `name`, has a name of `DROP_PATHS` or is seen to drop rows."""
    kind = type(module)
    if isinstance(module, nn.Identity) and kind.__name__ == "Identity":
        return _NAME.search(name) is not None
    if any(True for _ in module.parameters()):
        return False
    named = _NAME.search(name) and not kind.__module__.startswith("torch.nn.")
    if named or _TYPE.search(kind.__name__):
        return drops_rows(module) is not False
    unknown = not module._modules and not kind.__module__.startswith("torch.") and reads_training(kind)
    return unknown and drops_rows(module) is True


def drop_paths_of(module: nn.Module) -> dict[str, nn.Module]:
    """The drop-paths that a module's own forward may call, by name: its children, and what its containers hold."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if is_drop_path(name, child):
            found[name] = child
        elif type(child) in MODULE_CONTAINERS:
            found |= {f"{name}.{inner}": m for inner, m in drop_paths_of(child).items()}
    return found


def left_over(model: nn.Module) -> list[str]:
    """The names of the drop-paths that `convert` has refused and whose rate isn't 0."""
    found = []
    for name, block in model.named_modules():
        for path in dict.fromkeys(refused.partition(":")[0] for refused in block.__dict__.get(REFUSED, ())):
            if rate_of(block.get_submodule(path)) != 0:  # nan too
                found.append(f"{name}.{path}" if name else path)
    return found


def warn_left_over(model: nn.Module) -> None:
    """Warns of the drop-paths in `left_over`. The warning points at the line that makes a scheme."""
    others = left_over(model)
    if others:
        warnings.warn(
            f"{len(others)} drop-paths aren't paths of the scheme and keep dropping at random in both iterations, "
            f"unless their rates are set to 0: {', '.join(others)}",
            stacklevel=3,
        )


def rate_of(module: nn.Module) -> float:
    """P(drop) of a drop-path as it is now.

    The rate comes from the module's law if it has one. Otherwise it is the first attribute of `DROP_PATHS`, unless the
    module is seen to drop at another rate: then it is that one. It is nan if neither is known.
    """
    law = known_law_of(module)
    if isinstance(law, Law):
        return law.drop_prob(module)
    numbers = [module.__dict__.get(name, "") for name in _RATES]
    named = next((float(value) for value in numbers if is_number(value)), math.nan)
    seen = drops_now(module)
    is_near = seen is not None and abs(named - seen) < 0.05  # three standard deviations for 1,024 rows
    return named if seen is None or is_near else round(seen, 2)
