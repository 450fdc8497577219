"""`out = act(residual + scale · γ · update)`, over all samples or those that have an update, and its backward.

The same pass writes the rows of `out` that the next branch gets a second time; the backward adds their gradients.
`common.py` explains the names and how rows are found.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import (
    activate,
    activation_gradient,
    keep_rows,
    kernel,
    load_columns,
    load_positions,
    load_rows,
    pointers,
    row_number,
    store_rows,
    sum_masks,
    update_masks,
    update_rows,
)


@kernel
def _residual_add_fwd_kernel(
    out_ptr, next_ptr, frozen_next_ptr, residual_ptr, update_ptr, frozen_update_ptr, gamma_ptr, row_scale_ptr,
    inverse_ptr, next_inverse_ptr,
    scale, num_positions, positions, width, sample_size, channels, num_rows, num_learning, num_next_rows,
    num_next_learning,
    out_row_stride, residual_row_stride, update_row_stride, frozen_update_row_stride,
    GAMMA_PER_POSITION: tl.constexpr, ACTIVATION: tl.constexpr, IN_PLACE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """IN_PLACE: `out` is `residual`, and samples without an update aren't written."""
    column_blocks = tl.cdiv(width, BLOCK_N)
    m = (tl.program_id(0) // column_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    exists, in_width = m < num_positions, (n < width)[None, :]
    b, p = m // positions, m % positions

    k, factor = update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE)
    _, update_mask = update_masks(row_scale_ptr, k, factor, exists, num_rows)
    if next_inverse_ptr is not None or next_ptr is not None or frozen_next_ptr is not None:
        j = row_number(next_inverse_ptr, b, exists, num_next_rows)
        next_mask = exists & (j < num_next_rows)
    else:
        j, next_mask = k, update_mask
    if IN_PLACE:
        residual_mask, out_mask = update_mask | next_mask, update_mask
    else:
        residual_mask, out_mask = exists, exists

    if residual_ptr is not None:
        mask = residual_mask[:, None] & in_width
        x = tl.load(pointers(residual_ptr, b, p, n, residual_row_stride, width), mask=mask, other=0.0).to(COMPUTE)
    else:
        x = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    update = load_rows(
        update_ptr, frozen_update_ptr, k, p, n, update_mask, in_width,
        num_learning, update_row_stride, frozen_update_row_stride, width, COMPUTE,
    )  # fmt: skip
    if gamma_ptr is not None:
        if GAMMA_PER_POSITION:
            gamma = load_positions(gamma_ptr, p % channels, exists, BLOCK_N)
        else:
            gamma = load_columns(gamma_ptr, n, in_width, BLOCK_M)
        update *= gamma.to(COMPUTE)
    x += tl.where(update_mask[:, None], factor[:, None] * update, 0.0)
    x = activate(x, ACTIVATION)
    tl.store(pointers(out_ptr, b, p, n, out_row_stride, width), x, mask=out_mask[:, None] & in_width)
    if next_ptr is not None or frozen_next_ptr is not None:
        store_rows(next_ptr, frozen_next_ptr, x, j, p, n, next_mask, in_width, num_next_learning, sample_size, width)


