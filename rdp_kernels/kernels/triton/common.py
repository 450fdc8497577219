"""What the kernels have in common: how rows are found, tensors that come in two parts, activations and norms.

In all kernels tile row `m` is position `p` = m mod `positions` of sample `b` = m // `positions`; `n` are columns.
`inverse[b]` is the number of sample b's row in a list of K rows, and K or more if the sample has none. That number is
`k` for the update and `j` for the next branch. The first `num_learning` rows lie in one tensor, the frozen ones in a
second. A mask `x_mask` guards the loads or stores of `x`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

# Triton compiles a kernel anew for arguments that are 1 or divisible by 16. That pays for strides and widths, but not
# for arguments that vary from call to call with the number of kept rows.
_VARYING = (
    "batch_size",
    "num_positions",
    "num_rows",
    "num_learning",
    "num_next_rows",
    "num_next_learning",
    "num_saved",
    "tiles",
)
_INDICES = ("inverse_ptr", "next_inverse_ptr", "index_ptr", "row_scale_ptr")


def kernel(fn: Callable) -> Any:
    """`triton.jit` for a kernel that is launched."""
    names = inspect.signature(fn).parameters
    varying = [name for name in _VARYING if name in names]
    indices = [name for name in _INDICES if name in names]
    return triton.jit(fn, do_not_specialize=varying, do_not_specialize_on_alignment=indices)


@triton.jit
def row_number(inverse_ptr, b, exists, num_rows):
    """int64: the numbers of samples b in a list of rows; without a list, sample b has number b."""
    if inverse_ptr is not None:
        k = tl.load(inverse_ptr + b, mask=exists, other=num_rows)
    else:
        k = b.to(tl.int64)
    return k


@triton.jit
def update_rows(inverse_ptr, row_scale_ptr, scale, b, exists, num_rows, COMPUTE: tl.constexpr):
    """Returns the row numbers of samples b in the update, and their scales."""
    k = row_number(inverse_ptr, b, exists, num_rows)
    if row_scale_ptr is not None:
        factor = tl.load(row_scale_ptr + k, mask=exists & (k < num_rows), other=0.0).to(COMPUTE)
    else:
        factor = tl.full(b.shape, 1.0, COMPUTE) * scale
    return k, factor


@triton.jit
def update_masks(row_scale_ptr, k, factor, exists, num_rows):
    """Masks of the samples that have a row in the update (`dupdate_mask`), and of those whose row counts
    (`update_mask`: its scale isn't 0)."""
    dupdate_mask = exists & (k < num_rows)
    update_mask = dupdate_mask
    if row_scale_ptr is not None:
        update_mask = dupdate_mask & (factor != 0)
    return dupdate_mask, update_mask


@triton.jit
def keep_rows(d, row_scale_ptr, update_mask):
    """`d` with zeros for dropped samples, because 0 · NaN is NaN. Without `row_scale` they have no rows, and nothing is
    stored for them."""
    if row_scale_ptr is not None:
        d = tl.where(update_mask[:, None], d, 0.0)
    return d


@triton.jit
def learning_rows(x, frozen_ptr, k, num_learning):
    """`x` with zeros for frozen rows, which may hold NaN."""
    if frozen_ptr is not None:
        x = tl.where((k < num_learning)[:, None], x, 0.0)
    return x


@triton.jit
def with_gradient(next_mask, dnext_ptr, j, num_next_learning):
    """`next_mask` without the learning rows where only frozen ones have a gradient: 0 · NaN would reach theirs."""
    if dnext_ptr is None:
        next_mask = next_mask & (j >= num_next_learning)
    return next_mask


@triton.jit
def sum_masks(dresidual_ptr, exists, update_mask, next_mask, IN_PLACE: tl.constexpr):
    """Masks of the samples for which a backward loads `dout`, and of those for which it stores `dresidual`."""
    if dresidual_ptr is None:
        dout_mask, dresidual_mask = update_mask, update_mask
    elif IN_PLACE:  # `dresidual` is `dout`: samples that get nothing from the next branch stay as they are
        dout_mask, dresidual_mask = update_mask | next_mask, next_mask
    else:
        dout_mask, dresidual_mask = exists, exists
    return dout_mask, dresidual_mask


@triton.jit
def pointers(x_ptr, b, p, n, row_stride, width):
    """To columns n at positions p of rows b, by 64-bit offsets. Those within a row are the same for all tensors."""
    return x_ptr + (b.to(tl.int64) * row_stride)[:, None] + ((p.to(tl.int64) * width)[:, None] + n[None, :])


@triton.jit
def load_rows(
    learning_ptr, frozen_ptr, k, p, n, mask, in_width, num_learning, learning_stride, frozen_stride, width,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Rows k of a tensor in two parts, either of which may be absent; what is masked isn't read, and is 0."""
    x = tl.zeros([p.shape[0], n.shape[0]], COMPUTE)
    if learning_ptr is not None:
        learning_mask = (mask & (k < num_learning))[:, None] & in_width
        at = pointers(learning_ptr, k, p, n, learning_stride, width)
        x += tl.load(at, mask=learning_mask, other=0.0).to(COMPUTE)
    if frozen_ptr is not None:
        frozen_mask = (mask & (k >= num_learning))[:, None] & in_width
        at = pointers(frozen_ptr, k - num_learning, p, n, frozen_stride, width)
        x += tl.load(at, mask=frozen_mask, other=0.0).to(COMPUTE)
    return x


@triton.jit
def store_rows(learning_ptr, frozen_ptr, x, k, p, n, mask, in_width, num_learning, row_stride, width):
    """Stores rows k into a tensor in two parts, either of which may be absent."""
    if learning_ptr is not None:
        learning_mask = (mask & (k < num_learning))[:, None] & in_width
        tl.store(pointers(learning_ptr, k, p, n, row_stride, width), x, mask=learning_mask)
    if frozen_ptr is not None:
        frozen_mask = (mask & (k >= num_learning))[:, None] & in_width
        tl.store(pointers(frozen_ptr, k - num_learning, p, n, row_stride, width), x, mask=frozen_mask)


# Vectors are loaded in the shape of a tile, and so in the layout that a tile has. As one row or column they would have
# another one, and pass through shared memory and a barrier.


@triton.jit
def load_columns(vector_ptr, n, in_width, BLOCK_M: tl.constexpr):
    """A vector `[width]` as a tile: one factor for each column."""
    at = tl.broadcast_to(n[None, :], [BLOCK_M, n.shape[0]])
    return tl.load(vector_ptr + at, mask=tl.broadcast_to(in_width, [BLOCK_M, n.shape[0]]), other=0.0)


@triton.jit
def load_positions(vector_ptr, c, exists, BLOCK_N: tl.constexpr):
    """A vector `[channels]` as a tile: the factors at c, one for each row."""
    at = tl.broadcast_to(c[:, None], [c.shape[0], BLOCK_N])
    return tl.load(vector_ptr + at, mask=tl.broadcast_to(exists[:, None], [c.shape[0], BLOCK_N]), other=0.0)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    return x


@triton.jit
def activation_gradient(d, out, ACTIVATION: tl.constexpr):
    """The gradient of `activate`'s argument from `d`, the gradient of its result `out`."""
    if ACTIVATION == "relu":
        d = tl.where(out <= 0, 0.0, d)
    return d


@triton.jit
def load_statistics(mean_ptr, rstd_ptr, at, mask):
    """The saved mean and rstd of rows; the mean is 0 for a norm that doesn't save it."""
    rstd = tl.load(rstd_ptr + at, mask=mask, other=0.0)
    mean = tl.zeros_like(rstd)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + at, mask=mask, other=0.0)
    return mean, rstd


@triton.jit
def load_normalized(pointers, mean, rstd, mask, COMPUTE: tl.constexpr):
    """x̂ of saved rows, by the forward's arithmetic. It is 0 in masked rows, whose mean is 0, and anything in masked
    columns."""
    x = tl.load(pointers, mask=mask, other=0.0).to(COMPUTE)
    return (x - mean[:, None]) * rstd[:, None]
