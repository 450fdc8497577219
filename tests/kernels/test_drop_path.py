import pytest
import torch
from hypothesis import given

from rdp_kernels.ops.drop_path import draw_row_scale

from . import ops
from .budget import check
from .cases import Case, drop_paths, in_parts


@in_parts(200)
@given(case=drop_paths(residual=False))
def test_drop_path_against_float64(numerics_backend, check_new, part, case):
    check_new(case, ops.drop_path)


@in_parts(200)
@given(case=drop_paths(residual=True))
def test_drop_path_add_against_float64(numerics_backend, check_new, part, case):
    check_new(case, ops.drop_path_add)


@pytest.mark.parametrize("width", [1, 3, 13, 64, 197, 257, 1000])
@pytest.mark.parametrize("op", [ops.drop_path, ops.drop_path_add])
def test_widths(backend, op, width):
    """In bfloat16, where 1 / 0.7 is far from a number."""
    alone = op is ops.drop_path
    check(Case((6, width), ("bfloat16",) * 4, residual=not alone, gamma=not alone, drop_prob=0.3), op)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float64])
def default_dtype(request):
    """A dtype that users may have set for the tensors that they make. Masks don't depend on it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.mark.parametrize("scale_by_keep", [True, False])
@pytest.mark.parametrize("drop_prob", [0.01, 1 / 3, 1.0])
@pytest.mark.parametrize(("dtype", "factors"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_factors_of_rows(default_dtype, dtype, factors, drop_prob, scale_by_keep):
    count = 400_000
    found = draw_row_scale(torch.empty(count, 0, dtype=dtype), drop_prob, scale_by_keep)
    dropped = (found == 0).sum().item() / count
    assert abs(dropped - drop_prob) <= 5 * (drop_prob * (1 - drop_prob) / count) ** 0.5
    scale = 1 / (1 - drop_prob) if scale_by_keep and drop_prob < 1 else 1.0
    assert found.dtype == factors
    assert torch.equal(found[found != 0].unique(), torch.tensor([scale] * (drop_prob < 1), dtype=factors))
    assert draw_row_scale(torch.empty(0, 4, dtype=dtype), drop_prob, scale_by_keep).shape == (0,)
