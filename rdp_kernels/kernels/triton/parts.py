"""What the kernels have in common: where a tile row lies, and tensors that come in two parts.

A tile row m is position p = m mod `positions` of sample b = m // `positions`. `inverse[b]` says where sample b stands
among the K rows of a branch, from K on that it isn't one of them. The first `num_learning` of those rows lie in one
tensor, the others, frozen ones, in a second.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Triton compiles a kernel anew for arguments that are 1 or divisible by 16. Strides and widths are worth it; what
# differs from call to call, with the number of rows that are kept, is not.
_VARYING = ("num_positions", "num_rows", "num_learning", "num_next_rows", "num_next_learning", "num_saved", "tiles")
_INDICES = ("inverse_ptr", "next_inverse_ptr", "index_ptr", "row_scale_ptr")


def kernel(fn: Callable) -> Any:
    """`triton.jit` for a kernel that is launched."""
    names = inspect.signature(fn).parameters
    varying = [name for name in _VARYING if name in names]
    indices = [name for name in _INDICES if name in names]
    return triton.jit(fn, do_not_specialize=varying, do_not_specialize_on_alignment=indices)


@triton.jit
def standing(inverse_ptr, b, exists, num_rows):
    """Where samples b stand among a branch's rows, int64; without a list of rows every sample has its own place."""
    if inverse_ptr is not None:
        k = tl.load(inverse_ptr + b, mask=exists, other=num_rows)
    else:
        k = b.to(tl.int64)
    return k


@triton.jit
def update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE: tl.constexpr):
    """Of samples b: where they stand among a branch's rows, whether they do, whether that row is read, its scale."""
    k = standing(inverse_ptr, b, exists, num_rows)
    takes_part = exists & (k < num_rows)
    reads = takes_part
    factor = tl.full(b.shape, 1.0, COMPUTE) * scale
    if row_scale_ptr is not None:
        factor = tl.load(row_scale_ptr + k, mask=reads, other=0.0).to(COMPUTE)
        reads = reads & (factor != 0)
    return k, takes_part, reads, factor


@triton.jit
def place(b, p, n, row_stride, width):
    """Offsets of columns n at positions p of samples b, in 64 bits."""
    return (b.to(tl.int64) * row_stride + p.to(tl.int64) * width)[:, None] + n[None, :]


@triton.jit
def load_parts(
    first_ptr,
    second_ptr,
    k,
    p,
    n,
    wanted,
    in_width,
    num_first,
    first_stride,
    second_stride,
    width,
    COMPUTE: tl.constexpr,
):
    """Rows k of two tensors that follow each other; 0 where not wanted, without a read."""
    x = tl.zeros([k.shape[0], n.shape[0]], COMPUTE)
    if first_ptr is not None:
        mask = (wanted & (k < num_first))[:, None] & in_width
        x += tl.load(first_ptr + place(k, p, n, first_stride, width), mask=mask, other=0.0).to(COMPUTE)
    if second_ptr is not None:
        mask = (wanted & (k >= num_first))[:, None] & in_width
        x += tl.load(second_ptr + place(k - num_first, p, n, second_stride, width), mask=mask, other=0.0).to(COMPUTE)
    return x


@triton.jit
def store_parts(first_ptr, second_ptr, x, k, p, n, wanted, in_width, num_first, row_stride, width):
    """Stores rows k into two tensors that follow each other, either of which may be missing."""
    if first_ptr is not None:
        mask = (wanted & (k < num_first))[:, None] & in_width
        tl.store(first_ptr + place(k, p, n, row_stride, width), x, mask=mask)
    if second_ptr is not None:
        mask = (wanted & (k >= num_first))[:, None] & in_width
        tl.store(second_ptr + place(k - num_first, p, n, row_stride, width), x, mask=mask)


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, at, has_norm):
    """Of a norm; without a mean it is 0."""
    rstd = tl.load(rstd_ptr + at, mask=has_norm, other=0.0)
    mean = tl.zeros_like(rstd)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + at, mask=has_norm, other=0.0)
    return mean, rstd


@triton.jit
def load_normed(pointers, mean, rstd, mask, COMPUTE: tl.constexpr):
    """x̂ of rows of the stream, by the forward's arithmetic; 0 where masked."""
    x = tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)
    return tl.where(mask, x - mean[:, None], 0.0) * rstd[:, None]


@triton.jit
def load_gamma(gamma_ptr, p, n, exists, in_width, channels, PER_POSITION: tl.constexpr, COMPUTE: tl.constexpr):
    """γ as it applies to a tile: a factor a column, or one a position."""
    if PER_POSITION:
        gamma = tl.load(gamma_ptr + p % channels, mask=exists, other=0.0).to(COMPUTE)[:, None]
    else:
        gamma = tl.load(gamma_ptr + n[None, :], mask=in_width, other=0.0).to(COMPUTE)
    return gamma
