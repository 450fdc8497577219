"""The works for tuning launch numbers: for each kernel, calls of its launchers at widths of every class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from rdp_kernels.kernels.spec import Add, NextInput, Operands, Results, RowSet, compute_dtype, row_set
from rdp_kernels.kernels.triton import kernels
from rdp_kernels.kernels.triton.launch import row_bytes

from .tuning import Work

NARROW, VIT, XFORMERS, RESNET = (128, 197, 384), (128, 197, 768), (48, 1, 394752), (64, 256, 56, 56)
MIDDLE, LARGE, HUGE, WIDEST = (32, 256, 2048), (16, 256, 4096), (8, 256, 8192), (4, 256, 16384)
Setting = tuple[tuple[int, ...], torch.dtype]


def _bf16(*shapes: tuple[int, ...]) -> tuple[Setting, ...]:
    return tuple((shape, torch.bfloat16) for shape in shapes)


# Where sums stay in registers, only float32 has rows of more than 8192 bytes.
SETTINGS: dict[str, tuple[Setting, ...]] = {
    "residual_add_fwd": _bf16(VIT, XFORMERS, RESNET),
    "residual_add_bwd": _bf16(VIT, XFORMERS, RESNET),
    "residual_add_norm_fwd": _bf16(NARROW, VIT, MIDDLE, LARGE, HUGE, WIDEST),
    "residual_add_norm_bwd": (*_bf16(NARROW, VIT, MIDDLE, LARGE), (LARGE, torch.float32)),
    "residual_add_norm_bwd_wide": _bf16(HUGE),
    "gather_rows": _bf16(VIT, XFORMERS),
    "sum_partials": _bf16(VIT, XFORMERS),
    "invert_rows": _bf16(VIT),
}
KEPT = 0.8
NORM = NextInput(None, "layer", 1e-6)


def works_of(op: str, device: torch.device, settings: tuple[Setting, ...] | None = None) -> list[Work]:
    """Returns a work for each setting: on tensors `[B, ...]` of that shape, where four dimensions are NCHW. LayerNorm
    and γ are used if the op has them."""
    return [_Tensors(shape, dtype, device).work(op) for shape, dtype in settings or SETTINGS[op]]


class _Tensors:
    """The tensors of one shape that the ops need: a residual, an update and others."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)
        self.channel_dim = 1 if len(shape) == 4 else -1
        channels = shape[self.channel_dim]
        self.batch, self.device = shape[0], device
        streams = (torch.randn(shape, generator=generator, dtype=dtype, device=device) for _ in range(4))
        self.residual, self.branch, self.dout, self.dnext = streams
        vectors = (torch.rand(channels, generator=generator, dtype=dtype, device=device) for _ in range(3))
        self.gamma, self.weight, self.bias = vectors
        keep = torch.arange(self.batch) < math.ceil(KEPT * self.batch)
        keep = keep[torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))]
        self.rows = row_set(keep, device)
        self.add = Add(row_scale=keep.to(device) / KEPT, channel_dim=self.channel_dim)
        self.width = math.prod(shape[2:]) if len(shape) == 4 else channels

    def work(self, op: str) -> Work:
        sums, size = (), row_bytes(self.width, self.residual.itemsize)
        if op == "residual_add_fwd":
            run = self.forward
        elif op == "residual_add_norm_fwd":
            run = self.norm_forward
        elif op == "residual_add_bwd":
            run, sums = self.backward(), ("sum_partials",)
        elif op in ("residual_add_norm_bwd", "residual_add_norm_bwd_wide"):
            run, sums = self.backward(NORM), ("sum_partials",)
        elif op == "sum_partials":
            run, size = self.backward(), row_bytes(self.gamma.numel(), compute_dtype(self.gamma).itemsize)
        elif op == "gather_rows":
            run, size = self.gather, row_bytes(self.residual[0].numel(), self.residual.itemsize)
        else:
            assert op == "invert_rows", op
            run, size = self.invert, row_bytes(self.batch, self.rows.index.itemsize)
        return Work(op, size, lambda: tuple(t for t in run() if t is not None), sums)

    def forward(self) -> Results:
        return self._forward(None)[0]

    def norm_forward(self) -> Results:
        return self._forward(NORM)[0]

    def backward(self, next_input: NextInput | None = None) -> Callable[[], Operands]:
        results, context = self._forward(next_input)
        saved = Operands(update=self.branch, gamma=self.gamma, weight=self.weight)
        gradients = self.dout, None if next_input is None else self.dnext, None
        wanted = Operands(True, True, False, True, *[next_input is not None] * 2)
        return lambda: kernels().fused_add_bwd(context, saved, results, gradients, self.add, next_input, wanted)

    def _forward(self, next_input: NextInput | None) -> tuple[Results, Any]:
        operands = Operands(self.residual, self.branch, None, self.gamma, self.weight, self.bias)
        return kernels().fused_add_fwd(operands, self.add, next_input, 0 if next_input is None else self.batch)

    def gather(self) -> Results:
        return kernels().fused_add_fwd(Operands(self.residual), None, NextInput(self.rows))[0]

    def invert(self) -> Results:
        """The inverse itself isn't returned; the sum at these rows depends on it."""
        add = Add(RowSet(self.rows.index, self.rows.num_rows))
        return kernels().fused_add_fwd(Operands(self.residual, self.branch[: self.rows.num_rows]), add, None)[0]
