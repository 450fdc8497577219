"""Cases that `tests/kernels` runs on GPUs only: sums over several chunks of rows, several blocks of columns, several
rounds of a grid. `test_kernels.py` runs them in a copy of the tree whose library has the CUDA kernels."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rdp_kernels as rdp
from rdp_kernels.kernels.native.library import has_cuda
from tests.kernels import ops
from tests.kernels.budget import check
from tests.kernels.cases import Case

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
