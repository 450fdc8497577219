"""The add and the gather read each needed byte of the big tensors once, and write each byte of a result once.

Every test gives the minimum in bytes: rows × bytes a row, summed over the tensors. `check` then compares each element
of each tensor."""

import pytest
import torch

from benchmarks.kernel_traffic import SECTOR
from rdp_kernels.kernels.spec import Add, NextInput
from tests.traffic import needs_interpreter
from tests.traffic.fused_adds import (
    ALL,
    BATCH,
    CHANNELS,
    FLOAT,
    INDEX,
    NEXT_ROWS,
    ROW,
    ROWS,
    SMALL_TILES,
    TOKENS,
    check,
    row_scale,
    row_set,
    run,
    samples,
    vector,
)

pytestmark = [needs_interpreter, pytest.mark.usefixtures("tiles")]
each_p = pytest.mark.parametrize("p", [0.0, 0.5, 1.0])


# All rows; `row_scale` drops some


@each_p
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense(p, dtype):
    kept = ROWS[p]
    add = Add(row_scale=row_scale(kept))
    forward, backward = run(add, residual=samples(dtype=dtype), update=samples(dtype=dtype))
    row = TOKENS * CHANNELS * dtype.itemsize
    minimum = (BATCH + len(kept) + BATCH) * row  # residual, branch; out
    check(forward, minimum, {"residual_ptr": ALL, "update_ptr": kept}, {"out_ptr": ALL})
    minimum = (len(kept) + BATCH) * row  # dout; dupdate, where dropped rows are zeros. dresidual is dout itself
    check(backward, minimum, {"dout_ptr": kept}, {"dupdate_ptr": ALL})


@each_p
@pytest.mark.parametrize("gamma_learns", [True, False])
def test_dense_with_gamma(p, gamma_learns):
    kept = ROWS[p]
    add = Add(row_scale=row_scale(kept))
    forward, backward = run(add, residual=samples(), update=samples(), gamma=vector(learns=gamma_learns))
    minimum = (BATCH + len(kept) + BATCH) * ROW  # residual, branch; out
    check(forward, minimum, {"residual_ptr": ALL, "update_ptr": kept}, {"out_ptr": ALL})
    reads, minimum = {"dout_ptr": kept}, (len(kept) + BATCH) * ROW  # dout; dupdate
    if gamma_learns:
        reads, minimum = reads | {"update_ptr": kept}, minimum + len(kept) * ROW
    check(backward, minimum, reads, {"dupdate_ptr": ALL})


@each_p
@pytest.mark.parametrize("gamma", [False, True])
def test_dense_relu(p, gamma):
    kept = ROWS[p]
    add = Add(row_scale=row_scale(kept), activation="relu")
    forward, backward = run(add, residual=samples(), update=samples(), gamma=vector() if gamma else None)
    minimum = (BATCH + len(kept) + BATCH) * ROW  # residual, branch; out
    check(forward, minimum, {"residual_ptr": ALL, "update_ptr": kept}, {"out_ptr": ALL})
    reads = {"dout_ptr": ALL, "out_ptr": ALL}  # the gradient passes where the sum was positive
    minimum = (BATCH + BATCH + BATCH + BATCH) * ROW  # dout, out; dresidual, dupdate
    if gamma:
        reads, minimum = reads | {"update_ptr": kept}, minimum + len(kept) * ROW
    check(backward, minimum, reads, {"dresidual_ptr": ALL, "dupdate_ptr": ALL})


@each_p
def test_dense_in_place(p):
    kept = ROWS[p]
    forward, backward = run(Add(row_scale=row_scale(kept)), in_place=True, residual=samples(), update=samples())
    minimum = (len(kept) + len(kept) + len(kept)) * ROW  # residual, branch; out: dropped rows don't change
    check(forward, minimum, {"residual_ptr": kept, "update_ptr": kept}, {"out_ptr": kept})
    check(backward, (len(kept) + BATCH) * ROW, {"dout_ptr": kept}, {"dupdate_ptr": ALL})


# Some rows


