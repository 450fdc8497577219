import math

import pytest
import torch
from scipy import stats

import rdp_kernels as rdp
from rdp_kernels.plan import draw_block_keep, draw_sample_keep, plan_generator

RATES = [0.0, 0.1, 0.35, 0.5, 0.5, 0.9, 1.0]
DRAWS = 4000


def test_rates():
    assert rdp.drop_path_rates(0.3, 4) == [0.3] * 4
    assert rdp.drop_path_rates(0.3, 4, "linear") == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert rdp.drop_path_rates(0.3, 1, "linear") == [0.0]
    assert rdp.drop_path_rates(0.3, 0) == []


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
@pytest.mark.parametrize("batch", [1, 2, 3, 8, 13, None])
def test_marginal_rates(sampling, batch):
    """Every path's and every sample's rate is p: two-sided binomial tests, Bonferroni-corrected to 1e-3 in all."""
    kept = torch.zeros(len(RATES), batch or 1)
    for number in range(DRAWS):
        generator = plan_generator(7, number)
        if batch is None:
            kept += draw_block_keep(RATES, sampling, generator)[:, None]
        else:
            kept += draw_sample_keep(RATES, batch, sampling, generator)
    num_tests = kept.numel() * 12
    for p, row in zip(RATES, kept.tolist(), strict=True):
        for count in row:
            assert stats.binomtest(int(count), DRAWS, 1 - p).pvalue > 1e-3 / num_tests


@pytest.mark.parametrize("p", [0.0, 0.1, 0.29, 1 / 3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("batch", [0, 1, 2, 5, 10, 100])
def test_fixed_counts_in_sample_mode(p, batch):
    kept = {
        int(k) for n in range(50) for k in draw_sample_keep([p] * 4, batch, "fixed", plan_generator(0, n)).sum(dim=1)
    }
    expected = round(batch * (1 - p), 9)
    assert kept <= {math.floor(expected), math.ceil(expected)}


@pytest.mark.parametrize(
    "rates", [RATES, [0.1] * 20, [0.3] * 10, [1 / 3] * 7, rdp.drop_path_rates(0.4, 24, "linear"), [1.0] * 5]
)
def test_fixed_counts_in_block_mode(rates):
    expected = round(sum(rates), 9)
    for number in range(200):
        keep = draw_block_keep(rates, "fixed", plan_generator(1, number))
        assert int((~keep).sum()) in {math.floor(expected), math.ceil(expected)}
        assert all(not k for k, p in zip(keep, rates, strict=True) if p == 1)
        assert all(k for k, p in zip(keep, rates, strict=True) if p == 0)


@pytest.mark.parametrize("extreme", [0, 2**32 - 1])
def test_fixed_counts_survive_rounding_at_the_ends_of_the_range(extreme, monkeypatch):
    """0.1 · 20 and 0.7 · 10 are whole except for rounding."""
    monkeypatch.setattr(torch, "randint", lambda high, shape, **_: torch.full(shape, extreme))
    for rates, dropped in (([0.1] * 20, 2), ([0.7] * 10, 7), ([1 / 3] * 6, 2), ([1.0] * 3, 3), ([0.0] * 3, 0)):
        generator = plan_generator(0, 0)
        assert int((~draw_block_keep(rates, "fixed", generator)).sum()) == dropped
        assert (~draw_sample_keep(rates, len(rates), "fixed", generator)).sum(dim=1).tolist() == [dropped] * len(rates)


@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
def test_samples_are_dropped_independently_across_paths(sampling):
    """Correlation of two paths' masks, over many draws, is within 5 standard errors of 0."""
    a, b = [], []
    for number in range(DRAWS):
        keep = draw_sample_keep([0.5, 0.5], 4, sampling, plan_generator(3, number))
        a.append(keep[0]), b.append(keep[1])
    correlation = torch.corrcoef(torch.stack([torch.cat(a), torch.cat(b)]).double())[0, 1]
    assert abs(correlation) < 5 / math.sqrt(4 * DRAWS)


def test_generators_differ_by_seed_number_and_rank():
    """Also for seeds that differ above the 32 bits which torch's CPU generator keeps."""
    arguments = [(0, 0, 0), (1, 0, 0), (2**32, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0)]
    draws = {tuple(torch.rand(4, generator=plan_generator(*a)).tolist()) for a in arguments}
    assert len(draws) == len(arguments)


def test_plan():
    keep = torch.tensor([[True, False], [True, True]])
    plan = rdp.PathPlan(keep, [0.5, 0.1], "sample")
    keep[:] = False
    assert plan.keep.tolist() == [[True, False], [True, True]], "the plan doesn't follow the caller's tensor"
    assert (plan.num_paths, plan.batch_size, plan.dropped_paths) == (2, 2, [0])
    assert plan == rdp.PathPlan.from_state_dict(plan.state_dict())
    assert plan != rdp.PathPlan(plan.keep, [0.5, 0.2], "sample")
    assert rdp.PathPlan(torch.tensor([True, False]), [0.1, 0.2], "block").batch_size is None
    empty = rdp.PathPlan(torch.ones(2, 0, dtype=torch.bool), [0.5, 0.1], "sample")
    assert empty == rdp.PathPlan.from_state_dict(empty.state_dict())


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rdp.drop_path_rates(1.5, 3), ValueError, r"drop_prob .*\[0, 1\], got 1.5"),
        (lambda: rdp.drop_path_rates(-0.1, 3), ValueError, "drop_prob"),
        (lambda: rdp.drop_path_rates(float("nan"), 3), ValueError, "drop_prob.*nan"),
        (lambda: rdp.drop_path_rates("0.1", 3), TypeError, "drop_prob"),
        (lambda: rdp.drop_path_rates(0.1, -1), ValueError, "num_paths"),
        (lambda: rdp.drop_path_rates(0.1, 2.0), TypeError, "num_paths"),
        (lambda: rdp.drop_path_rates(0.1, 2, "cosine"), ValueError, "schedule.*'constant', 'linear'.*'cosine'"),
        (lambda: rdp.PathPlan(torch.ones(2), [0.1, 0.1], "block"), TypeError, "keep.*bool.*float32"),
        (lambda: rdp.PathPlan([True], [0.1], "block"), TypeError, "keep.*list"),
        (
            lambda: rdp.PathPlan(torch.ones(2, dtype=torch.bool), [0.1, 0.1], "sample"),
            ValueError,
            r"keep.*\[paths, batch\]",
        ),
        (
            lambda: rdp.PathPlan(torch.ones(2, dtype=torch.bool), [0.1], "block"),
            ValueError,
            "drop_probs.*2 rows.*got 1",
        ),
        (lambda: rdp.PathPlan(torch.ones(1, dtype=torch.bool), [2.0], "block"), ValueError, r"drop_probs\[0\]"),
        (lambda: rdp.PathPlan(torch.ones(1, dtype=torch.bool), [0.1], "row"), ValueError, "mode.*'row'"),
        (
            lambda: rdp.PathPlan(torch.ones(1, dtype=torch.bool, device="meta"), [0.1], "block"),
            ValueError,
            "keep.*CPU.*meta",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
