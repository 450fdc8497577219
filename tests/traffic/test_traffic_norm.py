"""As `test_traffic`, for the add with the next branch's norm, and for whole paths: add and gather, both ways."""

import pytest
import torch

from benchmarks.kernel_traffic import SECTOR, count_traffic
from rdp_kernels.kernels.autograd import FusedCall
from rdp_kernels.kernels.spec import Add, NextInput, Operands
from rdp_kernels.kernels.triton import backward as triton_backward
from rdp_kernels.kernels.triton import kernels, launch, launchers
from tests.traffic import needs_interpreter
from tests.traffic.fused_adds import (
    ALL,
    BATCH,
    CHANNELS,
    FLOAT,
    NEXT_ROWS,
    ROW,
    ROWS,
    TOKENS,
    check,
    check_total,
    row_scale,
    row_set,
    run,
    samples,
    vector,
)

pytestmark = needs_interpreter
all_tiles = pytest.mark.usefixtures("tiles")
each_norm = pytest.mark.parametrize("norm", ["layer", "rms"])
each_p = pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
each_next_p = pytest.mark.parametrize("next_p", [0.0, 0.5, 1.0])
out_of_place_and_in_place = pytest.mark.parametrize("in_place", [False, True])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def weights(norm):
    if norm is None:
        return {}
    return dict(weight=vector(), bias=vector() if norm == "layer" else None)


def next_input(norm, rows=None, **how):
    return NextInput(rows, norm, 1e-6, **how)


# One call


@all_tiles
@each_norm
@each_p
def test_dense(p, norm):
    kept = ROWS[p]
    tensors = dict(residual=samples(), update=samples(), gamma=vector(), **weights(norm))
    forward, backward = run(Add(row_scale=row_scale(kept)), next_input(norm), **tensors)
    # residual, branch; out, next
    minimum = (BATCH + len(kept) + BATCH + BATCH) * ROW
    check(forward, minimum, {"residual_ptr": ALL, "update_ptr": kept}, {"out_ptr": ALL, "next_ptr": ALL})
    # dout, dnext, the sum, branch for dγ; dresidual, dupdate
    minimum = (BATCH + BATCH + BATCH + len(kept) + BATCH + BATCH) * ROW
    reads = {"dout_ptr": ALL, "dnext_ptr": ALL, "norm_input_ptr": ALL, "update_ptr": kept}
    check(backward, minimum, reads, {"dresidual_ptr": ALL, "dupdate_ptr": ALL})


@all_tiles
@each_norm
@out_of_place_and_in_place
@each_dtype
def test_rows(norm, in_place, dtype):
    rows, next_rows = ROWS[0.5], NEXT_ROWS[0.5]  # row 3 is in both
    tensors = dict(residual=samples(dtype=dtype), update=samples(3, dtype), **weights(norm))
    forward, backward = run(Add(row_set(rows)), next_input(norm, row_set(next_rows)), in_place, **tensors)
    row = TOKENS * CHANNELS * dtype.itemsize
    touched, added, changed = ([0, 1, 3, 4, 5], rows, next_rows) if in_place else (ALL, ALL, ALL)
    minimum = ((5 + 3 if in_place else 6 + 6) + 3 + 3 + 3) * row  # residual, out; branch; next, norm_input
    writes = {"out_ptr": added, "next_ptr": ALL, "norm_input_ptr": ALL}
    check(forward, minimum, {"residual_ptr": touched, "update_ptr": ALL}, writes)
    minimum = ((5 + 3 if in_place else 6 + 6) + 3 + 3 + 3) * row  # dout, dresidual; dnext, norm_input; dupdate
    reads = {"dout_ptr": touched, "dnext_ptr": ALL, "norm_input_ptr": ALL}
    check(backward, minimum, reads, {"dresidual_ptr": changed, "dupdate_ptr": ALL})


