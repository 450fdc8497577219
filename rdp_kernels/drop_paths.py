"""What counts as a drop-path module in other libraries, and what it says of its rate.

timm's `DropPath`, torchvision's `StochasticDepth`, the many `*DropPath` of transformers; and, at rate 0, the
`nn.Identity` that stands in its place, known by its name.
"""

from __future__ import annotations

import re
import warnings

from torch import nn

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
REFUSED = "_rdp_refused"
"""The attribute under which a block keeps the names of drop-paths that `convert` has refused."""
_TYPE = re.compile(r"DropPath|StochasticDepth|DropConnect", re.IGNORECASE)
_NAME = re.compile(r"drop_?path|stochastic_?depth|drop_?connect", re.IGNORECASE)


def is_drop_path(name: str, module: nn.Module) -> bool:
    """`name`: under which its parent has it."""
    if isinstance(module, nn.Identity) and type(module).__name__ == "Identity":
        return _NAME.search(name) is not None
    return _TYPE.search(type(module).__name__) is not None and not any(True for _ in module.parameters())


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
            if rate_of(block.get_submodule(path)) > 0:
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
    """P(drop), read from the module as it is now."""
    for name in ("drop_prob", "p", "drop_path", "drop_rate"):
        value = module.__dict__.get(name)  # getattr is slow where there is none
        if isinstance(value, (int, float)):
            return float(value)
    return 0.0


def mode_of(module: nn.Module) -> str:
    """torchvision's "batch" is ours "block"."""
    return "block" if module.__dict__.get("mode") == "batch" else "sample"


def scales_by_keep(module: nn.Module) -> bool:
    return bool(module.__dict__.get("scale_by_keep", True))
