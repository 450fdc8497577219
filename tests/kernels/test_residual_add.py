import pytest
import torch
from hypothesis import given

import rdp_kernels as rdp
from tests.conftest import DEVICE

from . import ops
from .budget import check, same
from .cases import Case, in_parts, residual_adds


@in_parts(200)
@given(case=residual_adds())
def test_against_float64(numerics_backend, check_new, part, case):
    check_new(case, ops.residual_add)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [1, 3, 13, 64, 197, 257, 1000])
def test_widths(backend, width, dtype):
    """With a residual in one layout and a branch in another; one column short of a tile, and one past it."""
    layouts = ("offset", "padded", "dense", "strided")
    case = Case((3, 2, width), (dtype,) * 4, layouts, rows=(2, 0), row_scale=1 / 0.7, gamma=True)
    check(case, ops.residual_add)


@pytest.mark.parametrize(
    "layouts", [("dense",) * 4, ("channels_last",) * 4, ("dense", "channels_last", "dense", "dense")]
)
@pytest.mark.parametrize("channel_dim", [1, 3, -2])
@pytest.mark.parametrize("rows", [None, (3, 0)])
def test_gamma_on_images(backend, layouts, channel_dim, rows):
    """A factor for each column and one for each position; sums over positions and over samples."""
    case = Case((4, 5, 3, 7), layouts=layouts, rows=rows, row_scale="tensor", gamma=True, channel_dim=channel_dim)
    check(case, ops.residual_add)


def test_relu_at_zero(backend):
    """Torch's gradient there is 0, and NaN passes in both directions."""
    residual = torch.tensor([[0.0, -1.0, 2.0, torch.nan, -0.0, 1.0]], device=DEVICE, requires_grad=True)
    branch = torch.tensor([[0.0, 1.0, -2.0, 1.0, 0.0, 1.0]], device=DEVICE)
    out = rdp.residual_add(residual, branch, activation="relu")
    expected = (residual + branch).relu()
    assert same(out, expected)
    assert torch.equal(*(torch.autograd.grad(o, residual, torch.ones_like(o))[0] for o in (out, expected)))