@each_p
@pytest.mark.parametrize("gamma", [False, True])
def test_rows(p, gamma):
    rows = ROWS[p]
    tensors = dict(residual=samples(), update=samples(len(rows)), gamma=vector() if gamma else None)
    forward, backward = run(Add(row_set(rows)), **tensors)
    minimum = (BATCH + len(rows) + BATCH) * ROW  # residual, branch; out
    check(forward, minimum, {"residual_ptr": ALL, "update_ptr": ALL}, {"out_ptr": ALL})
    reads, minimum = {"dout_ptr": rows}, (len(rows) + len(rows)) * ROW  # dout; dupdate
    if gamma:
        reads, minimum = reads | {"update_ptr": ALL}, minimum + len(rows) * ROW
    check(backward, minimum, reads, {"dupdate_ptr": ALL})


@each_p
def test_rows_in_place(p):
    rows = ROWS[p]
    forward, _ = run(Add(row_set(rows), 1.25), in_place=True, residual=samples(), update=samples(len(rows)))
    minimum = (len(rows) + len(rows) + len(rows)) * ROW  # residual, branch; out
    check(forward, minimum, {"residual_ptr": rows, "update_ptr": ALL}, {"out_ptr": rows})


@pytest.mark.parametrize("in_place", [False, True])
def test_dropped_rows(in_place):
    rows, kept = [4, 0, 3, 1], [0, 2]  # `kept` are places in `rows`
    kept_rows = [rows[k] for k in kept]
    add = Add(row_set(rows), row_scale=row_scale(kept, 4))
    forward, backward = run(add, in_place=in_place, residual=samples(), update=samples(4), gamma=vector())
    touched = kept_rows if in_place else list(range(BATCH))
    minimum = (len(touched) + 2 + len(touched)) * ROW  # residual, branch; out
    check(forward, minimum, {"residual_ptr": touched, "update_ptr": kept}, {"out_ptr": touched})
    minimum = (2 + 2 + 4) * ROW  # dout, branch for dγ; dupdate
    check(backward, minimum, {"dout_ptr": kept_rows, "update_ptr": kept}, {"dupdate_ptr": ALL})


@pytest.mark.parametrize("in_place", [False, True])
def test_learning_and_frozen_rows(in_place):
    """Both parts pass gradients on. γ learns from the first only, so that only this part of the branch is read."""
    rows, next_input = row_set([4, 0, 3], 2), row_set([5, 4, 1, 2], 1)
    tensors = dict(residual=samples(), update=samples(2), frozen_update=samples(1), gamma=vector())
    forward, backward = run(Add(rows), NextInput(next_input), in_place, **tensors)
    written = [0, 3, 4] if in_place else ALL
    minimum = (6 + 2 + 1 + (3 if in_place else 6) + 1 + 3) * ROW  # residual, branch, frozen; out, next, frozen_next
    reads = {"residual_ptr": ALL, "update_ptr": ALL, "frozen_update_ptr": ALL}  # each row is in one of the lists
    check(forward, minimum, reads, {"out_ptr": written, "next_ptr": ALL, "frozen_next_ptr": ALL})
    written = [1, 2, 4, 5] if in_place else ALL
    # dout, dnext, dfrozen_next, branch for dγ; dresidual, dupdate, dfrozen_update
    minimum = (6 + 1 + 3 + 2 + (4 if in_place else 6) + 2 + 1) * ROW
    reads = {"dout_ptr": ALL, "dnext_ptr": ALL, "dfrozen_next_ptr": ALL, "update_ptr": ALL}
    check(backward, minimum, reads, {"dresidual_ptr": written, "dupdate_ptr": ALL, "dfrozen_update_ptr": ALL})


# The gather


@each_p
def test_gather(p):
    """The residual is a result too: the backward adds the gradients of the rows to the residual's."""
    rows = NEXT_ROWS[p]
    forward, backward = run(None, NextInput(row_set(rows)), residual=samples())
    if not rows:
        check(forward, 0)
        check(backward, 0)  # its gradient passes unchanged too
        return
    minimum = (len(rows) + len(rows)) * ROW
    check(forward, minimum, {"x_ptr": rows}, {"out_ptr": ALL})
    minimum = (BATCH + len(rows) + BATCH) * ROW  # dout, dnext; dresidual
    check(backward, minimum, {"residual_ptr": ALL, "update_ptr": ALL}, {"out_ptr": ALL})