@all_tiles
@each_norm
def test_learning_and_frozen_rows(norm):
    """Both parts of the next rows pass gradients on; the norm learns from the first only."""
    tensors = dict(residual=samples(), update=samples(2), frozen_update=samples(1), gamma=vector(), **weights(norm))
    forward, backward = run(Add(row_set([4, 0, 3], 2)), next_input(norm, row_set([5, 4, 1, 2], 1)), **tensors)
    minimum = (6 + 2 + 1 + 6 + 1 + 3 + 4) * ROW  # residual, branch, frozen; out, next, frozen_next, norm_input
    reads = {"residual_ptr": ALL, "update_ptr": ALL, "frozen_update_ptr": ALL}
    check(forward, minimum, reads, {"out_ptr": ALL, "next_ptr": ALL, "frozen_next_ptr": ALL, "norm_input_ptr": ALL})
    # dout, dnext, dfrozen_next, norm_input, branch for dγ; all gradients
    minimum = (6 + 1 + 3 + 4 + 2 + 6 + 2 + 1) * ROW
    reads = {"dout_ptr": ALL, "dnext_ptr": ALL, "dfrozen_next_ptr": ALL, "norm_input_ptr": ALL, "update_ptr": ALL}
    check(backward, minimum, reads, {"dresidual_ptr": ALL, "dupdate_ptr": ALL, "dfrozen_update_ptr": ALL})


@all_tiles
@each_norm
@pytest.mark.parametrize("next_p", [0.0, 0.5])
def test_gather(norm, next_p):
    """Without an add there is no sum to write, and only the next rows of the residual are read."""
    rows = NEXT_ROWS[next_p]
    forward, backward = run(None, next_input(norm, row_set(rows)), residual=samples(), **weights(norm))
    minimum = (len(rows) + len(rows) + len(rows)) * ROW  # residual; next, norm_input
    check(forward, minimum, {"residual_ptr": rows}, {"next_ptr": ALL, "norm_input_ptr": ALL})
    minimum = (BATCH + len(rows) + len(rows) + BATCH) * ROW  # dout, dnext, norm_input; dresidual
    check(backward, minimum, {"dout_ptr": ALL, "dnext_ptr": ALL, "norm_input_ptr": ALL}, {"dresidual_ptr": ALL})


@all_tiles
@each_norm
@pytest.mark.parametrize("learns", [False, True])
def test_head_on_all_rows(norm, learns):
    """The residual is read, and read again in the backward: it isn't copied."""
    forward, backward = run(None, next_input(norm), residual=samples(learns=learns), **weights(norm))
    check(forward, (BATCH + BATCH) * ROW, {"residual_ptr": ALL}, {"next_ptr": ALL})
    reads, writes = {"dnext_ptr": ALL, "norm_input_ptr": ALL}, {}
    if learns:
        reads, writes = reads | {"dout_ptr": ALL}, {"dresidual_ptr": ALL}
    check(backward, (len(reads) + len(writes)) * BATCH * ROW, reads, writes)


@all_tiles
@each_norm
def test_all_rows_in_place(norm):
    """Only the samples of the sum with an update are written; the norm's backward reads the sum."""
    rows = ROWS[0.5]
    tensors = dict(residual=samples(), update=samples(3), **weights(norm))
    forward, backward = run(Add(row_set(rows)), next_input(norm), in_place=True, **tensors)
    minimum = (6 + 3 + 3 + 6) * ROW  # residual, out; branch; next
    check(forward, minimum, {"residual_ptr": ALL, "update_ptr": ALL}, {"out_ptr": rows, "next_ptr": ALL})
    minimum = (6 + 6 + 6 + 6 + 3) * ROW  # dout, dresidual; dnext, the sum; dupdate
    reads = {"dout_ptr": ALL, "dnext_ptr": ALL, "norm_input_ptr": ALL}
    check(backward, minimum, reads, {"dresidual_ptr": ALL, "dupdate_ptr": ALL})


@each_norm
@pytest.mark.parametrize("rows", [None, NEXT_ROWS[0.5]], ids=["all", "some"])
@each_dtype
def test_statistics(norm, rows, dtype):
    """A position with a norm keeps 8 bytes, or only rstd's 4 with RMSNorm: float32 for any dtype of the residual."""
    positions = TOKENS * (BATCH if rows is None else len(rows))
    tensors = dict(residual=samples(dtype=dtype), update=samples(dtype=dtype), **weights(norm))
    forward, backward = run(Add(), next_input(norm, rows and row_set(rows)), **tensors)
    expected = dict.fromkeys(["mean_ptr", "rstd_ptr"][norm == "rms" :], FLOAT * positions)
    for counted, how in ((forward, "written"), (backward, "read")):
        small = next(launched.small for launched in counted.launches if launched.big)
        moved = {name: getattr(traffic, how).bytes for name, traffic in small.items()}
        assert {name: moved[name] for name in ("mean_ptr", "rstd_ptr") if name in moved} == expected


