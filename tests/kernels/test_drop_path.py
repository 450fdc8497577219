import pytest
from hypothesis import given

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
