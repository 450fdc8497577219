"""The fused add of a chain of paths: the add of one path and the input of the next, with learning and frozen rows."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given

import rdp_kernels as rdp

from . import ops
from .budget import check
from .cases import BACKENDS, Case, in_parts, joints
from .values import operands_of

MIXED = Case((5, 2, 7), rows=(4, 0, 3), num_learning=2, gamma=True, row_scale=1 / 0.7, gives_next=True, next_rows=(1, 4, 3, 2), num_next_learning=3, norm="layer", weight=True, bias=True)  # fmt: skip


@in_parts(200)
@given(case=joints())
def test_against_float64(numerics_backend, check_new, part, case):
    check_new(case, ops.joint)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 3, 13, 64, 197, 257, 1000])
def test_widths(backend, width, dtype):
    check(replace(MIXED, shape=(5, 2, width), dtypes=(dtype,) * 4), ops.joint)


@pytest.mark.parametrize("tiles", ["small", "wide"])
@pytest.mark.parametrize(("num_learning", "num_next_learning"), [(0, 0), (3, 4), (0, 4), (3, 0), (2, 1)])
def test_all_or_none_learn(backend, num_learning, num_next_learning, tiles):
    check(replace(MIXED, num_learning=num_learning, num_next_learning=num_next_learning, tiles=tiles), ops.joint)


@pytest.mark.parametrize("backend", ["eager", *BACKENDS])
def test_a_scale_of_zero_drops_frozen_rows_too(backend):
    with rdp.use_backend(backend):
        check(replace(MIXED, row_scale=0.0), ops.joint)


NEXT_INPUTS = {
    "all rows": {},
    "some rows": dict(next_rows=(4, 1, 3)),
    "frozen rows": dict(next_rows=(4, 1, 3, 0), num_next_learning=2),
    "detached rows": dict(next_rows=(4, 1, 3, 0), num_next_learning=2, detached="frozen"),
}


@pytest.mark.parametrize(("norm", "dtype"), [("layer", "bfloat16"), ("rms", "float16")])
@pytest.mark.parametrize("next_input", NEXT_INPUTS.values(), ids=NEXT_INPUTS)
@pytest.mark.parametrize("tiles", ["tuned", "wide"])
@pytest.mark.parametrize("how", ["nothing is added", "added", "added in place"])
def test_a_norm_sees_a_narrow_residual_exactly(backend, how, tiles, next_input, norm, dtype):
    """Its backward too, with vectors in float32. Tensors that are only read aren't rounded, and the sum is rounded
    once."""
    dtypes = (dtype, dtype, "float32", "float32")
    case = Case((5, 2, 20), dtypes, gives_next=True, norm=norm, weight=True, bias=norm == "layer", tiles=tiles)
    if how == "nothing is added":
        check(replace(case, adds=False, **next_input), ops.joint)
        return
    case = replace(case, rows=(4, 0, 3), num_learning=2, gamma=True, row_scale=1 / 0.7, **next_input)
    if how == "added":
        check(case, ops.joint)
    else:
        check(replace(case, in_place=True), ops.in_place)


@pytest.mark.parametrize("norm", [None, "rms"])
@pytest.mark.parametrize("detached", ["frozen", "all"])
def test_constant_rows_have_no_gradient(backend, detached, norm):
    case = replace(MIXED, norm=norm, weight=norm is not None, bias=False, detached=detached)
    results = ops.joint(operands_of(case), case)
    assert results.out.requires_grad
    assert results.next.requires_grad == (detached == "frozen")
    assert not results.frozen_next.requires_grad
    check(case, ops.joint)


@pytest.mark.parametrize(
    "used", [("out",), ("next",), ("frozen_next",), ("out", "frozen_next"), ("next", "frozen_next")]
)
@pytest.mark.parametrize("norm", [None, "layer"])
def test_unused_results(backend, used, norm):
    """The vectors of an unused norm get None as in torch, so that an optimizer doesn't move them."""
    case = replace(MIXED, norm=norm, weight=norm is not None, bias=norm is not None, used=used)
    check(case, ops.joint)
    operands = operands_of(case)
    results = ops.joint(operands, case)
    sum(getattr(results, name).sum() for name in used).backward()
    if norm is not None and used == ("out",):
        assert operands.weight.grad is None
        assert operands.bias.grad is None
    assert torch.isfinite(operands.residual.grad).all()