@each_norm
@pytest.mark.parametrize("rows", [None, NEXT_ROWS[0.5]], ids=["all", "some"])
@pytest.mark.parametrize("learn", [False, True], ids=["", "no_grad"])
def test_nothing_is_saved_without_a_gradient(norm, rows, learn):
    """Because nothing requires one, or because autograd doesn't record."""
    tensors = dict(residual=samples(), update=samples(3), **weights(norm))
    tensors = {name: t if t is None or learn else t.detach() for name, t in tensors.items()}
    with torch.set_grad_enabled(not learn):
        forward, _ = run(Add(row_set(ROWS[0.5])), next_input(norm, rows and row_set(rows)), **tensors)
    num_next = BATCH if rows is None else len(rows)
    writes = {"out_ptr": ALL, "next_ptr": ALL}
    check(forward, (6 + 3 + 6 + num_next) * ROW, {"residual_ptr": ALL, "update_ptr": ALL}, writes)
    assert not {"mean_ptr", "rstd_ptr"} & {*forward.launches[0].tensors}


@each_norm
@out_of_place_and_in_place
def test_wide_backward(monkeypatch, norm, in_place):
    """Rows that don't fit in registers: the same program reads dnext and the norm's input twice in a short time, the
    second time from the cache. All other tensors are read once."""
    pieces = launch.LaunchConfig(tile=2 * 64 * FLOAT, max_columns=64 * FLOAT, num_warps=4, tiles=2)
    monkeypatch.setitem(launch.CONFIGS, "residual_add_norm_bwd_wide", {"default": ((2**31, pieces),)})
    monkeypatch.setattr(triton_backward, "WIDEST_SUM_IN_REGISTERS", 128 * FLOAT)
    width, rows, next_rows = 200, [1, 3], [3, 0]

    def make(num_rows):
        return torch.randn(num_rows, 2, width).requires_grad_()

    with launchers.nothing_prepared():
        _, backward = run(
            Add(row_set(rows)), next_input(norm, row_set(next_rows)), in_place,
            residual=make(4), update=make(2), gamma=vector(width),
            weight=vector(width), bias=vector(width) if norm == "layer" else None,
        )  # fmt: skip
    assert "_residual_add_norm_bwd_wide_kernel" in [launched.kernel for launched in backward.launches]
    touched, changed = ([0, 1, 3], next_rows) if in_place else (ALL, ALL)
    minimum = ((3 + 2 if in_place else 4 + 4) + 2 * (2 + 2) + 2 + 2) * 2 * width * FLOAT
    #          dout, dresidual                  dnext, norm_input branch for dγ, dupdate
    reads = {"dout_ptr": touched, "dnext_ptr": ALL, "norm_input_ptr": ALL, "update_ptr": ALL}
    writes = {"dresidual_ptr": changed, "dupdate_ptr": ALL}
    check(backward, minimum, reads, writes, twice={"dnext_ptr", "norm_input_ptr"})


@each_norm
@each_dtype
@out_of_place_and_in_place
def test_odd_channels(norm, dtype, in_place):
    """13 channels: a tile's row ends within a sector, and the tile's idle columns touch nothing."""
    batch, tokens, channels = 5, 7, 13

    def make(num_rows):
        return torch.randn(num_rows, tokens, channels).to(dtype).requires_grad_()

    forward, backward = run(
        Add(row_set([4, 1])), next_input(norm, row_set([2, 1, 0])), in_place,
        residual=make(batch), update=make(2),
        weight=vector(channels), bias=vector(channels) if norm == "layer" else None,
    )  # fmt: skip
    row = tokens * channels * dtype.itemsize
    touched, added, changed = ([0, 1, 2, 4], [4, 1], [2, 1, 0]) if in_place else (ALL, ALL, ALL)
    # At each end a row touches a sector and needs at least one element of it: 1.15 with rows of 364 bytes, 1.33 of 182.
    sectors = 1 + 2 * (SECTOR - dtype.itemsize) / row
    rows = (4 + 2 if in_place else 5 + 5) + 2 + 3 + 3  # residual, out; branch; next, norm_input
    writes = {"out_ptr": added, "next_ptr": ALL, "norm_input_ptr": ALL}
    check(forward, rows * row, {"residual_ptr": touched, "update_ptr": ALL}, writes, sectors)
    rows = (4 + 3 if in_place else 5 + 5) + 3 + 3 + 2  # dout, dresidual; dnext, norm_input; dupdate
    reads = {"dout_ptr": touched, "dnext_ptr": ALL, "norm_input_ptr": ALL}
    check(backward, rows * row, reads, {"dresidual_ptr": changed, "dupdate_ptr": ALL}, sectors)


