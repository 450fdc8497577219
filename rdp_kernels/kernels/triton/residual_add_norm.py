"""`out = residual + scale · γ · branch` and, for the rows of the next branch, `norm(out)`; with its backward.

A tile spans the channels. Without a branch it is the gather of rows with their norm. See `parts.py` for how rows are
found.
"""

from __future__ import annotations

import triton.language as tl

from .parts import kernel, load_normed, load_parts, load_statistics, place, standing, store_parts, update_rows


@kernel
def _residual_add_norm_fwd_kernel(
    out_ptr,
    next_ptr,
    frozen_next_ptr,
    norm_input_ptr,
    mean_ptr,
    rstd_ptr,
    residual_ptr,
    update_ptr,
    frozen_update_ptr,
    gamma_ptr,
    row_scale_ptr,
    weight_ptr,
    bias_ptr,
    inverse_ptr,
    next_inverse_ptr,
    scale,
    num_positions,
    positions,
    width,
    sample_size,
    num_rows,
    num_learning,
    num_next_rows,
    num_next_learning,
    num_saved,
    out_row_stride,
    residual_row_stride,
    update_row_stride,
    frozen_update_row_stride,
    LAYER_NORM: tl.constexpr,
    EPS: tl.constexpr,
    IN_PLACE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Saves mean and rstd of the first `num_saved` next rows and, given `norm_input`, the rows as the norm sees them.
    IN_PLACE: `out` is `residual`, and samples without a branch row aren't written. Without `out` nothing is added: the
    next rows are those of `residual`.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    exists, in_width = m < num_positions, (n < width)[None, :]
    b, p = m // positions, m % positions
    j = standing(next_inverse_ptr, b, exists, num_next_rows)
    goes_on = exists & (j < num_next_rows)
    touched, reads = goes_on, goes_on
    if out_ptr is not None:
        k, _, reads, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
        touched = exists
        if IN_PLACE:
            touched = reads | goes_on

    at = place(b, p, n, residual_row_stride, width)
    x = tl.load(residual_ptr + at, mask=touched[:, None] & in_width, other=0.0).to(COMPUTE)
    if out_ptr is not None:
        update = load_parts(
            update_ptr, frozen_update_ptr, k, p, n, reads, in_width,
            num_learning, update_row_stride, frozen_update_row_stride, width, COMPUTE,
        )  # fmt: skip
        if gamma_ptr is not None:
            update *= tl.load(gamma_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
        x += tl.where(reads[:, None], factor[:, None] * update, 0.0)
        if IN_PLACE:
            touched = reads
        stored = x.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place(b, p, n, out_row_stride, width), stored, mask=touched[:, None] & in_width)
        x = stored.to(COMPUTE)  # the norm sees the stream as it is stored

    saved = goes_on & (j < num_saved)
    if norm_input_ptr is not None:
        tl.store(norm_input_ptr + place(j, p, n, sample_size, width), x, mask=saved[:, None] & in_width)
    if LAYER_NORM:
        mean = tl.sum(x, axis=1) / width
        if mean_ptr is not None:
            tl.store(mean_ptr + j * positions + p, mean, mask=saved)
        x = tl.where(in_width, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + EPS)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + j * positions + p, rstd, mask=saved)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
    store_parts(next_ptr, frozen_next_ptr, y, j, p, n, goes_on, in_width, num_next_learning, sample_size, width)


@kernel
def _residual_add_norm_bwd_kernel(
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
    """dresidual = dout + the norm's gradient, dbranch = scale · γ · dresidual, and a row of sums for each program: of
    scale · dresidual · branch for dγ, of dnext · x̂ for dweight, of dnext for dbias, over the learning rows.

    IN_PLACE: `dresidual` is `dout`, and samples without a next row aren't written.
    """
    n = tl.arange(0, BLOCK_N)
    in_width = (n < width)[None, :]
    cell = tl.program_id(0).to(tl.int64) * width + n
    zeros = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    gamma_total, weight_total, bias_total = zeros, zeros, zeros
    for tile in range(0, tiles):
        m = (tl.program_id(0) * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = m < num_positions
        b, p = m // positions, m % positions
        j = standing(next_inverse_ptr, b, exists, num_saved)
        has_norm = exists & (j < num_saved)
        k, takes_part, reads, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
        if dresidual_ptr is None and dweight_ptr is None and dbias_ptr is None:
            has_norm = has_norm & reads

        dy = load_parts(
            dnext_ptr, dfrozen_next_ptr, j, p, n, has_norm, in_width,
            num_next_learning, dnext_row_stride, dfrozen_next_row_stride, width, COMPUTE,
        )  # fmt: skip
        mask = has_norm[:, None] & in_width
        mean, rstd = load_statistics(mean_ptr, rstd_ptr, j * positions + p, has_norm)
        x_hat = load_normed(norm_input_ptr + place(j, p, n, norm_input_row_stride, width), mean, rstd, mask, COMPUTE)
        counts = (has_norm & (j < num_next_learning))[:, None]
        if dweight_ptr is not None:
            weight_total += tl.where(counts, dy * x_hat, 0.0)
        if dbias_ptr is not None:
            bias_total += tl.where(counts, dy, 0.0)
        if weight_ptr is not None:
            dy *= tl.load(weight_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
        along = tl.sum(dy * x_hat, axis=1) / width
        d = dy - x_hat * along[:, None]
        if LAYER_NORM:
            d -= (tl.sum(dy, axis=1) / width)[:, None]
        d = tl.where(mask, d * rstd[:, None], 0.0)

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
            gamma_total += tl.where(learns[:, None], d * update, 0.0)
        if dupdate_ptr is not None or dfrozen_update_ptr is not None:
            if gamma_ptr is not None:
                gamma = tl.load(gamma_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
                d = tl.where(reads[:, None], d * gamma, 0.0)
            store_parts(
                dupdate_ptr, dfrozen_update_ptr, d, k, p, n, takes_part, in_width, num_learning, sample_size, width
            )
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + cell, tl.sum(gamma_total, axis=0), mask=n < width)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + cell, tl.sum(weight_total, axis=0), mask=n < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cell, tl.sum(bias_total, axis=0), mask=n < width)
