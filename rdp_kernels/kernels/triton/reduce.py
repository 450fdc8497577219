"""The second stage of sums over rows: `[R, C]` partial sums to `[C]`, in an order that only the shape decides."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..buffers import Context
from .common import kernel
from .launch import Tiles
from .prepared import PreparedLaunch


class Sums:
    """The second stage for up to three vectors, in one launch. All have partial sums of one shape."""

    def __init__(self, context: Context, num_partials: int, width: int, num_vectors: int):
        self.context, self.shape, self.num_vectors = context, (num_partials, width), num_vectors
        self.tiles = Tiles.of("sum_partials", context.device, 1, width)
        self.launch = PreparedLaunch(_sum_partials_kernel, self.tiles.config, context.device)
        self.num_programs = self.tiles.column_blocks * num_vectors
        self.absent = (None,) * (2 * (3 - num_vectors))

    def empty_partials(self) -> Sequence[Tensor]:
        """Partial sums for each vector."""
        if self.num_vectors == 1:
            return (torch.empty(self.shape, dtype=self.context.compute, device=self.context.device),)
        shape = (self.num_vectors, *self.shape)  # one allocation takes the host less time than three
        return torch.empty(shape, dtype=self.context.compute, device=self.context.device).unbind()

    def run(self, *pairs: Tensor | None) -> None:
        """`pairs`: a vector and its partial sums, and again."""
        block_n = self.tiles.block_n
        self.launch(self.num_programs, *pairs, *self.absent, *self.shape, self.tiles.config.tile // block_n, block_n)


@kernel
def _sum_partials_kernel(
    out_ptr, partials_ptr, second_out_ptr, second_partials_ptr, third_out_ptr, third_partials_ptr, num_rows, width,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(width, BLOCK_N)
    vector, n = tl.program_id(0) // column_blocks, (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    if vector == 0:
        _sum_rows(out_ptr, partials_ptr, n, num_rows, width, BLOCK_R, BLOCK_N)
    if second_out_ptr is not None:  # noqa: SIM102 (a test of the compiler, and one of the program)
        if vector == 1:
            _sum_rows(second_out_ptr, second_partials_ptr, n, num_rows, width, BLOCK_R, BLOCK_N)
    if third_out_ptr is not None:  # noqa: SIM102
        if vector == 2:
            _sum_rows(third_out_ptr, third_partials_ptr, n, num_rows, width, BLOCK_R, BLOCK_N)


@triton.jit
def _sum_rows(out_ptr, partials_ptr, n, num_rows, width, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    total = tl.zeros([BLOCK_R, BLOCK_N], partials_ptr.dtype.element_ty)
    for start in range(0, num_rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        at = r.to(tl.int64)[:, None] * width + n[None, :]
        total += tl.load(partials_ptr + at, mask=(r < num_rows)[:, None] & (n < width)[None, :], other=0.0)
    tl.store(out_ptr + n, tl.sum(total, axis=0), mask=n < width)
