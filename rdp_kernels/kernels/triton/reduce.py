"""The second stage of sums over rows: `[R, C]` partial sums to `[C]`, in an order that only the shape decides."""

from __future__ import annotations

import triton.language as tl

from .common import kernel


@kernel
def _sum_partials_kernel(
    out_ptr, second_out_ptr, third_out_ptr, partials_ptr, num_rows, width, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The sums of up to three vectors. `partials` [V, R, C] has those of one vector after those of another."""
    column_blocks = tl.cdiv(width, BLOCK_N)
    vector, n = tl.program_id(0) // column_blocks, (tl.program_id(0) % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = vector.to(tl.int64) * num_rows
    total = tl.zeros([BLOCK_R, BLOCK_N], partials_ptr.dtype.element_ty)
    for start in range(0, num_rows, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        at = (first + r)[:, None] * width + n[None, :]
        total += tl.load(partials_ptr + at, mask=(r < num_rows)[:, None] & (n < width)[None, :], other=0.0)
    sums = tl.sum(total, axis=0)
    tl.store(out_ptr + n, sums, mask=(n < width) & (vector == 0))
    if second_out_ptr is not None:
        tl.store(second_out_ptr + n, sums, mask=(n < width) & (vector == 1))
    if third_out_ptr is not None:
        tl.store(third_out_ptr + n, sums, mask=(n < width) & (vector == 2))
