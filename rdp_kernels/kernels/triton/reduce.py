"""The second stage of sums over rows: `[R, C]` partial sums to `[C]`, in an order that only the shape decides."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import kernel


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
