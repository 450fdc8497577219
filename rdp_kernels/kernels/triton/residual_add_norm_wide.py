"""The backward of `residual_add_norm.py` for rows so wide that they, and the sums over them, don't fit in registers.

A program goes through a row twice, in pieces: once for the norm's two dot products, once for the gradients. The second
time the row comes from the cache. The sums are kept in the program's row of partial sums, likewise in the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import kernel, load_normed, load_parts, load_statistics, place, standing, store_parts, update_rows


@kernel
def _residual_add_norm_bwd_wide_kernel(
    dresidual_ptr,
    dupdate_ptr,
    dfrozen_update_ptr,
    dgamma_ptr,
    dweight_ptr,
    dbias_ptr,
    dout_ptr,
    dnext_ptr,
    dfrozen_next_ptr,
    norm_input_ptr,
    mean_ptr,
    rstd_ptr,
    update_ptr,
    gamma_ptr,
    row_scale_ptr,
    weight_ptr,
    inverse_ptr,
    next_inverse_ptr,
    scale,
    num_positions,
    positions,
    width,
    sample_size,
    num_rows,
    num_learning,
    num_next_learning,
    num_saved,
    dout_row_stride,
    dnext_row_stride,
    dfrozen_next_row_stride,
    update_row_stride,
    norm_input_row_stride,
    tiles,
    LAYER_NORM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """As `_residual_add_norm_bwd_kernel`, in pieces of BLOCK_N columns; BLOCK_M is 1."""
    for start in range(0, width, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        cell = tl.program_id(0).to(tl.int64) * width + n
        nothing = tl.zeros([BLOCK_N], COMPUTE)
        if dgamma_ptr is not None:
            tl.store(dgamma_ptr + cell, nothing, mask=n < width)
        if dweight_ptr is not None:
            tl.store(dweight_ptr + cell, nothing, mask=n < width)
        if dbias_ptr is not None:
            tl.store(dbias_ptr + cell, nothing, mask=n < width)
    for tile in range(0, tiles):
        m = (tl.program_id(0) * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = m < num_positions
        b, p = m // positions, m % positions
        j = standing(next_inverse_ptr, b, exists, num_saved)
        has_norm = exists & (j < num_saved)
        k, takes_part, reads, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
        if dresidual_ptr is None and dweight_ptr is None and dbias_ptr is None:
            has_norm = has_norm & reads
        counts = has_norm & (j < num_next_learning)
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, j * positions + p, has_norm)

        along, dy_mean = tl.zeros([BLOCK_M], COMPUTE), tl.zeros([BLOCK_M], COMPUTE)
        for start in range(0, width, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            in_width = (n < width)[None, :]
            dy = load_parts(
                dnext_ptr, dfrozen_next_ptr, j, p, n, has_norm, in_width,
                num_next_learning, dnext_row_stride, dfrozen_next_row_stride, width, COMPUTE,
            )  # fmt: skip
            mask = has_norm[:, None] & in_width
            at = norm_input_ptr + place(j, p, n, norm_input_row_stride, width)
            x_hat = load_normed(at, mean, rstd, mask, COMPUTE)
            cell = tl.program_id(0).to(tl.int64) * width + n
            if dweight_ptr is not None:
                _add_to(dweight_ptr + cell, tl.sum(tl.where(counts[:, None], dy * x_hat, 0.0), axis=0), n < width)
            if dbias_ptr is not None:
                _add_to(dbias_ptr + cell, tl.sum(tl.where(counts[:, None], dy, 0.0), axis=0), n < width)
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
            along += tl.sum(dy * x_hat, axis=1) / width
            if LAYER_NORM:
                dy_mean += tl.sum(dy, axis=1) / width

        for start in range(0, width, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            in_width = (n < width)[None, :]
            dy = load_parts(
                dnext_ptr, dfrozen_next_ptr, j, p, n, has_norm, in_width,
                num_next_learning, dnext_row_stride, dfrozen_next_row_stride, width, COMPUTE,
            )  # fmt: skip
            mask = has_norm[:, None] & in_width
            at = norm_input_ptr + place(j, p, n, norm_input_row_stride, width)
            x_hat = load_normed(at, mean, rstd, mask, COMPUTE)
            if weight_ptr is not None:
                dy *= tl.load(weight_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
            d = tl.where(mask, (dy - dy_mean[:, None] - x_hat * along[:, None]) * rstd[:, None], 0.0)
            if dout_ptr is not None:
                touched = exists
                if IN_PLACE:
                    touched = reads | has_norm
                if dresidual_ptr is None:
                    touched = reads
                at = place(b, p, n, dout_row_stride, width)
                d += tl.load(dout_ptr + at, mask=touched[:, None] & in_width, other=0.0).to(COMPUTE)
            if dresidual_ptr is not None:
                written = exists
                if IN_PLACE:
                    written = has_norm
                tl.store(dresidual_ptr + place(b, p, n, sample_size, width), d, mask=written[:, None] & in_width)
            if update_ptr is not None or dupdate_ptr is not None or dfrozen_update_ptr is not None:
                d = tl.where(reads[:, None], factor[:, None] * d, 0.0)
            if update_ptr is not None:
                learns = reads & (k < num_learning)
                update = load_parts(
                    update_ptr, None, k, p, n, learns, in_width, num_learning, update_row_stride, 0, width, COMPUTE
                )
                product = tl.where(learns[:, None], d * update, 0.0)
                cell = tl.program_id(0).to(tl.int64) * width + n
                _add_to(dgamma_ptr + cell, tl.sum(product, axis=0), n < width)
            if dupdate_ptr is not None or dfrozen_update_ptr is not None:
                if gamma_ptr is not None:
                    gamma = tl.load(gamma_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
                    d = tl.where(reads[:, None], d * gamma, 0.0)
                store_parts(
                    dupdate_ptr, dfrozen_update_ptr, d, k, p, n, takes_part, in_width, num_learning, sample_size, width
                )


@triton.jit
def _add_to(pointers, x, mask):
    """Adds to cells that no other program touches, after what this one stored there before."""
    tl.debug_barrier()
    tl.store(pointers, tl.load(pointers, mask=mask, other=0.0) + x, mask=mask)
