"""Removing and swapping paths, against the forward written by hand; and every number of a study, computed again."""

import itertools
import re
import statistics

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from examples.models import forward_with_ends
from rdp_kernels.diagnostics import lesion_study, swapped, without
from rdp_kernels.diagnostics.lesions import subsets

from .nets import EACH_MODEL, batch_norm_resnet, converted_timm, left_as_it_was, own_vit


def loss(model, images):
    return model(images).square().mean()


def assert_equal(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", [own_vit, batch_norm_resnet])
def test_without_is_the_network_without_the_branches(build):
    model, images = build()
    model.eval()
    ends = [torch.clone] * 6
    ends[0] = ends[3] = torch.zeros_like  # in the ResNet 3 has a shortcut, whose output is negative in places
    whole = model(images)
    for paths in ([0, 3], ["paths.0", 3], {"paths.3", "paths.0"}):
        with without(model, paths):
            assert_equal(model(images), forward_with_ends(model, images, ends))
    with without(model, "paths.0"), without(model, 3):
        assert_equal(model(images), forward_with_ends(model, images, ends))
    assert not torch.allclose(forward_with_ends(model, images, ends), whole)
    assert_equal(model(images), whole)


def test_paths_of_a_converted_model_are_removed_and_swapped():
    """Blocks have two paths, attention and MLP: paths 0 to 3 are those of the first two blocks."""
    model, images = converted_timm()
    model.eval()

    def by_hand(branches):
        """`branches`: the block and kind of the branch that each path runs, or None."""
        seen = []
        hook = model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model(images)
        hook.remove()
        x = seen[0]
        for branch in branches:
            if branch is not None:
                block, kind = model.blocks[branch[0]], branch[1]
                x = x + (block.attn(block.norm1(x)) if kind == "attn" else block.mlp(block.norm2(x)))
        return model.forward_head(model.norm(x))

    order = [(block, kind) for block in range(len(model.blocks)) for kind in ("attn", "mlp")]
    with torch.no_grad():
        assert_equal(by_hand(order), model(images))
        with without(model, [1, 2]):
            assert_equal(model(images), by_hand([order[0], None, None, *order[3:]]))
        with swapped(model, [(0, 3)]):
            assert_equal(model(images), by_hand([order[3], *order[1:3], order[0], *order[4:]]))


@pytest.mark.parametrize(
    ("build", "pairs", "order"),
    [
        (own_vit, [(1, 4)], [0, 4, 2, 3, 1, 5]),
        (own_vit, [("paths.1", 4), (4, 0)], [1, 4, 2, 3, 0, 5]),  # one after the other
        (batch_norm_resnet, [(4, 5), (0, 2)], [2, 1, 0, 3, 5, 4]),
    ],
)
def test_swapped_paths_run_each_others_branch(build, pairs, order):
    model, images = build()
    model.eval()
    with swapped(model, pairs):
        got = model(images)
    x = model.embed(images)
    for place, other in enumerate(order):
        path, branch = model.paths[place], model.paths[other]
        update = branch.fn(x if branch.norm is None else branch.norm(x))
        update = update if branch.gamma is None else branch.gamma * update
        x = (x if path.shortcut is None else path.shortcut(x)) + update
        x = x.relu() if path.activation == "relu" else x
    assert_equal(got, model.classify(x))
    assert not torch.allclose(got, model(images))


def test_a_study_is_these_lesions():
    model, images = own_vit()
    model.eval()
    study = lesion_study(model, lambda m: loss(m, images), counts=(1, 2, 5), repeats=4, swaps=(1, 3), seed=3)
    with torch.no_grad():
        assert study.baseline == pytest.approx(loss(model, images).item(), rel=1e-10)
        for context, trials in [(without, t) for t in study.removed] + [(swapped, t) for t in study.swapped]:
            for choice, value in zip(trials.choices, trials.values, strict=True):
                with context(model, choice):
                    assert value == pytest.approx(loss(model, images).item(), rel=1e-10)
            assert trials.mean == pytest.approx(sum(trials.values) / 4, rel=1e-12)
            assert trials.std == pytest.approx(statistics.pstdev(trials.values), rel=1e-12)
            assert len(set(trials.choices)) == len(trials.choices) == 4
            assert {len(set(choice)) for choice in trials.choices} == {trials.count}
        for path, (value, effect) in enumerate(zip(study.each, study.effects, strict=True)):
            with without(model, path):
                assert value == pytest.approx(loss(model, images).item(), rel=1e-10)
            assert effect == value - study.baseline
    assert [t.count for t in study.removed] == [1, 2, 5]
    assert [t.count for t in study.swapped] == [1, 3]
    assert study == lesion_study(model, lambda m: loss(m, images), counts=(1, 2, 5), repeats=4, swaps=(1, 3), seed=3)
    other = lesion_study(model, lambda m: loss(m, images), each=False, counts=(2,), repeats=4, swaps=(), seed=4)
    assert (other.each, other.swapped) == ([], [])
    assert other.removed[0].choices != study.removed[1].choices


def test_all_choices_where_there_are_no_more_than_repeats():
    model, images = own_vit()
    study = lesion_study(model, lambda m: loss(m, images), each=False, counts=(2,), repeats=15, swaps=(1,))
    assert study.removed[0].choices == list(itertools.combinations(range(6), 2))
    assert study.swapped[0].choices == [(pair,) for pair in itertools.combinations(range(6), 2)]


def test_random_choices_are_different_sets():
    for seed in range(20):
        drawn = subsets(5, 2, 9, torch.Generator().manual_seed(seed))
        assert len({frozenset(choice) for choice in drawn}) == len(drawn) == 9
        assert all(len(set(choice)) == 2 and set(choice) < set(range(5)) for choice in drawn)


def test_only_paths_that_map_the_same_shape_are_swapped():
    """The ResNet's paths 0 to 2 keep [4, 8, 8], 3 goes to [6, 4, 4], which 4 and 5 keep."""
    model, images = batch_norm_resnet()
    study = lesion_study(model, lambda m: loss(m, images), each=False, counts=(), swaps=(1, 4, 5))
    assert study.swappable == [(0, 1), (0, 2), (1, 2), (4, 5)]
    assert [len(trials.values) for trials in study.swapped] == [4, 1, 0]
    assert study.swapped[2].mean != study.swapped[2].mean
    assert "swapped: 4" in str(study)
    study = lesion_study(model, lambda m: loss(m, images), each=False, counts=(), swaps=(1,), adjacent=True)
    assert study.swappable == [(0, 1), (1, 2), (4, 5)]

    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.paths = nn.Sequential(*(rdp.ResidualBranch(Cut(), shortcut=Cut()) for _ in range(3)))

        def forward(self, x):
            return self.paths(x)

    study = lesion_study(Uneven(), lambda m: loss(m, torch.randn(2, 8)), counts=())
    assert (study.swappable, study.swapped[0].choices, study.swapped[0].values) == ([], [], [])
    assert "swapped: none" in str(study)


class Cut(nn.Module):
    def forward(self, x):
        return x[:, 1:]


@EACH_MODEL
def test_the_model_is_left_as_it_was(build):
    model, images = build()

    def evaluate(m):
        assert not any(module.training for module in m.modules())
        assert not torch.is_grad_enabled()
        m.train()  # as evaluation functions do at their end
        return loss(m.eval(), images) + torch.rand(())

    with left_as_it_was(model):
        study = lesion_study(model, evaluate, counts=(2,), repeats=2)
        draw = torch.get_rng_state()
    with torch.random.fork_rng():
        torch.set_rng_state(draw)
        noise = torch.rand(()).item()  # the same in every evaluation
    plain = lesion_study(model, lambda m: loss(m, images), counts=(2,), repeats=2)
    assert study.baseline - plain.baseline == pytest.approx(noise, abs=1e-7)
    assert study.effects == pytest.approx(plain.effects, abs=1e-7)

    calls = []

    def fails(m):
        calls.append(m(images))
        torch.rand(3)
        if len(calls) == 4:
            raise KeyError("broken")
        return 0.0

    with left_as_it_was(model), pytest.raises(KeyError, match="broken"):
        lesion_study(model, fails)
    assert not torch.allclose(calls[3], calls[0])  # a path was missing when it was raised


def test_in_an_iteration_it_is_what_it_is_outside():
    model, images = own_vit()
    scheme = rdp.ResidualDropPath(model, 0.5)
    outside = lesion_study(model, lambda m: loss(m, images))
    for _ in scheme.iterations():
        model(images).square().sum().backward()
        assert lesion_study(model, lambda m: loss(m, images)) == outside


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (6, "no path 6; the model has 0 'paths.0', 1 'paths.1', "),
        ("paths.7", "no path 'paths.7'; the model has 0 'paths.0'"),
        ([-1], "no path -1; the model has"),
        ([True], "index or a name, got True (bool)"),
        ([1.0], "index or a name, got 1.0 (float)"),
    ],
)
def test_paths_that_are_not_there(paths, message):
    model, _ = own_vit()
    with pytest.raises((ValueError, TypeError), match=re.escape(message)), without(model, paths):
        pass
    wrong = paths if isinstance(paths, list) else [paths]
    with pytest.raises((ValueError, TypeError), match=re.escape(message)), swapped(model, [(0, wrong[0])]):
        pass


