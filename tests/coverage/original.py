"""The textbook on a library's original model: all branches are computed, and multiplied by given masks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Where a block has no drop-path: the modules whose outputs are added (or concatenated), in the order of calls.
BRANCH_ENDS: dict[str, tuple[str, ...]] = {
    "timm.models.resnet.BasicBlock": ("bn2",),
    "timm.models.resnet.Bottleneck": ("bn3",),
    "timm.models.densenet.DenseLayer": ("conv2",),
    "torchvision.models.resnet.BasicBlock": ("bn2",),
    "torchvision.models.resnet.Bottleneck": ("bn3",),
    "torchvision.models.vision_transformer.EncoderBlock": ("dropout", "mlp"),
    "torchvision.models.densenet._DenseLayer": ("conv2",),
}


@dataclass(frozen=True)
class Place:
    """Where a branch ends: at call number `call` of module `module` in block `block`."""

    block: str
    module: str
    call: int = 0


@dataclass(frozen=True)
class Mask:
    keep: Tensor
    """bool [rows], or [] for all of them."""
    scale: float

    def __call__(self, x: Tensor) -> Tensor:
        factor = self.keep.to(x.dtype) * self.scale
        return x * factor.reshape(factor.shape + (1,) * (x.dim() - 1)) if factor.dim() else x * factor


class Masked:
    """Puts masks at `places` of `model`, until `remove`. Drop-paths there only apply their mask."""

    def __init__(self, model: nn.Module, places: list[Place]):
        self._masks: Mapping[Place, Mask] = {}
        self._calls: Counter[tuple[str, str]] = Counter()
        for block in {place.block: None for place in places}:
            model.get_submodule(block).register_forward_pre_hook(self._begin(block))
        for block, name in {(place.block, place.module): None for place in places}:
            module = model.get_submodule(block).get_submodule(name)
            if _does_nothing_else(module):
                module.forward = lambda x, *_, **__: x  # type: ignore[method-assign]
            module.register_forward_hook(self._mask(block, name))

    def set(self, masks: Mapping[Place, Mask]) -> None:
        """Sets the masks from now on; places without a mask don't change."""
        self._masks = masks

    def _begin(self, block: str) -> Any:
        def hook(*_: Any) -> None:
            for key in [key for key in self._calls if key[0] == block]:
                del self._calls[key]

        return hook

    def _mask(self, block: str, name: str) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            call = self._calls[block, name]
            self._calls[block, name] += 1
            mask = self._masks.get(Place(block, name, call))
            return out if mask is None else mask(out)

        return hook


def _does_nothing_else(module: nn.Module) -> bool:
    name = type(module).__name__
    return "DropPath" in name or name in ("StochasticDepth", "Identity")


def place_of(block: nn.Module, block_name: str, path_name: str, drop_path: str | None, number: int) -> Place | None:
    """The place of path number `number` of `block`; None if it isn't in the table.

    A path's name is that of its drop-path, or `name:n` for the call n > 0 of a drop-path with several branches.
    """
    if drop_path is not None:
        return Place(block_name, drop_path, int(path_name.partition(":")[2] or 0))
    kind = type(block)
    ends = BRANCH_ENDS.get(f"{kind.__module__}.{kind.__qualname__}", ())
    return Place(block_name, ends[number]) if number < len(ends) else None


class NoDropout(torch.overrides.TorchFunctionMode):
    """Turns functional dropout off."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {} if len(args) > 4 else {"dropout_p": 0.0}
        elif "dropout" in name:
            return args[0] if args else kwargs["input"]
        return func(*args, **kwargs)
