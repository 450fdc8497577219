"""Kernels that gather rows, and that invert a list of rows."""

from __future__ import annotations

import triton.language as tl

from .common import kernel, pointers, store_rows


@kernel
def _gather_rows_kernel(
    out_ptr, frozen_out_ptr, x_ptr, index_ptr,
    batch_size, num_rows, num_learning, width, x_row_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[k] = x[index[k]]; rows from number `num_learning` on go to frozen_out instead. Rows out of range are skipped:
    a GPU's host doesn't check them, because it would have to wait."""
    column_blocks = tl.cdiv(width, BLOCK_N)
    k = (tl.program_id(0) // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists = k < num_rows
    b = tl.load(index_ptr + k, mask=exists, other=0)
    exists = exists & (b >= 0) & (b < batch_size)
    in_width = (n < width)[None, :]
    p = tl.zeros([BLOCK_M], tl.int32)  # a sample is one position
    x = tl.load(pointers(x_ptr, b, p, n, x_row_stride, width), mask=exists[:, None] & in_width)
    store_rows(out_ptr, frozen_out_ptr, x, k, p, n, exists, in_width, num_learning, width, width)


@kernel
def _invert_rows_kernel(inverse_ptr, index_ptr, batch_size, num_rows, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """inverse[index[k]] = k, and num_rows elsewhere. Rows out of range are skipped, so that nothing is written out of
    bounds. One program does it, so that a barrier orders the two stores."""
    for start in range(0, batch_size, BLOCK_N):
        b = start + tl.arange(0, BLOCK_N)
        tl.store(inverse_ptr + b, tl.zeros([BLOCK_N], tl.int64) + num_rows, mask=b < batch_size)
    tl.debug_barrier()
    for start in range(0, num_rows, BLOCK_N):
        k = start + tl.arange(0, BLOCK_N)
        b = tl.load(index_ptr + k, mask=k < num_rows, other=0)
        exists = (k < num_rows) & (b >= 0) & (b < batch_size)
        tl.store(inverse_ptr + b, k.to(tl.int64), mask=exists)