def test_gather_whose_gradient_is_owned():
    rows = NEXT_ROWS[0.5]
    forward, backward = run(None, NextInput(row_set(rows, 2)), in_place=True, residual=samples())
    check(forward, (3 + 3) * ROW, {"x_ptr": rows}, {"out_ptr": ALL, "frozen_out_ptr": ALL})
    minimum = (3 + 2 + 1 + 3) * ROW  # dout, dnext, dfrozen_next; dresidual
    reads = {"residual_ptr": rows, "update_ptr": ALL, "frozen_update_ptr": ALL}
    check(backward, minimum, reads, {"out_ptr": rows})


# Layouts


@pytest.mark.parametrize(
    ("shape", "channel_dim", "memory_format", "aligned"),
    [
        ((4, 8, 4, 8), 1, torch.contiguous_format, True),
        ((4, 8, 4, 8), 1, torch.channels_last, True),
        # Rows of 364 and 2,548 bytes are no multiple of a sector: neighbouring rows and tiles share one.
        ((6, 7, 13), -1, torch.contiguous_format, False),
        ((4, 13, 7, 7), 1, torch.contiguous_format, False),
        ((4, 13, 7, 7), 1, torch.channels_last, False),
    ],
    ids=["NCHW", "channels_last", "odd", "odd NCHW", "odd channels_last"],
)
def test_layouts(shape, channel_dim, memory_format, aligned):
    def make():
        return torch.randn(shape).to(memory_format=memory_format).requires_grad_()

    batch, kept = shape[0], [1, 3]
    row = torch.Size(shape[1:]).numel() * FLOAT
    add = Add(row_scale=row_scale(kept, batch), channel_dim=channel_dim)
    forward, backward = run(add, residual=make(), update=make(), gamma=vector(shape[channel_dim]))
    rows = batch + len(kept) + batch
    sectors = 1.0 if aligned else misaligned_sectors(forward, rows, row)
    check(forward, rows * row, {"residual_ptr": ALL, "update_ptr": kept}, {"out_ptr": ALL}, sectors)
    rows = len(kept) + len(kept) + batch
    sectors = 1.0 if aligned else misaligned_sectors(backward, rows, row)
    check(backward, rows * row, {"dout_ptr": kept, "update_ptr": kept}, {"dupdate_ptr": ALL}, sectors)


