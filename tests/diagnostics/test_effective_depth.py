"""Effective depth: Poisson binomial lengths of linear paths, and a direct enumeration for a nonlinear network."""

import itertools
import math

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.diagnostics import effective_depth, participation

from .nets import EACH_MODEL, batch_norm_resnet, left_as_it_was, own_vit
from .test_gradients import converted_blocks


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def linear(factors):
    return rdp.ResidualSequence(*(rdp.ResidualBranch(Scale(a)) for a in factors))


def poisson_binomial(odds):
    """P(number of successes) of independent trials."""
    shares = [1.0]
    for a in odds:
        p = a / (1 + a)
        shares = [s * (1 - p) + before * p for s, before in zip([*shares, 0], [0, *shares], strict=True)]
    return shares


def test_linear_paths_have_lengths_as_the_poisson_binomial():
    factors = [0.1, 3.0, 0.7, 1.0, 0.02, 12.0, 0.5]
    x = torch.randn(4, 3, dtype=torch.float64)
    found = effective_depth(linear(factors), lambda m: m(x).sum())
    assert found.lengths == list(range(8))
    assert found.sets == [math.comb(7, k) for k in range(8)]
    assert found.shares == pytest.approx(poisson_binomial(factors), rel=1e-10)
    assert found.depth == pytest.approx(sum(a / (1 + a) for a in factors), rel=1e-10)
    assert found.norms[0] == pytest.approx(math.sqrt(12), rel=1e-10)


def test_a_thousand_paths():
    """C(1100, 550) is too large for a float. All paths are equal, so that one set per length is enough."""
    lengths = [0, 366, 367, 1100]
    x = torch.ones(1, 1, dtype=torch.float64)
    found = effective_depth(linear([0.5] * 1100), lambda m: m(x).sum(), samples=1, lengths=lengths)
    logs = [math.log(math.comb(1100, k)) + k * math.log(0.5) for k in lengths]
    weights = [math.exp(log - max(logs)) for log in logs]
    assert found.shares == pytest.approx([weight / sum(weights) for weight in weights], rel=1e-10)
    assert found.sets == [1, 1, 1, 1]


@pytest.mark.parametrize("build", [own_vit, batch_norm_resnet])
def test_against_an_enumeration_by_hand(build):
    model, images = build()
    found = effective_depth(model, lambda m: m(images).square().mean())
    model.eval()
    sums = [0.0] * 7
    for subset in itertools.product([False, True], repeat=6):
        x = first = model.embed(images)
        for path, through in zip(model.paths, subset, strict=True):
            branch = path.fn(x if path.norm is None else path.norm(x))
            branch = branch if path.gamma is None else branch * path.gamma
            shortcut = x if path.shortcut is None else path.shortcut(x)
            x = shortcut.detach() + branch if through else shortcut + branch.detach()
            x = x.relu() if path.activation == "relu" else x
        (grad,) = torch.autograd.grad(model.classify(x).square().mean(), first)
        sums[sum(subset)] += grad.norm().item()
    shares = [s / sum(sums) for s in sums]
    assert found.shares == pytest.approx(shares, rel=1e-10)
    assert found.depth == pytest.approx(sum(k * s for k, s in enumerate(shares)), rel=1e-10)
    assert 0 < found.depth < 6


def test_samples_are_seeded_means_over_different_sets():
    factors = [0.1, 3.0, 0.7, 1.0, 0.02, 12.0]
    x = torch.randn(2, 2, dtype=torch.float64)

    def measured(**options):
        return effective_depth(linear(factors), lambda m: m(x).sum(), **options)

    found = measured(samples=6, seed=1)
    assert found.sets == [1, 6, 6, 6, 6, 6, 1]
    assert found == measured(samples=6, seed=1)
    whole = measured()
    exact = [0, 1, 5, 6]  # all sets of these lengths
    assert [found.norms[k] for k in exact] == pytest.approx([whole.norms[k] for k in exact], rel=1e-10)
    assert found.norms[3] != pytest.approx(whole.norms[3], rel=1e-3)
    assert found.norms[3] != measured(samples=6, seed=2).norms[3]
    products = [math.prod(c) for c in itertools.combinations(factors, 3)]
    means = {sum(chosen) / 2 for chosen in itertools.combinations(products, 2)}
    mean = measured(samples=2, lengths=[3]).norms[0] / whole.norms[0]
    assert min(abs(mean - m) / m for m in means) < 1e-10, "the mean of two different sets"


