from functools import partial

import pytest
import torch
from hypothesis import given

import rdp_kernels as rdp
from tests.conftest import DEVICE

from . import ops
from .budget import check
from .cases import Case, in_parts, residual_add_norms


@in_parts(200)
@given(case=residual_add_norms())
def test_against_float64(numerics_backend, check_new, part, case):
    check_new(case, ops.residual_add_norm)


@pytest.mark.parametrize("dtypes", [("float32",) * 4, ("bfloat16", "bfloat16", "float32", "float32")])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("width", [1, 3, 13, 64, 197, 257, 1000])
def test_widths(backend, width, norm, dtypes):
    case = Case(
        (4, width),
        dtypes,
        rows=(3, 0, 2),
        row_scale=1 / 0.7,
        gamma=True,
        gives_next=True,
        next_rows=(1, 3, 0),
        norm=norm,
        weight=True,
        bias=norm == "layer",
    )
    check(case, ops.residual_add_norm)


@pytest.mark.parametrize(("width", "norm"), [(5000, "layer"), (16384, "rms")])
def test_a_row_that_registers_do_not_hold(backend, width, norm):
    """The backward reads the row in pieces. Only few vectors need gradients, as interpreted sums are slow."""
    case = Case(
        (3, width),
        rows=(2, 0),
        gamma=True,
        gives_next=True,
        next_rows=(1, 2),
        norm=norm,
        weight=True,
        wanted=("residual", "update", "weight"),
    )
    check(case, ops.residual_add_norm)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    ("spread", "offset", "eps"),
    [(1e-3, 1, 1e-6), (1e-3, 1, 1e-2), (1e-6, 1, 1e-12), (100.0, 1, 1e-6), (1.0, 1000, 1e-6)],
)
def test_eps_and_scale(backend, norm, spread, offset, eps):
    """Eps above the variance, far below it, both tiny; and a mean whose square is far above the variance."""
    vectors = dict(gamma=True, weight=True, bias=norm == "layer")
    case = Case((3, 2, 17), gives_next=True, norm=norm, eps=eps, spread=spread, offset=offset, **vectors)
    check(case, ops.residual_add_norm)


@pytest.mark.parametrize("width", [1, 6])
def test_rows_without_variance(backend, width):
    """LayerNorm of a constant row is the bias, with a finite gradient; with one channel every row is constant."""
    draw = partial(torch.randn, dtype=torch.float64, device=DEVICE)
    x, weight, bias, dnext = (
        draw(2, 1).expand(2, width).clone().requires_grad_(),
        draw(width),
        draw(width),
        draw(2, width),
    )
    weight.requires_grad_()
    _, normed = rdp.residual_add_norm(x, torch.zeros_like(x), weight, bias)
    expected = torch.nn.functional.layer_norm(x, (width,), weight, bias, 1e-6)
    torch.testing.assert_close(normed, bias.expand(2, width), rtol=0, atol=1e-12)
    actual, wanted = (torch.autograd.grad(y, [x, weight], dnext) for y in (normed, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_no_row_has_a_norm(backend, norm):
    """No next row, no sample or no token: the residual's gradient passes, and those of the vectors are zero."""
    for shape, next_rows in (((3, 2, 5), ()), ((0, 2, 5), None), ((3, 0, 5), None), ((3, 0, 5), (1,))):
        case = Case(
            shape, gamma=True, gives_next=True, next_rows=next_rows, norm=norm, weight=True, bias=norm == "layer"
        )
        check(case, ops.residual_add_norm)
