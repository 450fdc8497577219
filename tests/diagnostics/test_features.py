"""Moments, quantiles and effective rank of features, against the values themselves."""

import math

import matplotlib
import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.diagnostics import FeatureDistributions, feature_distributions, hsic
from rdp_kernels.diagnostics.features import QUANTILES

from .models import images, states_of, vit

matplotlib.use("Agg")

EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Stream(nn.Module):
    """A model whose features are its input."""

    def __init__(self):
        super().__init__()
        self.path = rdp.ResidualBranch(nn.Identity())

    def forward(self, x):
        return self.path(x)


@pytest.mark.parametrize("of", ["stream", "branch"])
def test_all_values_of_all_batches(of):
    model, x = vit(layer_scale=0.3).double(), images(7, torch.float64)
    found = feature_distributions(model, list(x.split([4, 1, 2])), of=of)
    layers = torch.stack(states_of(model, x)[of == "branch"]).flatten(1)
    torch.testing.assert_close(found.mean, layers.mean(dim=1), **EXACT)
    torch.testing.assert_close(found.std, layers.std(dim=1, correction=0), **EXACT)
    at = torch.tensor(QUANTILES, dtype=torch.float64)
    torch.testing.assert_close(found.quantiles, layers.quantile(at, dim=1).T, **EXACT)
    assert len(found.labels) == len(layers)
    assert (found.of, found.num_samples) == (of, 7)


def test_zeros_and_what_is_not_finite():
    x = torch.tensor([[0, 1, math.nan, 2], [3, math.inf, 0, -math.inf], [0, 5, -2, 1]])
    found = feature_distributions(Stream(), list(x.split([2, 1])))
    values = torch.tensor([0, 1, 2, 3, 0, 0, 5, -2, 1]).double()
    assert found.non_finite.tolist() == [3, 3]
    assert found.zeros.tolist() == [0.25, 0.25]
    torch.testing.assert_close(found.mean[0], values.mean(), **EXACT)
    torch.testing.assert_close(found.std[0], values.std(correction=0), **EXACT)
    torch.testing.assert_close(
        found.quantiles[0], values.quantile(torch.tensor(QUANTILES, dtype=torch.float64)), **EXACT
    )


def test_a_layer_without_a_finite_value():
    found = feature_distributions(Stream(), torch.full((4, 2), math.nan))
    assert found.mean.isnan().all()
    assert found.std.isnan().all()
    assert found.quantiles.isnan().all()
    assert found.effective_rank.isnan().all()
    assert found.non_finite.tolist() == [8, 8]


def test_values_are_picked_by_the_seed_and_in_proportion():
    """Batches of 100, 200 and 300 rows hold 1, 2 and 3. With 60 values a batch, their values are too many to keep."""
    x = torch.repeat_interleave(torch.tensor([1.0, 2, 3]), torch.tensor([100, 200, 300]))[:, None].repeat(1, 20)
    batches = list(x.split([100, 200, 300]))
    picked = feature_distributions(Stream(), batches, values_per_batch=60)
    assert picked.quantiles[0].tolist() == [1, 1, 2, 2.5, 3, 3, 3], "a sixth, a third, a half"
    assert picked.mean[0].item() == pytest.approx(14 / 6, abs=1e-10), "of all"

    noise = torch.randn(50, 40)
    quantiles = [feature_distributions(Stream(), noise, values_per_batch=99, seed=s).quantiles[0] for s in (0, 0, 1)]
    assert torch.equal(quantiles[0], quantiles[1])
    assert not torch.equal(quantiles[0], quantiles[2])
    torch.testing.assert_close(quantiles[0][2:5], torch.tensor([-0.674, 0, 0.674]).double(), rtol=0, atol=0.4)


def test_effective_rank_is_the_ratio_of_u_statistics():
    """Means over samples of the covariance's trace and of HSIC_1; two rows are too few for them."""
    x = torch.randn(13, 6, dtype=torch.float64) * torch.arange(1, 7) + 4
    parts = x.split([6, 5, 2])
    found = feature_distributions(Stream(), list(parts))
    trace = sum(len(p) * p.T.cov().trace() for p in parts[:2]) / 11
    norm = sum(len(p) * hsic(p, p) for p in parts[:2]) / 11
    torch.testing.assert_close(found.effective_rank[0], trace**2 / norm, **EXACT)


def test_effective_rank_is_not_bound_by_the_batch():
    """Eight directions with the same variance, though four samples span three."""
    x = torch.randn(800, 10, dtype=torch.float64) * torch.tensor([2.0, 2, 2, 2, 2, 2, 2, 2, 0.01, 0])
    found = feature_distributions(Stream(), list(x.split(4)))
    assert found.effective_rank[0].item() == pytest.approx(8, rel=0.1)


def test_effective_rank_of_what_does_not_vary():
    constant, single = torch.full((5, 3), 0.1), torch.full((5, 3), 0.1)
    single[2] = torch.tensor([1.0, 2, 3])
    ranks = [feature_distributions(Stream(), x).effective_rank[0].item() for x in (constant, single, single[:3])]
    assert ranks[:2] == [0, math.inf]
    assert math.isnan(ranks[2])


def test_bfloat16_is_widened_first():
    x = torch.randn(6, 50).bfloat16() + 100
    found, wide = (feature_distributions(Stream(), t) for t in (x, x.double()))
    for name in ("mean", "std", "quantiles", "effective_rank"):
        torch.testing.assert_close(getattr(found, name)[0], getattr(wide, name)[0], **EXACT)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([], {}, "batches must hold at least one batch"),
        (images(5), {"of": "layers"}, "of must be one of"),
        (images(5), {"values_per_batch": 0}, "values_per_batch must be at least 1, got 0"),
    ],
)
def test_refuses(batches, options, message):
    with pytest.raises(ValueError, match=message):
        feature_distributions(vit(), batches, **options)


def test_bands_are_drawn():
    from matplotlib.figure import Figure

    quantiles = torch.arange(14).double().view(2, 7)
    numbers = torch.zeros(2, dtype=torch.float64)
    found = FeatureDistributions(("a", "b"), numbers, numbers, quantiles, numbers, numbers.long(), numbers, "branch", 3)
    ax = Figure().subplots()
    assert found.plot(ax) is ax
    bands = [sorted({y for _, y in band.get_paths()[0].vertices.tolist()}) for band in ax.collections]
    assert bands == [[0, 6, 7, 13], [1, 5, 8, 12], [2, 4, 9, 11]]
    assert ax.lines[0].get_ydata().tolist() == [3, 10]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["1% to 99%", "5% to 95%", "25% to 75%", "median"]
