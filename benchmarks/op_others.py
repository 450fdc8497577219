"""The ops of other libraries: how each is called on the inputs of our op, and why it can't run.

The libraries are imported on use; none is a dependency. timm and torchvision draw their masks within the measured time,
with the op's rate. Their modules do this themselves, and users have no other way to call them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.libraries import installed, resolve

from .op_dense import ResidualAdd, ResidualAddNorm, ResidualAddRMSNorm
from .op_kinds import EPS, Op, Setting, Tensors
from .op_rows import Chain, GatherRows, Path, ResidualAddRows

XFORMERS, FLASH_ATTN, LIGER, TIMM, TORCHVISION = "xformers", "flash-attn", "liger", "timm", "torchvision"
MODULES = {
    XFORMERS: "xformers",
    FLASH_ATTN: "flash_attn",
    LIGER: "liger_kernel",
    TIMM: "timm",
    TORCHVISION: "torchvision",
}
NEED_CUDA = (XFORMERS, FLASH_ATTN, LIGER)
Compute = Callable[..., Tensors]


class Other(NamedTuple):
    """One library's implementation of an op.

    Args:
        library: its name, and the provider's.
        make: imports the library, and returns a function that computes the op.
        serves: returns whether the library supports a setting.
        draws: whether it draws its own masks, with ops of torch.
    """

    library: str
    make: Callable[[Op], Compute]
    serves: Callable[[Setting], bool] = lambda setting: True
    draws: bool = False

    def why_not(self, device: torch.device) -> str | None:
        """Returns why it can't run here, or None."""
        if not installed(MODULES.get(self.library, self.library)):
            return f"{self.library} is not installed"
        if self.library in NEED_CUDA and device.type != "cuda":
            return f"{self.library} needs a CUDA device"
        return None


def others_of(op: Op) -> list[Other]:
    return [other for other in OTHERS.get(op.name, ()) if other.serves(op.setting)]


# Masks that libraries draw


def _timm(op: Op) -> Compute:
    return _added(op, resolve("timm.layers.DropPath")(_rate(op)))


def _torchvision(op: Op) -> Compute:
    return _added(op, resolve("torchvision.ops.StochasticDepth")(_rate(op), "row"))


def _rate(op: Op) -> float:
    return 1 - op.kept / op.batch


def _added(op: Op, module: nn.Module) -> Compute:
    module.train()

    def compute(residual: Tensor, branch: Tensor, gamma: Tensor | None = None) -> Tensors:
        return (residual + module(op.scaled(branch, gamma)),)

    return compute


# Rows


def _xformers_add(op: Op) -> Compute:
    from xformers.ops import scaled_index_add

    def compute(residual: Tensor, branch: Tensor, gamma: Tensor | None = None) -> Tensors:
        return (scaled_index_add(residual.clone(), op.rows, branch, gamma, op.scale),)

    return compute


def _xformers_gather(op: Op) -> Compute:
    from xformers.ops import index_select_cat

    def compute(residual: Tensor) -> Tensors:
        return (index_select_cat([residual.flatten(1)], [op.rows]).view(len(op.rows), *residual.shape[1:]),)

    return compute


def _xformers_path(op: Op) -> Compute:
    from xformers.ops import index_select_cat, scaled_index_add

    def compute(x: Tensor, *inputs: Tensor) -> Tensors:
        gathered: list[Tensor] = []
        for rows, branch, gamma in op.paths(inputs):
            gathered.append(index_select_cat([x.flatten(1)], [rows.index]).view(len(rows.index), *x.shape[1:]))
            x = scaled_index_add(x if len(gathered) > 1 else x.clone(), rows.index, branch, gamma, op.scale)
        return (*gathered, x)

    return compute


# Norms


def _flash_attn(op: Op) -> Compute:
    """Its scales are per row of [B·N, C]."""
    from flash_attn.ops.triton.layer_norm import layer_norm_fn

    positions = math.prod(op.setting.shape[1:-1])
    row_scale = None if op.setting.kept is None else op.row_scale.repeat_interleave(positions)
    rms = isinstance(op, ResidualAddRMSNorm)

    def compute(residual: Tensor, branch: Tensor, weight: Tensor, *vectors: Tensor) -> Tensors:
        bias, *gamma = (None, *vectors) if rms else vectors
        branch = op.scaled(branch, *gamma or [None])
        options = {"residual": residual, "eps": EPS, "rowscale": row_scale, "prenorm": True, "is_rms_norm": rms}
        normed, out = layer_norm_fn(branch, weight, bias, **options)
        return out, normed

    return compute


def _liger(op: Op) -> Compute:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    def compute(residual: Tensor, branch: Tensor, weight: Tensor, gamma: Tensor | None = None) -> Tensors:
        # in_place would overwrite the norm's gradient, which is used again here
        normed, out = liger_fused_add_rms_norm(op.scaled(branch, gamma), residual, weight, EPS, in_place=False)
        return out, normed

    return compute


def _drops(setting: Setting) -> bool:
    return setting.kept is not None and setting.kept < setting.shape[0]


def _is_unmasked(setting: Setting) -> bool:
    return setting.kept is None


OTHERS: dict[str, tuple[Other, ...]] = {
    ResidualAdd.name: (Other(TIMM, _timm, _drops, draws=True), Other(TORCHVISION, _torchvision, _drops, draws=True)),
    ResidualAddRows.name: (Other(XFORMERS, _xformers_add),),
    GatherRows.name: (Other(XFORMERS, _xformers_gather),),
    Path.name: (Other(XFORMERS, _xformers_path),),
    Chain.name: (Other(XFORMERS, _xformers_path),),
    ResidualAddNorm.name: (Other(FLASH_ATTN, _flash_attn),),
    ResidualAddRMSNorm.name: (Other(FLASH_ATTN, _flash_attn), Other(LIGER, _liger, _is_unmasked)),
}
