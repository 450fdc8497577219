"""The second stage of sums over rows: `[R, C]` partial sums to `[C]`, in an order that only the shape decides."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ..buffers import Context
from .common import kernel
from .launch import Tiles


def empty_partials(context: Context, num_rows: int, width: int) -> Tensor:
    return torch.empty(num_rows, width, dtype=context.compute, device=context.device)


def sum_partials(partials: Tensor, out: Tensor) -> None:
    num_rows, width = partials.shape
    tiles = Tiles.of("sum_partials", partials.device, 1, width)
    tiles.run(
        _sum_partials_kernel,
        partials.device,
        out_ptr=out,
        partials_ptr=partials,
        num_rows=num_rows,
        width=width,
        BLOCK_R=tiles.config.tile // tiles.block_n,
    )


@kernel
def _sum_partials_kernel(
    out_ptr, partials_ptr, num_rows, width, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_R, BLOCK_N], partials_ptr.dtype.element_ty)
    for start in range(0, num_rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        at = r.to(tl.int64)[:, None] * width + n[None, :]
        total += tl.load(partials_ptr + at, mask=(r < num_rows)[:, None] & (n < width)[None, :], other=0.0)
    tl.store(out_ptr + n, tl.sum(total, axis=0), mask=n < width)
