"""Networks of timm: its own classes at their real size, and small ones.

timm is imported when a network is built; `missing` returns why it can't be imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed

from .networks import End, Network
from .parts import Part, rest_of

NAMES = {
    "vit-s": "vit_small_patch16_224",
    "vit-b": "vit_base_patch16_224",
    "convnext-t": "convnext_tiny",
    "swin-t": "swin_tiny_patch4_window7_224",
    "resnet-50": "resnet50",
}
_SMALL_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2, "init_values": 0.5}
SMALL: dict[str, dict[str, Any]] = {
    "vit-s": _SMALL_VIT,
    "vit-b": _SMALL_VIT,
    "convnext-t": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32), "ls_init_value": 0.5},
    "swin-t": {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)},
    "resnet-50": {"layers": (1, 1, 2, 1), "channels": (8, 16, 24, 32), "zero_init_last": False},
}
"""The same blocks in networks for images of 32 × 32. LayerScale starts at 0.5 and the last BatchNorm isn't 0, so that
branches change the output."""

BRANCHES: dict[str, dict[str, tuple[str, ...]]] = {
    "Block": {"drop_path1": ("norm1", "attn", "ls1"), "drop_path2": ("norm2", "mlp", "ls2")},
    "ConvNeXtBlock": {"drop_path": ("conv_dw", "norm", "mlp", "gamma")},
    "SwinTransformerBlock": {"drop_path1": ("norm1", "attn"), "drop_path2": ("norm2", "mlp")},
    "Bottleneck": {"drop_path": ("conv1", "bn1", "conv2", "bn2", "conv3", "bn3")},
}
"""Class of a block → the drop-path at the end of each branch → the members of the branch."""


checked: set[str] = set()
"""The models whose conversion has been checked in this process."""


def missing() -> str | None:
    """Returns why no network can be built here, or None."""
    return None if installed("timm") else "timm is not installed"


def create(model: str, **options: Any) -> nn.Module:
    """Returns one of `NAMES` with random weights and without drop-path."""
    if installed("torchvision"):
        import_torchvision()
    import timm

    return timm.create_model(NAMES[model], **options)


def library(model: str, **options: Any) -> Library:
    return Library(model, create(model, **options))


def small(model: str) -> Library:
    return library(model, num_classes=10, **SMALL[model])


class Library(Network):
    """A network of timm whose drop-paths are replaced: they do nothing, or apply the ends that `with_ends` gets.

    `places` are the branches in forward order: the block, and the name of its drop-path.
    """

    def __init__(self, name: str, model: nn.Module):
        self.name, self.model = name, model
        self.names, self.places, self.branches = [], [], []
        for name, block in model.named_modules():
            for drop_path, members in BRANCHES.get(type(block).__name__, {}).items():
                self.names.append(f"{name}.{drop_path}")
                self.places.append((block, drop_path))
                self.branches.append(Part.of(getattr(block, member) for member in members))
        self.rest = rest_of(model, self.branches)
        self._ends = [_End() for _ in self.places]
        self.set_drop_paths(self._ends)

    def set_drop_paths(self, modules: Sequence[nn.Module]) -> None:
        """Sets the drop-path of each branch. With a drop rate of 0 timm has an Identity or None there."""
        for (block, name), module in zip(self.places, modules, strict=True):
            setattr(block, name, module)

    def with_ends(self, images: Tensor, ends: Sequence[End]) -> Tensor:
        for module, end in zip(self._ends, ends, strict=True):
            module.end = end
        try:
            return self.model(images)
        finally:
            for module in self._ends:
                module.end = None

    def prepare(self, images: Tensor, drop_prob: float = 0.0) -> None:
        """Converts the network. `drop_prob` is for training without a scheme. Every trainer converts, and the trainers
        are verified against the textbook, so the conversion is checked only once for each model in a process."""
        self.set_drop_paths(drop_paths(len(self.places), drop_prob))
        rdp.convert(self.model, strict=True, example_inputs=images, check=self.name not in checked)
        checked.add(self.name)


def drop_paths(count: int, drop_prob: float) -> list[nn.Module]:
    """timm's."""
    from timm.layers import DropPath

    return [DropPath(drop_prob) for _ in range(count)]


class _End(nn.Module):
    """Replaces a drop-path."""

    end: End | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.end is None else self.end(x)
