"""The memory layout of results, and which tensors are copied."""

import pytest
import torch

import rdp_kernels as rdp
from tests.conftest import DEVICE

from .values import laid_out

RESIDUALS = {
    "tokens": ((4, 3, 5), "dense"),
    "misaligned": ((4, 3, 5), "offset"),
    "rows apart": ((4, 3, 5), "padded"),
    "every other element": ((4, 3, 5), "strided"),
    "transposed tokens": ((4, 3, 5), "transposed"),
    "images": ((4, 3, 2, 5), "dense"),
    "images, channels last": ((4, 3, 2, 5), "channels_last"),
    "transposed matrix": ((4, 5), "transposed"),
    "numbers": ((4,), "strided"),
}
EACH = pytest.mark.parametrize(("shape", "layout"), RESIDUALS.values(), ids=RESIDUALS)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_results_are_like_the_residual(backend, shape, layout, dtype):
    """Results are dense and have the residual's dtype. Where a sample of the residual is dense, they have its order."""
    x = laid_out(torch.randn(shape).to(dtype), layout)
    rows = torch.tensor([3, 1], device=DEVICE)
    branch = torch.ones_like(x, memory_format=torch.contiguous_format).float()
    whole = rdp.residual_add(x, branch)
    some = rdp.residual_add(x, branch[:2], rows=rows)
    gathered = rdp.gather_rows(x, rows)
    for actual, expected in ((whole, (x.double() + 1).to(dtype)), (some[rows], whole[rows]), (gathered, x[rows])):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    dense = torch.empty_like(x) if layout != "transposed" or x.dim() > 2 else torch.empty(shape)
    for result in (whole, some):
        assert result.stride() == dense.stride()
    assert gathered.stride()[1:] == dense.stride()[1:]


def test_gradients_are_like_the_residual(backend):
    """An image network in channels last stays there, forward and backward."""
    x = torch.randn(4, 3, 2, 5, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    branch = torch.randn(2, 3, 2, 5, device=DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    rows, gamma = torch.tensor([2, 0], device=DEVICE), torch.rand(3, device=DEVICE)
    out = rdp.residual_add(x, branch, rows=rows, gamma=gamma, channel_dim=1, activation="relu")
    for grad in torch.autograd.grad(out, [x, branch], torch.randn_like(out)):
        assert grad.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("residual", [name for name, (shape, _) in RESIDUALS.items() if len(shape) > 1])
def test_norms_of_any_layout(backend, residual):
    """The norm is over the last dimension, in any memory layout."""
    shape, layout = RESIDUALS[residual]
    x = laid_out(torch.randn(shape, dtype=torch.float64), layout).requires_grad_()
    weight, rows = torch.rand(shape[-1], dtype=torch.float64, device=DEVICE), torch.tensor([3, 1], device=DEVICE)
    out, normed = rdp.residual_add_norm(x, torch.ones_like(x), weight, next_rows=rows)
    expected = torch.nn.functional.layer_norm(x + 1, shape[-1:], weight, None, 1e-6)[rows]
    torch.testing.assert_close(normed, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out, x + 1, rtol=1e-12, atol=1e-12)
    dnext = torch.randn_like(normed)
    actual, wanted = (torch.autograd.grad(y, x, dnext)[0] for y in (normed, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


def test_one_sample_may_be_very_far_from_the_next(backend):
    """A view with huge strides between samples, as of a long video: only its rows are touched."""
    memory = torch.full((3, 4096), torch.nan, device=DEVICE)
    x = memory[:, 7:12]
    x.copy_(torch.randn(3, 5))
    before = memory.clone()
    out = rdp.residual_add(x, torch.ones(3, 5, device=DEVICE))
    torch.testing.assert_close(out, x + 1)
    assert torch.equal(memory.nan_to_num(), before.nan_to_num())


def test_vectors_that_are_views(backend):
    """Columns of a matrix as row_scale, rows, gamma, weight and bias, as views of a table of all paths."""
    x, branch = torch.randn(4, 3, device=DEVICE), torch.randn(4, 3, device=DEVICE)
    table = torch.rand(4, 5, device=DEVICE)
    order = torch.stack([torch.tensor([2, 0, 3, 1])] * 2, dim=1).to(DEVICE)
    of_channels = table[:3]
    arguments = dict(
        rows=order[:, 0], row_scale=table[:, 1], gamma=of_channels[:, 2], next_rows=order[1:, 1],
    )  # fmt: skip
    actual = rdp.residual_add_norm(x, branch, of_channels[:, 3], of_channels[:, 4], **arguments)
    copies = {name: value.contiguous() for name, value in arguments.items()}
    with rdp.use_backend("eager"):
        weight, bias = of_channels[:, 3].contiguous(), of_channels[:, 4].contiguous()
        expected = rdp.residual_add_norm(x, branch, weight, bias, **copies)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("known", [False, True])
def test_negated_views(backend, known):
    """Their memory holds the negative of their values, as that of `z.conj().imag` does."""
    x, gamma, rows = torch.randn(3, 4, 6), torch.rand(6), torch.tensor([2, 0], device=DEVICE)
    x, gamma = x.to(DEVICE), gamma.to(DEVICE)

    def results(view):
        residual, update, factor = (view(t).requires_grad_() for t in (x, x, gamma))
        out = rdp.residual_add(residual, update, gamma=factor, row_scale=2.0)
        gradients = torch.autograd.grad(out, (residual, update, factor), view(torch.ones_like(out)))
        total, normed = rdp.residual_add_norm(residual, update, factor)
        dnormed = torch.autograd.grad((total, normed), (residual, update, factor), (view(x), view(x)))
        return out, *gradients, total, normed, *dnormed, rdp.gather_rows(residual, rows)

    expected = results(lambda t: t.detach().clone())  # makes the calls known
    for _ in range(1 + known):
        actual = results(lambda t: torch._neg_view(t.detach().neg()))
        torch.testing.assert_close(actual, expected)
