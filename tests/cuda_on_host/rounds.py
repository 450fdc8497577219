"""Cases that `tests/kernels` runs on GPUs only: sums over several chunks of rows, several blocks of columns, several
rounds of a grid. `test_kernels.py` runs them in a copy of the tree whose library has the CUDA kernels."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rdp_kernels as rdp
from rdp_kernels.kernels.native import launchers
from rdp_kernels.kernels.native.library import has_cuda
from rdp_kernels.kernels.spec import Add, NextInput, Operands, Results, RowSet
from tests.cuda_on_host.build import launches_of, scratch_bytes
from tests.kernels import ops
from tests.kernels.budget import check
from tests.kernels.cases import Case

LIBRARY = Path(rdp.__file__).parent / "_C.abi3.so"
# Residual, branch, γ: the dtypes that kernels support, with γ in a pack of 4, 8, 16 and 32 bytes.
DTYPES = [
    ("float32", "float32", "float32"),
    ("float32", "float32", "float16"),
    ("float32", "bfloat16", "float32"),
    ("float32", "float16", "bfloat16"),
    ("bfloat16", "bfloat16", "float32"),
    ("float16", "float16", "float16"),
]
# Packs; one element at a time because of the residual's address, and because rows are no whole packs.
WIDTHS = [(264, "dense"), (264, "offset"), (263, "dense")]
ROWS = dict(rows=(4, 0, 3), num_learning=2, next_rows=(1, 4, 3, 2), num_next_learning=3)


@pytest.fixture(autouse=True)
def _native():
    assert Path(rdp.__file__).parents[1] == Path(__file__).parents[2]
    assert has_cuda()
    with rdp.use_backend("native"):
        yield


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize(("width", "layout"), WIDTHS)
def test_sums_against_float64(dtypes, width, layout):
    """400 rows; the first two samples of the branch learn."""
    layouts = (layout, *["dense"] * 3)
    case = Case((5, 80, width), (*dtypes, "float32"), layouts, gives_next=True, row_scale=1 / 0.7, **ROWS)
    check(replace(case, gamma=True), ops.joint)
    check(case, ops.joint)


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize(("width", "layout"), WIDTHS)
def test_relu_against_float64(dtypes, width, layout):
    """All rows of the branch, some of them dropped."""
    layouts = (layout, *["dense"] * 3)
    check(Case((5, 80, width), (*dtypes, "float32"), layouts, row_scale="tensor", activation="relu"), ops.residual_add)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_vectors_at_odd_addresses_against_float64(dtype):
    check(Case((3, 50, 64), (dtype,) * 4, ("dense", "dense", "dense", "offset"), gamma=True), ops.residual_add)


@pytest.mark.parametrize("dtypes", DTYPES, ids="-".join)
@pytest.mark.parametrize(
    ("shape", "layout"), [((5, 6, 4, 64), "dense"), ((5, 6, 4, 64), "offset"), ((5, 6, 7, 9), "dense")]
)
def test_sums_by_position_against_float64(dtypes, shape, layout):
    """γ along a dimension that isn't innermost, with dimensions outside and inside."""
    layouts = (layout, *["dense"] * 3)
    for channel_dim in (1, 2):
        case = Case(shape, (*dtypes, "float32"), layouts, gives_next=True, row_scale=1 / 0.7, **ROWS)
        check(replace(case, gamma=True, channel_dim=channel_dim), ops.joint)


@pytest.mark.parametrize(("shape", "channel_dim"), [((3, 12000, 8), 2), ((600, 3, 7, 9), 1)])
def test_partial_sums_are_bounded_against_float64(shape, channel_dim):
    """A row of partial sums is of many rows and samples, so that the second stage reads few of them."""
    check(Case(shape, ("float32",) * 4, gamma=True, channel_dim=channel_dim), ops.residual_add)
    partial_rows = scratch_bytes(LIBRARY) / (4 * shape[channel_dim])
    assert 1 < partial_rows <= int(os.environ.get("RDP_MAX_CHUNKS", 512))


