"""`out = residual + scale · γ · update` and, for the rows of the next branch, `norm(out)`; with its backward.

A tile spans the channels. Without an update the kernel gathers rows and normalises them. `common.py` explains the names
and how rows are found.
"""

from __future__ import annotations

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
def _residual_add_norm_fwd_kernel(
    out_ptr, next_ptr, frozen_next_ptr, norm_input_ptr, mean_ptr, rstd_ptr, residual_ptr, update_ptr,
    frozen_update_ptr, gamma_ptr, row_scale_ptr, weight_ptr, bias_ptr, inverse_ptr, next_inverse_ptr,
    scale, num_positions, positions, width, sample_size, num_rows, num_learning, num_next_rows, num_next_learning,
    num_saved,
    out_row_stride, residual_row_stride, update_row_stride, frozen_update_row_stride,
    CENTERS: tl.constexpr, EPS: tl.constexpr, IN_PLACE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Saves mean and rstd of the first `num_saved` next rows and, given `norm_input`, the rows before the norm.
    IN_PLACE: `out` is `residual`, and samples without an update aren't written. Without `out` nothing is added: the
    next rows are rows of `residual`.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    exists, in_width = m < num_positions, (n < width)[None, :]
    b, p = m // positions, m % positions
    j = row_number(next_inverse_ptr, b, exists, num_next_rows)
    next_mask = exists & (j < num_next_rows)
    residual_mask = next_mask
    if out_ptr is not None:
        k, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
        _, update_mask = update_masks(row_scale_ptr, k, factor, exists, num_rows)
        if IN_PLACE:
            residual_mask, out_mask = update_mask | next_mask, update_mask
        else:
            residual_mask, out_mask = exists, exists

    at = pointers(residual_ptr, b, p, n, residual_row_stride, width)
    x = tl.load(at, mask=residual_mask[:, None] & in_width, other=0.0).to(COMPUTE)
    if out_ptr is not None:
        update = load_rows(
            update_ptr, frozen_update_ptr, k, p, n, update_mask, in_width,
            num_learning, update_row_stride, frozen_update_row_stride, width, COMPUTE,
        )  # fmt: skip
        if gamma_ptr is not None:
            update *= load_columns(gamma_ptr, n, in_width, BLOCK_M).to(COMPUTE)
    # All loads come before the first store, so that none of them waits. The widest rows leave no registers for that.
    LOADS_FIRST: tl.constexpr = BLOCK_N * COMPUTE.primitive_bitwidth <= 8192 * 32
    if LOADS_FIRST and weight_ptr is not None:
        weight = load_columns(weight_ptr, n, in_width, BLOCK_M)
    if LOADS_FIRST and bias_ptr is not None:
        bias = load_columns(bias_ptr, n, in_width, BLOCK_M)
    if out_ptr is not None:
        x += tl.where(update_mask[:, None], factor[:, None] * update, 0.0)
        stored = x.to(out_ptr.dtype.element_ty)
        tl.store(pointers(out_ptr, b, p, n, out_row_stride, width), stored, mask=out_mask[:, None] & in_width)
        x = stored.to(COMPUTE)  # the norm sees the sum as it is stored

    saved_mask = next_mask & (j < num_saved)
    if norm_input_ptr is not None:
        tl.store(pointers(norm_input_ptr, j, p, n, sample_size, width), x, mask=saved_mask[:, None] & in_width)
    if CENTERS:
        mean = tl.sum(x, axis=1) / width
        if mean_ptr is not None:
            tl.store(mean_ptr + j * positions + p, mean, mask=saved_mask)
        x = tl.where(in_width, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + EPS)
    if rstd_ptr is not None:
        tl.store(rstd_ptr + j * positions + p, rstd, mask=saved_mask)
    y = x * rstd[:, None]
    if weight_ptr is not None:
        if not LOADS_FIRST:
            weight = load_columns(weight_ptr, n, in_width, BLOCK_M)
        y *= weight.to(COMPUTE)
    if bias_ptr is not None:
        if not LOADS_FIRST:
            bias = load_columns(bias_ptr, n, in_width, BLOCK_M)
        y += bias.to(COMPUTE)
    store_rows(next_ptr, frozen_next_ptr, y, j, p, n, next_mask, in_width, num_next_learning, sample_size, width)


@kernel
def _residual_add_norm_bwd_kernel(
    dresidual_ptr, dupdate_ptr, dfrozen_update_ptr, dgamma_ptr, dweight_ptr, dbias_ptr, dout_ptr, dnext_ptr,
    dfrozen_next_ptr, norm_input_ptr, mean_ptr, rstd_ptr, update_ptr, gamma_ptr, row_scale_ptr, weight_ptr,
    inverse_ptr, next_inverse_ptr,
    scale, num_positions, positions, width, sample_size, num_rows, num_learning, num_next_learning, num_saved,
    dout_row_stride, dnext_row_stride, dfrozen_next_row_stride, update_row_stride, norm_input_row_stride, tiles,
    CENTERS: tl.constexpr, IN_PLACE: tl.constexpr, COMPUTE: tl.constexpr, BY_SAMPLE: tl.constexpr,
    NUM_STAGES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dresidual = dout + the norm's gradient, dupdate = scale · γ · dresidual, and one row of sums for each program: of
    scale · dresidual · update for dγ, dnext · x̂ for dweight and dnext for dbias, over the learning rows.

    IN_PLACE: `dresidual` is `dout`, and samples without a next row aren't written.
    """
    n = tl.arange(0, BLOCK_N)
    in_width = (n < width)[None, :]
    cell = tl.program_id(0).to(tl.int64) * width + n
    zeros = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    gamma_total, weight_total, bias_total = zeros, zeros, zeros
    if weight_ptr is not None:
        weight = load_columns(weight_ptr, n, in_width, BLOCK_M)
    if gamma_ptr is not None:
        gamma = load_columns(gamma_ptr, n, in_width, BLOCK_M)
    if BY_SAMPLE:
        tiles_of_sample = tl.cdiv(positions, BLOCK_M)
        first = tl.program_id(0) * tiles
        last = min(first + tiles, num_positions // positions * tiles_of_sample)
        first_sample = first // tiles_of_sample
        num_samples = tl.cdiv(last, tiles_of_sample) - first_sample
    else:
        num_samples = 1
    for sample in range(0, num_samples):
        if BY_SAMPLE:  # whose row is looked up outside of the pipeline
            b = first_sample + sample + tl.arange(0, 1)
            k, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, b >= 0, num_rows, COMPUTE)
            j = row_number(next_inverse_ptr, b, b >= 0, num_saved)
            before = (first_sample + sample) * tiles_of_sample
            begin, end = max(first - before, 0), min(last - before, tiles_of_sample)
        else:
            begin, end = tl.program_id(0) * tiles, (tl.program_id(0) + 1) * tiles
        for tile in tl.range(begin, end, num_stages=NUM_STAGES):
            m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            if BY_SAMPLE:
                p = m
                exists = p < positions
            else:
                exists = m < num_positions
                b, p = m // positions, m % positions
                k, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
                j = row_number(next_inverse_ptr, b, exists, num_saved)

            norm_mask = with_gradient(exists & (j < num_saved), dnext_ptr, j, num_next_learning)
            dupdate_mask, update_mask = update_masks(row_scale_ptr, k, factor, exists, num_rows)
            if dresidual_ptr is None and dweight_ptr is None and dbias_ptr is None:
                norm_mask = norm_mask & update_mask
            dout_mask, dresidual_mask = sum_masks(dresidual_ptr, exists, update_mask, norm_mask, IN_PLACE)

            # All loads of a tile come first, so that none of them waits for a reduction.
            dy = load_rows(
                dnext_ptr, dfrozen_next_ptr, j, p, n, norm_mask, in_width,
                num_next_learning, dnext_row_stride, dfrozen_next_row_stride, width, COMPUTE,
            )  # fmt: skip
            mask = norm_mask[:, None] & in_width
            mean, rstd = load_statistics(mean_ptr, rstd_ptr, j * positions + p, norm_mask)
            at = pointers(norm_input_ptr, j, p, n, norm_input_row_stride, width)
            x_hat = load_normalized(at, mean, rstd, mask, COMPUTE)
            if dout_ptr is not None:
                at = pointers(dout_ptr, b, p, n, dout_row_stride, width)
                dout = tl.load(at, mask=dout_mask[:, None] & in_width, other=0.0)
            if update_ptr is not None:
                dgamma_mask = update_mask & (k < num_learning)
                update = load_rows(
                    update_ptr, None, k, p, n, dgamma_mask, in_width, num_learning, update_row_stride, 0, width, COMPUTE
                )

            if dweight_ptr is not None:
                weight_total += learning_rows(dy * x_hat, dfrozen_next_ptr, j, num_next_learning)
            if dbias_ptr is not None:
                bias_total += learning_rows(dy, dfrozen_next_ptr, j, num_next_learning)
            if weight_ptr is not None:
                dy *= weight.to(COMPUTE)
            if CENTERS:
                projection, dy_mean = tl.split(tl.sum(tl.join(dy * x_hat, dy), axis=1) / width)
                d = dy - x_hat * projection[:, None] - dy_mean[:, None]
            else:
                projection = tl.sum(dy * x_hat, axis=1) / width
                d = dy - x_hat * projection[:, None]
            d *= rstd[:, None]
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
                gamma_total += tl.where(dgamma_mask[:, None], d * update, 0.0)
            if dupdate_ptr is not None or dfrozen_update_ptr is not None:
                if gamma_ptr is not None:
                    d = keep_rows(d * gamma.to(COMPUTE), row_scale_ptr, update_mask)
                store_rows(
                    dupdate_ptr,
                    dfrozen_update_ptr,
                    d,
                    k,
                    p,
                    n,
                    dupdate_mask,
                    in_width,
                    num_learning,
                    sample_size,
                    width,
                )
    if dgamma_ptr is not None:
        tl.store(dgamma_ptr + cell, tl.sum(gamma_total, axis=0), mask=n < width)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + cell, tl.sum(weight_total, axis=0), mask=n < width)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + cell, tl.sum(bias_total, axis=0), mask=n < width)
