"""Sizes of updates against residuals, by the norms of each sample."""

import math

import matplotlib
import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.diagnostics import BranchSizes, branch_sizes

from ..nets import conv_net
from .models import images, states_of, vit

matplotlib.use("Agg")

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def means(residuals, branches):
    """Ratio, residual, branch, cosine: `[4, L]`, sample by sample."""
    rows = []
    for residual, branch in zip(residuals, branches, strict=True):
        of_samples = []
        for r, b in zip(residual.flatten(1).tolist(), branch.flatten(1).tolist(), strict=True):
            sizes = math.hypot(*r), math.hypot(*b)
            dot = math.fsum(p * q for p, q in zip(r, b, strict=True))
            of_samples.append([sizes[1] / sizes[0], *sizes, dot / (sizes[0] * sizes[1])])
        rows.append(torch.tensor(of_samples, dtype=torch.float64).mean(dim=0))
    return torch.stack(rows, dim=1)


def test_means_over_samples_whatever_their_batch():
    """γ counts as part of the branch."""
    model, x = vit(layer_scale=0.3).double(), images(6, torch.float64)
    found = branch_sizes(model, list(x.split([3, 1, 2])))
    stream, added = states_of(model, x)
    got = torch.stack([found.ratio, found.residual, found.branch, found.cosine])
    torch.testing.assert_close(got, means(stream[:-1], added), **EXACT)
    assert found.labels == tuple(f"paths.{index}" for index in range(4))
    assert found.num_samples == 6


def test_the_residual_is_what_the_shortcut_makes_of_the_input():
    model, x = conv_net(), torch.randn(3, 2, 5, 5, dtype=torch.float64)
    found = branch_sizes(model, x)
    model.eval()
    with torch.no_grad():
        stream = model.paths[0](model.stem(x) + model.offset)
        path = model.paths[1]
        expected = means([path.shortcut(stream)], [path.fn(stream)])
    got = torch.stack([found.ratio, found.residual, found.branch, found.cosine])
    torch.testing.assert_close(got[:, 1:2], expected, **EXACT)


def test_bfloat16_is_widened_first():
    model, x = vit().bfloat16(), images(5, torch.bfloat16)
    found = branch_sizes(model, x)
    model.eval()
    with torch.no_grad():
        stream, path = model.embed(x), model.paths[0]
        expected = means([stream], [path.fn(path.norm(stream))])
    torch.testing.assert_close(found.ratio[0], expected[0, 0], **EXACT)


class Zero(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def test_nothing_is_added_and_added_to_nothing():
    model = nn.Sequential(rdp.ResidualBranch(Zero()), rdp.ResidualBranch(nn.Linear(3, 3)))
    found = branch_sizes(model, [torch.zeros(2, 3)])
    assert found.ratio.tolist() == [0, math.inf]
    assert found.cosine.tolist() == [0, 0]


def test_rows_are_counted_for_each_path():
    """Windows: four rows of two samples."""

    class Windows(nn.Module):
        def __init__(self):
            super().__init__()
            self.whole, self.halves = rdp.ResidualBranch(Zero()), rdp.ResidualBranch(Zero(), mode="block")

        def forward(self, x):
            return self.halves(self.whole(x).reshape(-1, 1))

    found = branch_sizes(Windows(), torch.tensor([[3.0, 4.0], [6.0, 8.0]]))
    assert found.residual.tolist() == [7.5, 5.25]
    assert found.num_samples == 2


def test_refuses_no_batches():
    with pytest.raises(ValueError, match="batches must hold at least one batch"):
        branch_sizes(vit(), [])


def test_a_curve_is_drawn():
    from matplotlib.figure import Figure

    sizes = torch.tensor([[0.5, 0.1], [2, 3], [1, 0.3], [0, 0.5]], dtype=torch.float64)
    ax = Figure().subplots()
    assert BranchSizes(("a", "b"), *sizes, 3).plot(ax) is ax
    assert ax.lines[0].get_ydata().tolist() == [0.5, 0.1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_ylim()[0] == 0