def test_blocks_that_sum_are_bounded_against_float64():
    """Five blocks cover the columns, so that there are fewer rows of partial sums than chunks could be."""
    shape, blocks = (1, 3000, 600), 5
    check(Case(shape, ("float32",) * 4, gamma=True), ops.residual_add)
    most = max(int(os.environ.get("RDP_MAX_SUM_BLOCKS", 2048)) // blocks, 1)
    assert scratch_bytes(LIBRARY) / (4 * shape[-1]) == min(3000 // 64 + 1, most)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_no_rows_against_float64(dtype):
    """An empty gradient has no data, but a dtype, and the residual's zeros are written in that dtype."""
    case = Case((3, 40), (dtype,) * 4, adds=False, gives_next=True, next_rows=(), used=("next",))
    check(case, ops.gather_rows)


@pytest.mark.parametrize("rows", [[2, 3, -1, 0], [2**40], [-(2**63)]])
def test_rows_out_of_range_against_float64(rows):
    """They are left out, as a GPU's host doesn't wait to check them. ASan sees that nothing else is touched."""
    x, index = torch.randn(3, 8), torch.tensor(rows)
    there = [place for place, row in enumerate(rows) if 0 <= row < 3]
    gathered = torch.ops.rdp.native_gather_rows(x, index)
    assert torch.equal(gathered[there], x[index[there]])
    back = torch.ops.rdp.native_gather_rows_backward(torch.ones(len(rows), 8), index, 3)
    expected = torch.zeros(3, 8)
    expected[index[there]] = 1
    assert torch.equal(back, expected)


LIST = torch.tensor([2, 0])
INVERSE = torch.tensor([1, 9, 0, 9])
# Options, whether γ learns, and the launches forward and backward.
CALLS = {
    "a sum": ({}, False, 1, 0),
    "scaled": ({"row_scale": 0.5}, False, 1, 1),
    "γ learns": ({"gamma": torch.ones(8)}, True, 1, 2),
    "γ is frozen": ({"gamma": torch.ones(8)}, False, 1, 1),
    "γ by position": ({"gamma": torch.ones(3), "channel_dim": 1}, True, 1, 2),
    "rows": ({"rows": LIST, "gamma": torch.ones(8)}, True, 2, 2),  # one inverts the rows
    "relu": ({"activation": "relu"}, False, 1, 1),
}


def launches(call):
    """Runs a call; its result and the number of launches."""
    before = launches_of(LIBRARY)
    result = call()
    return result, launches_of(LIBRARY) - before


@pytest.mark.parametrize("name", CALLS)
def test_launches_against_float64(name):
    """The compiled library serves these calls without being asked for."""
    options, gamma_learns, forward, backward = CALLS[name]
    residual = torch.randn(4, 3, 8, requires_grad=True)
    branch = torch.randn(2 if "rows" in options else 4, 3, 8, requires_grad=True)
    gamma = options.get("gamma")
    leaves = [residual, branch]
    if gamma_learns:
        leaves.append(gamma.clone().requires_grad_())
        options = options | {"gamma": leaves[-1]}
    with rdp.use_backend("auto"):
        out, counted = launches(lambda: rdp.residual_add(residual, branch, **options))
        _, counted_backward = launches(lambda: torch.autograd.grad(out, leaves, torch.ones_like(out)))
    assert (counted, counted_backward) == (forward, backward)


def test_launches_of_a_gather_against_float64():
    """The list itself says what is gathered; the backward inverts it."""
    residual = torch.randn(4, 8, requires_grad=True)
    out, forward = launches(lambda: rdp.gather_rows(residual, LIST))
    _, backward = launches(lambda: torch.autograd.grad(out, residual, torch.ones_like(out)))
    assert (forward, backward) == (1, 2)


@pytest.mark.parametrize("inverse", [INVERSE, None])
def test_launches_with_an_inverse_against_float64(inverse):
    """An add and a gather, and the backward of both: nothing is inverted where a plan did it."""
    operands = Operands(torch.randn(4, 8), torch.randn(2, 8), gamma=torch.ones(8))
    rows = RowSet(LIST, 2, inverse)
    add, next_input = Add(rows), NextInput(rows)
    (results, context), forward = launches(lambda: launchers.fused_add_fwd(operands, add, next_input))
    gradients, wanted = (results.out, results.next, None), Operands(True, True, gamma=True)
    inverted = 0 if inverse is not None else 1
    _, backward = launches(
        lambda: launchers.fused_add_bwd(context, operands, Results(), gradients, add, next_input, wanted)
    )
    assert (forward, backward) == (2 + inverted, 2 + 2 * inverted)


@pytest.mark.parametrize(
    "leave", [dict(dtype=torch.float64), dict(branch_dtype=torch.float32, dtype=torch.bfloat16)], ids=str
)
def test_unserved_calls_are_left_to_others_against_float64(leave):
    dtype = leave["dtype"]
    x, branch = torch.randn(4, 8).to(dtype), torch.randn(4, 8).to(leave.get("branch_dtype", dtype))
    with rdp.use_backend("auto"):
        out, counted = launches(lambda: rdp.residual_add(x, branch, gamma=torch.ones(8)))
    assert counted == 0
    torch.testing.assert_close(out, x + branch.to(dtype))
    with pytest.raises(RuntimeError, match="can't serve this call: the CUDA kernels"):
        rdp.residual_add(x, branch, gamma=torch.ones(8))


@pytest.mark.parametrize("inverse", [[0, 0, 0, 0], [2**40] * 4, [-(2**63), 1, 1, 2]])
def test_any_inverse_stays_within_the_tensors_against_float64(inverse):
    operands = Operands(torch.randn(4, 8), torch.randn(1, 8), torch.randn(1, 8), torch.ones(8))
    rows = RowSet(LIST, 1, torch.tensor(inverse))
    add, next_input = Add(rows), NextInput(rows)
    results, context = launchers.fused_add_fwd(operands, add, next_input)
    gradients, wanted = results[:3], Operands(True, True, True, True)
    launchers.fused_add_bwd(context, operands, Results(), gradients, add, next_input, wanted)


def test_a_failed_allocation_against_float64():
    """Tools that try smaller batches look for these words."""
    with pytest.raises(RuntimeError, match=r"CUDA out of memory\. "):
        torch.ops.rdp.native_gather_rows_backward(torch.ones(1, 8), torch.tensor([0]), 2**50)