def test_wrong_input_is_named():
    model, images = own_vit()
    for pairs in ([3], [(1, 1)], [(1, 2, 3)], ["01"]):
        with pytest.raises(ValueError, match="pairs of two different paths"), swapped(model, pairs):
            pass
    with pytest.raises(ValueError, match="counts must be at most 6, the number of paths, got 7"):
        lesion_study(model, lambda m: 0.0, counts=(7,))
    with pytest.raises(ValueError, match="called none of its paths"):
        lesion_study(model, lambda m: 0.0)
    with pytest.raises(TypeError, match="evaluate must return a number, got tuple"):
        lesion_study(model, lambda m: (loss(m, images), 1))
    for wrong in ({"adjacent": 1}, {"each": 0}, {"seed": 0.5}):
        with pytest.raises(TypeError, match=f"{next(iter(wrong))} must be"):
            lesion_study(model, lambda m: loss(m, images), **wrong)
    resnet, images = batch_norm_resnet()
    with (
        swapped(resnet, [(0, 3)]),
        pytest.raises(ValueError, match=r"'paths.0' can't run the branch of 'paths.3', .*\[6, 6, 4, 4\]"),
    ):
        resnet.eval()(images)


def test_plots_show_the_study():
    pytest.importorskip("matplotlib")
    model, images = own_vit()
    study = lesion_study(model, lambda m: loss(m, images), counts=(2, 3), repeats=3, swaps=(1, 99))
    bars = study.plot()
    assert [bar.get_y() + bar.get_height() for bar in bars.patches] == pytest.approx(study.each)
    assert {bar.get_y() for bar in bars.patches} == {study.baseline}
    assert [label.get_text() for label in bars.get_xticklabels()] == study.names
    counts = study.plot_counts()
    lines = [list(container.lines[0].get_ydata()) for container in counts.containers]
    assert lines == [
        [study.baseline, *(t.mean for t in study.removed)],
        [study.baseline, study.swapped[0].mean],
    ]
    assert counts is study.plot_counts(counts)