@pytest.mark.parametrize("shape", [(6, 7, 13), (4, 13, 7, 7)])
def test_odd_rows(shape):
    """Without γ a row is one run of 91 or 637 elements; the narrowest tiles cut it into pieces of 64."""
    rows, next_rows = row_set([3, 0]), row_set([2, 3, 1])
    residual, branch = torch.randn(shape).requires_grad_(), torch.randn(2, *shape[1:]).requires_grad_()
    width = torch.Size(shape[1:]).numel()
    pieces = -(-width // 64)
    sectors = 1 + 2 * (SECTOR - FLOAT) * pieces / (width * FLOAT)  # 1.31 and 1.22; why: see `misaligned_sectors`
    forward, backward = run(Add(rows), NextInput(next_rows), residual=residual, update=branch)
    size = (shape[0] + 2 + shape[0] + 3) * width * FLOAT  # residual, branch; out, next
    check(forward, size, {"residual_ptr": ALL, "update_ptr": ALL}, {"out_ptr": ALL, "next_ptr": ALL}, sectors)
    size = (shape[0] + 3 + shape[0] + 2) * width * FLOAT  # dout, dnext; dresidual, dupdate
    check(backward, size, {"dout_ptr": ALL, "dnext_ptr": ALL}, {"dresidual_ptr": ALL, "dupdate_ptr": ALL}, sectors)
    forward, _ = run(None, NextInput(next_rows), residual=residual)
    check(forward, (3 + 3) * width * FLOAT, {"x_ptr": [2, 3, 1]}, {"out_ptr": ALL}, sectors)


def misaligned_sectors(counted, rows, row):
    """Bytes of sectors over bytes: a run of consecutive bytes touches a sector at each end and needs at least one
    element of it. A run is a row or a piece of it between the tiles' edges, one a call. The ratio is at most 1.22 with
    rows of 364 bytes, and 1.08 with rows of 2,548."""
    runs = rows + sum(accesses.calls for accesses in counted.big)
    return 1 + 2 * (SECTOR - FLOAT) * runs / (rows * row)


def test_rows_at_a_distance():
    """Samples lie apart, as in a slice: memory between them isn't touched."""
    residual, branch = (samples().detach()[:, :5].requires_grad_() for _ in range(2))
    forward, backward = run(Add(), residual=residual, update=branch, gamma=vector())
    row = 5 * CHANNELS * FLOAT
    check(forward, 3 * BATCH * row, {"residual_ptr": ALL, "update_ptr": ALL}, {"out_ptr": ALL})
    check(backward, 3 * BATCH * row, {"dout_ptr": ALL, "update_ptr": ALL}, {"dupdate_ptr": ALL})


# Small tensors, and traffic outside of kernels


@pytest.mark.parametrize("tiles", [SMALL_TILES], indirect=True)
def test_vectors_lists_and_sums():
    """γ is loaded with each tile row, in the backward with those of a program's first tile. The first of them reads it
    from memory, the others from the cache. An entry of a list is loaded once a tile row; a partial sum is written once
    and read once."""
    tile_rows, programs = 8, 3  # a tile is 8 positions of 64 channels; programs where it sums
    add = Add(row_set(ROWS[0.5], inverted=False), row_scale=row_scale([0, 2], 3))
    next_input = NextInput(row_set(NEXT_ROWS[0.5], inverted=False))
    forward, backward = run(add, next_input, residual=samples(), update=samples(3), gamma=vector())
    one, positions = CHANNELS * FLOAT, BATCH * TOKENS
    lists = {"inverse_ptr": positions * INDEX, "next_inverse_ptr": positions * INDEX}
    read = {"gamma_ptr": positions * one, "row_scale_ptr": 3 * TOKENS * FLOAT, **lists}
    *inversions, add_fwd = forward.launches
    assert small_bytes(add_fwd) == {name: (size, 0) for name, size in read.items()}
    *more_inversions, add_bwd, second_stage = backward.launches
    read["gamma_ptr"] = programs * tile_rows * one
    assert small_bytes(add_bwd) == {
        "dgamma_ptr": (0, programs * one),
        **{name: (size, 0) for name, size in read.items()},
    }
    assert small_bytes(second_stage) == {"partials_ptr": (programs * one, 0), "out_ptr": (0, one)}
    for inversion in inversions + more_inversions:
        assert small_bytes(inversion) == {"index_ptr": (3 * INDEX, 0), "inverse_ptr": (0, (BATCH + 3) * INDEX)}


def small_bytes(launch):
    return {name: (traffic.read.bytes, traffic.written.bytes) for name, traffic in launch.small.items()}


def test_one_copy_of_a_tensor_that_is_not_dense():
    """A kernel gets a copy of a tensor that it can't address: torch reads and writes that once."""
    branch = torch.randn(BATCH, CHANNELS, TOKENS).mT.requires_grad_()
    forward, backward = run(Add(), residual=samples(), update=branch)
    assert forward.torch_ops == ["aten.copy_.default"]
    check(backward, (BATCH + BATCH) * ROW, {"dout_ptr": ALL}, {"dupdate_ptr": ALL})


def test_a_scale_of_zero():
    """A scale of 0 drops the whole branch: kernels don't get it as an argument, and its gradient is filled with
    zeros."""
    forward, backward = run(Add(scale=0.0), residual=samples(), update=samples(), gamma=vector())
    check(forward, (BATCH + BATCH) * ROW, {"residual_ptr": ALL}, {"out_ptr": ALL})
    assert backward.launches == []
    assert backward.torch_ops == ["aten.zero_.default"]
