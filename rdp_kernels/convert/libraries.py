"""What counts as a drop-path module in other libraries, and its rate.

timm's `DropPath`, torchvision's `StochasticDepth`, the many `*DropPath` of transformers; any other module without
weights that is seen to drop rows; and, at rate 0, the `nn.Identity` that stands in its place, known by its name.
"""

from __future__ import annotations

import math
import re
import warnings

from torch import nn

from .drop_code import is_number, reads_training
from .observed import Law, drops_now, drops_rows, known_law_of

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
REFUSED = "_rdp_refused"
"""The attribute under which a block keeps the names of drop-paths that `convert` has refused."""
_TYPE = re.compile(r"DropPath|StochasticDepth|DropConnect", re.IGNORECASE)
_NAME = re.compile(r"drop_?path|stochastic_?depth|drop_?connect", re.IGNORECASE)


def is_drop_path(name: str, module: nn.Module) -> bool:
    """Whether it goes by such a name, or is seen to drop rows. `name`: under which its parent has it."""
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


def owns_drop_path(module: nn.Module) -> bool:
    """Whether it has one as a child, or in a container among its children."""
    return bool(drop_paths_of(module))


def drop_paths_of(module: nn.Module) -> dict[str, nn.Module]:
    """Those that a module's own forward may call, by name: its children, and those of its containers."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        if is_drop_path(name, child):
            found[name] = child
        elif type(child) in CONTAINERS:
            found |= {f"{name}.{inner}": m for inner, m in drop_paths_of(child).items()}
    return found


def left_over(model: nn.Module) -> list[str]:
    """Drop-paths that drop, and that `convert` has refused."""
    found = []
    for name, block in model.named_modules():
        for path in dict.fromkeys(refused.partition(":")[0] for refused in block.__dict__.get(REFUSED, ())):
            if rate_of(block.get_submodule(path)) != 0:  # nan too
                found.append(f"{name}.{path}" if name else path)
    return found


def warn_left_over(model: nn.Module) -> None:
    """Warns of them, in the name of the line that makes a scheme."""
    others = left_over(model)
    if others:
        warnings.warn(
            f"{len(others)} drop-paths are no paths of the scheme and go on dropping at random in both iterations, "
            f"unless their rates are set to 0: {', '.join(others)}",
            stacklevel=3,
        )


def rate_of(module: nn.Module) -> float:
    """P(drop) of a drop-path as it is now: by its law, else as often as it is seen to drop, or by the usual names
    where these agree or nothing is seen; nan where none of them tells."""
    law = known_law_of(module)
    if isinstance(law, Law):
        return law.drop_prob(module)
    numbers = [module.__dict__.get(name, "") for name in ("drop_prob", "p", "drop_path", "drop_rate")]
    named = next((float(value) for value in numbers if is_number(value)), math.nan)
    seen = drops_now(module)
    return named if seen is None or abs(named - seen) < 0.05 else round(seen, 2)
