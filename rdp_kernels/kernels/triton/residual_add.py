"""`out = act(residual + scale · γ · branch)`, over all samples or those that have a branch, and its backward.

In the same pass the rows of `out` that the next branch gets are written a second time, and in the backward their
gradients are added; see `parts.py` for how rows are found.
"""

from __future__ import annotations

import triton.language as tl

from .parts import kernel, load_gamma, load_parts, place, standing, store_parts, update_rows


@kernel
def _residual_add_fwd_kernel(
    out_ptr,
    next_ptr,
    frozen_next_ptr,
    residual_ptr,
    update_ptr,
    frozen_update_ptr,
    gamma_ptr,
    row_scale_ptr,
    inverse_ptr,
    next_inverse_ptr,
    scale,
    num_positions,
    positions,
    width,
    sample_size,
    channels,
    num_rows,
    num_learning,
    num_next_rows,
    num_next_learning,
    out_row_stride,
    residual_row_stride,
    update_row_stride,
    frozen_update_row_stride,
    GAMMA_PER_POSITION: tl.constexpr,
    RELU: tl.constexpr,
    IN_PLACE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """IN_PLACE: `out` is `residual`, and samples without a branch row stay untouched."""
    column_blocks = tl.cdiv(width, BLOCK_N)
    m = (tl.program_id(0) // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, in_width = m < num_positions, (n < width)[None, :]
    b, p = m // positions, m % positions

    k, _, reads, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
    touched = exists
    if next_inverse_ptr is not None or next_ptr is not None or frozen_next_ptr is not None:
        j = standing(next_inverse_ptr, b, exists, num_next_rows)
        goes_on = exists & (j < num_next_rows)
    else:
        j, goes_on = k, reads
    if IN_PLACE:
        touched = reads | goes_on

    if residual_ptr is not None:
        mask = touched[:, None] & in_width
        x = tl.load(residual_ptr + place(b, p, n, residual_row_stride, width), mask=mask, other=0.0).to(COMPUTE)
    else:
        x = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    update = load_parts(
        update_ptr, frozen_update_ptr, k, p, n, reads, in_width,
        num_learning, update_row_stride, frozen_update_row_stride, width, COMPUTE,
    )  # fmt: skip
    if gamma_ptr is not None:
        update *= load_gamma(gamma_ptr, p, n, exists, in_width, channels, GAMMA_PER_POSITION, COMPUTE)
    x += tl.where(reads[:, None], factor[:, None] * update, 0.0)
    if RELU:
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    if IN_PLACE:
        touched = reads
    tl.store(out_ptr + place(b, p, n, out_row_stride, width), x, mask=touched[:, None] & in_width)
    if next_ptr is not None or frozen_next_ptr is not None:
        store_parts(next_ptr, frozen_next_ptr, x, j, p, n, goes_on, in_width, num_next_learning, sample_size, width)


@kernel
def _residual_add_bwd_kernel(
    dresidual_ptr,
    dupdate_ptr,
    dfrozen_update_ptr,
    dgamma_ptr,
    dout_ptr,
    dnext_ptr,
    dfrozen_next_ptr,
    out_ptr,
    update_ptr,
    gamma_ptr,
    row_scale_ptr,
    inverse_ptr,
    next_inverse_ptr,
    scale,
    num_positions,
    positions,
    width,
    sample_size,
    channels,
    num_rows,
    num_learning,
    num_next_rows,
    num_next_learning,
    dout_row_stride,
    dnext_row_stride,
    dfrozen_next_row_stride,
    out_row_stride,
    update_row_stride,
    tiles,
    GAMMA_PER_POSITION: tl.constexpr,
    RELU: tl.constexpr,
    IN_PLACE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """With d = [out > 0] · (dout + dnext): dresidual = d, dbranch = scale · γ · d, and sums of scale · d · branch over
    the learning rows for dγ. `dgamma` gets a row for each program where γ has a factor a column, else a number for
    each tile row. IN_PLACE: `dresidual` is `dout`, and samples that get nothing from dnext stay untouched.
    """
    column_blocks = tl.cdiv(width, BLOCK_N)
    row_block, column_block = tl.program_id(0) // column_blocks, tl.program_id(0) % column_blocks
    n = column_block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_width = (n < width)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    for tile in range(0, tiles):
        m = (row_block * tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = m < num_positions
        b, p = m // positions, m % positions
        k, takes_part, reads, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
        changed = reads
        if dnext_ptr is not None or dfrozen_next_ptr is not None:
            j = standing(next_inverse_ptr, b, exists, num_next_rows)
            changed = exists & (j < num_next_rows)
            if dresidual_ptr is None:
                changed = changed & reads
        needed = reads
        if dresidual_ptr is not None:
            needed = exists
            if IN_PLACE:
                needed = reads | changed

        if dout_ptr is not None:
            mask = needed[:, None] & in_width
            d = tl.load(dout_ptr + place(b, p, n, dout_row_stride, width), mask=mask, other=0.0).to(COMPUTE)
        else:
            d = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        if dnext_ptr is not None or dfrozen_next_ptr is not None:
            d += load_parts(
                dnext_ptr, dfrozen_next_ptr, j, p, n, changed, in_width,
                num_next_learning, dnext_row_stride, dfrozen_next_row_stride, width, COMPUTE,
            )  # fmt: skip
        if RELU:
            out = tl.load(out_ptr + place(b, p, n, out_row_stride, width), mask=needed[:, None] & in_width, other=0.0)
            d = tl.where(out <= 0, 0.0, d)
        if dresidual_ptr is not None:
            if IN_PLACE:
                needed = changed
            tl.store(dresidual_ptr + place(b, p, n, sample_size, width), d, mask=needed[:, None] & in_width)

        d = tl.where(reads[:, None], factor[:, None] * d, 0.0)
        if dgamma_ptr is not None:
            counts = reads & (k < num_learning)
            update = load_parts(
                update_ptr, None, k, p, n, counts, in_width, num_learning, update_row_stride, 0, width, COMPUTE
            )
            product = tl.where(counts[:, None], d * update, 0.0)
            if GAMMA_PER_POSITION:
                cell = ((m // channels).to(tl.int64) * column_blocks + column_block) * channels + p % channels
                tl.store(dgamma_ptr + cell, tl.sum(product, axis=1), mask=exists)
            else:
                total += product
        if dupdate_ptr is not None or dfrozen_update_ptr is not None:
            if gamma_ptr is not None:
                gamma = load_gamma(gamma_ptr, p, n, exists, in_width, channels, GAMMA_PER_POSITION, COMPUTE)
                d = tl.where(reads[:, None], d * gamma, 0.0)
            store_parts(
                dupdate_ptr, dfrozen_update_ptr, d, k, p, n, takes_part, in_width, num_learning, sample_size, width
            )
    if dgamma_ptr is not None and not GAMMA_PER_POSITION:
        tl.store(dgamma_ptr + row_block.to(tl.int64) * width + n, tl.sum(total, axis=0), mask=n < width)