@EACH_MODEL
def test_the_model_is_left_as_it_was(build):
    model, images = build()
    with left_as_it_was(model):
        found = effective_depth(model, lambda m: m(images).square().mean(), samples=1, lengths=[0, 1, 4])
    assert all(norm > 0 for norm in found.norms)
    calls = []

    def fails(m):
        calls.append(m(images))
        return {}["broken"] if len(calls) == 3 else calls[-1].sum()

    with left_as_it_was(model), pytest.raises(KeyError, match="broken"):
        effective_depth(model, fails)
    torch.testing.assert_close(calls[2], calls[0], rtol=1e-10, atol=1e-10)  # the value is the whole network's


def test_a_frozen_stem_changes_nothing():
    model, images = own_vit()
    whole = effective_depth(model, lambda m: m(images).square().mean(), lengths=[0, 2])
    model.requires_grad_(False)
    part = effective_depth(model, lambda m: m(images).square().mean(), lengths=[0, 2])
    assert part.norms == pytest.approx(whole.norms, rel=1e-10)
    model, images = converted_blocks(nn.Identity())
    plain = effective_depth(model, lambda m: m(images).sum())
    learning = effective_depth(model, lambda m: m(images.clone().requires_grad_()).sum())
    assert plain.norms == pytest.approx(learning.norms, rel=1e-10)
    assert plain.norms[0] == pytest.approx(math.sqrt(12), rel=1e-10)
    model, images = converted_blocks(nn.Linear(4, 4))
    assert effective_depth(model, lambda m: m(images.clone().requires_grad_()).sum()).depth > 0
    with pytest.raises(ValueError, match="first path's shortcut is computed outside of it"):
        effective_depth(model, lambda m: m(images).sum())


def test_paths_that_are_not_called_do_not_count():
    model = nn.ModuleDict({"used": linear([2.0]), "idle": linear([1.0])})
    x = torch.ones(2, 2)
    found = effective_depth(model, lambda m: m["used"](x).sum())
    assert found.paths == 1
    assert found.shares == pytest.approx([1 / 3, 2 / 3])


def test_wrong_input_is_named():
    model, x = linear([1.0, 2.0]), torch.ones(2, 2)
    for lengths in ([], [3], [1, 1]):
        with pytest.raises(ValueError, match="lengths must be different numbers from 0 to 2"):
            effective_depth(model, lambda m: m(x).sum(), lengths=lengths)
    with pytest.raises(ValueError, match="called none of its paths"):
        effective_depth(model, lambda m: x.sum())
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        effective_depth(model, lambda m: m(x).sum(), samples=0)
    for factor in (0.0, math.inf):
        with pytest.raises(ValueError, match="finite gradient at the input of the first path"):
            effective_depth(model, lambda m, factor=factor: (m(x) * factor).sum())
    with pytest.raises(TypeError, match="loss must return a scalar tensor"):
        effective_depth(model, lambda m: m(x))
    with pytest.raises(TypeError, match="seed must be an integer"):
        effective_depth(model, lambda m: m(x).sum(), seed="0")


def test_participation():
    assert participation([1.0, 1.0, 1.0, 1.0]) == pytest.approx(4)
    assert participation(torch.tensor([0, 5.0, 0])) == pytest.approx(1)
    assert participation([3.0, 1.0]) == pytest.approx(16 / 10)
    assert participation([3e200, 1e200]) == pytest.approx(1.6)
    assert participation([0.0, 0.0]) == 0
    for wrong in ([], [1.0, -1.0], [math.nan], [math.inf]):
        with pytest.raises(ValueError, match="values must be finite, non-negative"):
            participation(wrong)


def test_the_plot_shows_the_shares():
    pytest.importorskip("matplotlib")
    x = torch.ones(2, 2)
    found = effective_depth(linear([1.0, 2.0]), lambda m: m(x).sum())
    ax = found.plot()
    assert [bar.get_height() for bar in ax.patches] == found.shares
    assert list(ax.lines[0].get_xdata()) == [found.depth] * 2