# A path: its add with the gather of the next path's rows, forward and backward


@each_p
@each_next_p
@pytest.mark.parametrize("norm", [None, "layer"])
@out_of_place_and_in_place
def test_path(p, next_p, norm, in_place):
    rows, next_rows = ROWS[p], NEXT_ROWS[next_p]
    forward, backward = run(
        Add(row_set(rows)), next_input(norm, row_set(next_rows)), in_place,
        residual=samples(), update=samples(len(rows)), gamma=vector(), **weights(norm),
    )  # fmt: skip
    kept, num_next = len(rows), len(next_rows)
    either = len({*rows, *next_rows})
    seen = num_next if norm else 0  # by the norm
    if in_place:
        sums, dsums = either + kept, either + num_next  # residual, out; dout, dresidual
    else:
        sums, dsums = BATCH + BATCH, BATCH + BATCH
    if num_next == 0:
        dsums = kept  # dresidual is dout
    there = sums + kept + num_next + seen  # branch; next, norm_input
    back = dsums + num_next + seen + kept + kept  # dnext, norm_input, branch for dγ; dupdate
    check_total(forward + backward, (there + back) * ROW)


@each_p
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@each_dtype
def test_path_with_scales(p, norm, dtype):
    """All rows are next rows, as where a scale drops rows: without a norm the residual itself is the next input."""
    kept = len(ROWS[p])
    forward, backward = run(
        Add(row_scale=row_scale(ROWS[p])), next_input(norm) if norm else None,
        residual=samples(dtype=dtype), update=samples(dtype=dtype), **weights(norm),
    )  # fmt: skip
    there = BATCH + kept + BATCH  # residual, branch; out
    back = kept + BATCH  # dout; dupdate
    if norm:
        there += BATCH  # next
        back = BATCH + BATCH + BATCH + BATCH + BATCH  # dout, dnext, the sum; dresidual, dupdate
    check_total(forward + backward, (there + back) * TOKENS * CHANNELS * dtype.itemsize)


@pytest.mark.parametrize("norm", [None, "layer"])
def test_two_paths(norm):
    """The sum is handed from call to call and overwritten, and so is its gradient in the backward; the branch between
    is the identity. Autograd adds no gradients up: torch touches no tensor."""
    rows, next_rows, last_rows = row_set([4, 0, 3]), row_set([3, 1, 5]), row_set([2, 5])
    first = FusedCall(kernels(), Add(rows), next_input(norm, next_rows))
    x, branch = samples(), samples(3)
    with count_traffic() as forward:
        results = first(Operands(x, branch, **weights(norm)))
        second = FusedCall(kernels(), Add(next_rows), next_input(norm, last_rows), previous=first)
        results = second(Operands(results.out, results.next, **weights(norm)))
    outs = [results.out, results.next]
    douts = [torch.randn_like(out) for out in outs]
    with count_traffic() as backward:
        torch.autograd.grad(outs, [x, branch], douts)
    there = (6 + 3 + 6 + 3) + (4 + 3 + 3 + 2)  # residual, branch; out, next; of the second rows 1, 2, 3, 5 and 1, 3, 5
    back = (6 + 2 + 6 + 3) + (
        5 + 3 + 3 + 3
    )  # dout, dnext; dresidual, dupdate; of the first rows 0, 1, 3, 4, 5 and 1, 3, 5
    if norm:
        there, back = there + 3 + 2, back + 2 + 3  # norm_input
    check_total(forward + backward, (there + back) * ROW)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_two_paths_on_all_rows(norm):
    """A sum that is kept for the norm's backward isn't overwritten by the next one. Writing that elsewhere moves no
    more bytes, and nothing is copied. The gradient is still overwritten."""
    first = FusedCall(kernels(), Add(), next_input(norm))
    x, branch = samples(), samples()
    with count_traffic() as forward:
        results = first(Operands(x, branch, **weights(norm)))
        second = FusedCall(kernels(), Add(), next_input(norm), previous=first)
        results = second(Operands(results.out, results.next, **weights(norm)))
    outs = [results.out, results.next]
    douts = [torch.randn_like(out) for out in outs]
    with count_traffic() as backward:
        torch.autograd.grad(outs, [x, branch], douts)
    assert (first.owns_gradient, second.in_place) == (True, False)
    there, back = 4 * BATCH, 5 * BATCH  # residual, branch; out, next. dout, dnext, the sum; dresidual, dupdate
    check_total(forward + backward, 2 * (there + back) * ROW)