@triton.jit
def tile_rows(
    i, chunk, c, tiles, column_blocks, channels, num_positions, GAMMA_PER_POSITION: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The rows of a program's tile i in the backward, and which of them exist."""
    if GAMMA_PER_POSITION:
        group = chunk * tiles + i // column_blocks
        m = group * channels + c
        exists = (c < channels) & (group < num_positions // channels)
    else:
        m = (chunk * tiles + i) * BLOCK_M + tl.arange(0, BLOCK_M)
        exists = m < num_positions
    return m, exists


@kernel
def _residual_add_bwd_kernel(
    dresidual_ptr, dupdate_ptr, dfrozen_update_ptr, dgamma_ptr, dout_ptr, dnext_ptr, dfrozen_next_ptr, out_ptr,
    update_ptr, gamma_ptr, row_scale_ptr, inverse_ptr, next_inverse_ptr,
    scale, num_positions, positions, width, sample_size, channels, num_rows, num_learning, num_next_rows,
    num_next_learning,
    dout_row_stride, dnext_row_stride, dfrozen_next_row_stride, out_row_stride, update_row_stride, tiles,
    GAMMA_PER_POSITION: tl.constexpr, ACTIVATION: tl.constexpr, IN_PLACE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """With d = act'(out) · (dout + dnext): dresidual = d, dupdate = scale · γ · d, and one row of sums for each program
    of scale · d · update over the learning rows for dγ. IN_PLACE: `dresidual` is `dout`, and samples that get nothing
    from dnext aren't written.

    All tiles of a program share their factors of γ. If γ has a factor for each column, they are `tiles` tiles of the
    same columns, one below the other. If it has a factor for each position, they are all tiles of the same channels in
    `tiles` groups of `channels` rows.
    """
    column_blocks = max(tl.cdiv(width, BLOCK_N), 1)
    if GAMMA_PER_POSITION:
        channel_blocks = tl.cdiv(channels, BLOCK_M)
        chunk = tl.program_id(0) // channel_blocks
        c = (tl.program_id(0) % channel_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
        rounds = tiles * column_blocks
        if gamma_ptr is not None:
            gamma = load_positions(gamma_ptr, c, c < channels, BLOCK_N)
    else:
        c = 0
        chunk = tl.program_id(0) // column_blocks
        n = (tl.program_id(0) % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        rounds = tiles
        if gamma_ptr is not None:
            gamma = load_columns(gamma_ptr, n, (n < width)[None, :], BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
    m, exists = tile_rows(0, chunk, c, tiles, column_blocks, channels, num_positions, GAMMA_PER_POSITION, BLOCK_M)
    next_k, next_factor = update_rows(inverse_ptr, row_scale_ptr, scale, m // positions, exists, num_rows, COMPUTE)
    if dfrozen_update_ptr is not None:  # registers are scarce
        next_k = next_k.to(tl.int32)
    for i in range(0, rounds):
        # A tile's rows and scales are looked up one tile ahead, so that its loads don't wait for them.
        k, factor = next_k.to(tl.int64), next_factor
        m, exists = tile_rows(
            i + 1, chunk, c, tiles, column_blocks, channels, num_positions, GAMMA_PER_POSITION, BLOCK_M
        )
        exists = exists & (i + 1 < rounds)
        next_k, next_factor = update_rows(inverse_ptr, row_scale_ptr, scale, m // positions, exists, num_rows, COMPUTE)
        if dfrozen_update_ptr is not None:
            next_k = next_k.to(tl.int32)
        m, exists = tile_rows(i, chunk, c, tiles, column_blocks, channels, num_positions, GAMMA_PER_POSITION, BLOCK_M)
        b, p = m // positions, m % positions
        if GAMMA_PER_POSITION:
            n = (i % column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_width = (n < width)[None, :]
        dupdate_mask, update_mask = update_masks(row_scale_ptr, k, factor, exists, num_rows)
        next_mask = update_mask
        if dnext_ptr is not None or dfrozen_next_ptr is not None:
            j = row_number(next_inverse_ptr, b, exists, num_next_rows)
            next_mask = exists & (j < num_next_rows)
            if dresidual_ptr is None:
                next_mask = next_mask & update_mask
        dout_mask, dresidual_mask = sum_masks(dresidual_ptr, exists, update_mask, next_mask, IN_PLACE)

        # All loads of a tile come before its stores, so that none of them waits.
        if dout_ptr is not None:
            mask = dout_mask[:, None] & in_width
            d = tl.load(pointers(dout_ptr, b, p, n, dout_row_stride, width), mask=mask, other=0.0).to(COMPUTE)
        else:
            d = tl.zeros([BLOCK_M, BLOCK_N], COMPUTE)
        if dnext_ptr is not None or dfrozen_next_ptr is not None:
            d += load_rows(
                dnext_ptr, dfrozen_next_ptr, j, p, n, next_mask, in_width,
                num_next_learning, dnext_row_stride, dfrozen_next_row_stride, width, COMPUTE,
            )  # fmt: skip
        if ACTIVATION is not None:
            mask = dout_mask[:, None] & in_width
            out = tl.load(pointers(out_ptr, b, p, n, out_row_stride, width), mask=mask, other=0.0)
            d = activation_gradient(d, out, ACTIVATION)
        if dgamma_ptr is not None:
            dgamma_mask = update_mask & (k < num_learning)
            update = load_rows(
                update_ptr, None, k, p, n, dgamma_mask, in_width, num_learning, update_row_stride, 0, width, COMPUTE
            )

        if dresidual_ptr is not None:
            mask = dresidual_mask[:, None] & in_width
            tl.store(pointers(dresidual_ptr, b, p, n, sample_size, width), d, mask=mask)
        d = keep_rows(factor[:, None] * d, row_scale_ptr, update_mask)
        if dgamma_ptr is not None:
            total += tl.where(dgamma_mask[:, None], d * update, 0.0)
        if dupdate_ptr is not None or dfrozen_update_ptr is not None:
            if gamma_ptr is not None:
                d = keep_rows(d * gamma.to(COMPUTE), row_scale_ptr, update_mask)
            store_rows(
                dupdate_ptr, dfrozen_update_ptr, d, k, p, n, dupdate_mask, in_width, num_learning, sample_size, width
            )
    if dgamma_ptr is not None:
        if GAMMA_PER_POSITION:
            tl.store(dgamma_ptr + chunk.to(tl.int64) * channels + c, tl.sum(total, axis=1), mask=c < channels)
        else:
            tl.store(dgamma_ptr + chunk.to(tl.int64) * width + n, tl.sum(total, axis=0), mask=n < width)
