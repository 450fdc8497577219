"""The backward of `residual_add_norm.py` for rows so wide that the rows and the sums over them don't fit in registers.

A program goes through a tile of rows twice, part by part: once for the norm's two dot products, once for the gradients.
The second time the rows come from the cache. The program's sums stay in its row of partial sums, which the cache holds
as well; they are read and written once for each tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    keep_rows,
    kernel,
    learning_rows,
    load_columns,
    load_normalized,
    load_rows,
    load_statistics,
    pointers,
    row_number,
    store_rows,
    sum_masks,
    update_masks,
    update_rows,
    with_gradient,
)


@kernel
def _residual_add_norm_bwd_wide_kernel(
    dresidual_ptr, dupdate_ptr, dfrozen_update_ptr, dgamma_ptr, dweight_ptr, dbias_ptr, dout_ptr, dnext_ptr,
    dfrozen_next_ptr, norm_input_ptr, mean_ptr, rstd_ptr, update_ptr, gamma_ptr, row_scale_ptr, weight_ptr,
    inverse_ptr, next_inverse_ptr,
    scale, num_positions, positions, width, sample_size, num_rows, num_learning, num_next_learning, num_saved,
    dout_row_stride, dnext_row_stride, dfrozen_next_row_stride, update_row_stride, norm_input_row_stride, tiles,
    CENTERS: tl.constexpr, IN_PLACE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As `_residual_add_norm_bwd_kernel`, BLOCK_N columns at a time."""
    m = tl.program_id(0) * tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    for tile in range(0, tiles):
        exists = m < num_positions
        b, p = m // positions, m % positions
        m += BLOCK_M
        j = row_number(next_inverse_ptr, b, exists, num_saved)
        norm_mask = with_gradient(exists & (j < num_saved), dnext_ptr, j, num_next_learning)
        k, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
        dupdate_mask, update_mask = update_masks(row_scale_ptr, k, factor, exists, num_rows)
        if dresidual_ptr is None and dweight_ptr is None and dbias_ptr is None:
            norm_mask = norm_mask & update_mask
        dout_mask, dresidual_mask = sum_masks(dresidual_ptr, exists, update_mask, norm_mask, IN_PLACE)
        dgamma_mask = update_mask & (k < num_learning)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, j * positions + p, norm_mask)

        products, gradients = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE), tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        for start in range(0, width, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            in_width = (n < width)[None, :]
            dy = load_rows(
                dnext_ptr, dfrozen_next_ptr, j, p, n, norm_mask, in_width,
                num_next_learning, dnext_row_stride, dfrozen_next_row_stride, width, COMPUTE,
            )  # fmt: skip
            mask = norm_mask[:, None] & in_width
            at = pointers(norm_input_ptr, j, p, n, norm_input_row_stride, width)
            x_hat = load_normalized(at, mean, rstd, mask, COMPUTE)
            if weight_ptr is not None:
                dy *= load_columns(weight_ptr, n, in_width, BLOCK_M).to(COMPUTE)
            products += dy * x_hat
            gradients += dy
        projection = tl.sum(products, axis=1) / width
        dy_mean = tl.zeros([BLOCK_M], COMPUTE)
        if CENTERS:
            dy_mean = tl.sum(gradients, axis=1) / width

        tl.debug_barrier()  # the sums of the tiles before are stored
        for start in range(0, width, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            in_width = (n < width)[None, :]
            dy = load_rows(
                dnext_ptr, dfrozen_next_ptr, j, p, n, norm_mask, in_width,
                num_next_learning, dnext_row_stride, dfrozen_next_row_stride, width, COMPUTE,
            )  # fmt: skip
            mask = norm_mask[:, None] & in_width
            at = pointers(norm_input_ptr, j, p, n, norm_input_row_stride, width)
            x_hat = load_normalized(at, mean, rstd, mask, COMPUTE)
            if dout_ptr is not None:
                at = pointers(dout_ptr, b, p, n, dout_row_stride, width)
                dout = tl.load(at, mask=dout_mask[:, None] & in_width, other=0.0)
            if update_ptr is not None:
                update = load_rows(
                    update_ptr, None, k, p, n, dgamma_mask, in_width, num_learning, update_row_stride, 0, width, COMPUTE
                )
            cell = tl.program_id(0).to(tl.int64) * width + n
            if dweight_ptr is not None:
                x = learning_rows(dy * x_hat, dfrozen_next_ptr, j, num_next_learning)
                _add(dweight_ptr + cell, x, tile, n < width)
            if dbias_ptr is not None:
                x = learning_rows(dy, dfrozen_next_ptr, j, num_next_learning)
                _add(dbias_ptr + cell, x, tile, n < width)
            if weight_ptr is not None:
                dy *= load_columns(weight_ptr, n, in_width, BLOCK_M).to(COMPUTE)
            d = (dy - dy_mean[:, None] - x_hat * projection[:, None]) * rstd[:, None]
            if next_inverse_ptr is not None:  # 0 · infinite weights are NaN
                d = tl.where(norm_mask[:, None], d, 0.0)
            if dout_ptr is not None:
                d += dout.to(COMPUTE)
            if dresidual_ptr is not None:
                mask = dresidual_mask[:, None] & in_width
                tl.store(pointers(dresidual_ptr, b, p, n, sample_size, width), d, mask=mask)
            if update_ptr is not None or dupdate_ptr is not None or dfrozen_update_ptr is not None:
                d = keep_rows(factor[:, None] * d, row_scale_ptr, update_mask)
            if update_ptr is not None:
                _add(dgamma_ptr + cell, tl.where(dgamma_mask[:, None], d * update, 0.0), tile, n < width)
            if dupdate_ptr is not None or dfrozen_update_ptr is not None:
                if gamma_ptr is not None:
                    gamma = load_columns(gamma_ptr, n, in_width, BLOCK_M).to(COMPUTE)
                    d = keep_rows(d * gamma, row_scale_ptr, update_mask)
                store_rows(
                    dupdate_ptr, dfrozen_update_ptr, d, k, p, n, dupdate_mask, in_width,
                    num_learning, sample_size, width,
                )  # fmt: skip


@triton.jit
def _add(pointers, x, tile, mask):
    """Adds the sums of x over its rows to cells that only this program touches, and that hold nothing at first."""
    old = tl.load(pointers, mask=mask & (tile > 0), other=0.0)
    tl.store(pointers, old + tl.sum(x, axis=0), mask=mask)
