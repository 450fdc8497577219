"""The paper's four figures show the trained networks, with a panel for each method.

Budget: 10 seconds in all.
"""

from dataclasses import replace

import pytest
import torch

from examples import spiral
from examples.spirals import figures
from examples.spirals.data import Points
from examples.spirals.measure import logits, similarity
from examples.spirals.portrait import EDGE, GRID
from examples.spirals.study import BASE, MAIN, demonstration, run_case
from examples.spirals.training import Training
from rdp_kernels.diagnostics import heatmap_rebound

pytestmark = pytest.mark.slow

SMALL = replace(BASE, depth=7, width=4, points=12, steps=3)


@pytest.fixture(scope="module")
def portraits():
    return {case: run_case(case, [0, 1], lambda _: None)[1] for case in demonstration(SMALL)}


def test_a_portrait_is_of_the_first_network_after_its_training(portraits):
    case = demonstration(SMALL)[0]
    portrait, training = portraits[case], Training(case.method, SMALL, [0, 1], 3)
    for _ in range(3):
        training.step()
    row, column = 17, 90  # y, x
    line = torch.linspace(-EDGE, EDGE, GRID)
    there = torch.stack([line[column], line[row]]).expand(2, 1, 2)
    wanted = logits(training.model, there)[0, 0].softmax(dim=-1)[1]
    torch.testing.assert_close(portrait.probability[row, column], wanted, rtol=0, atol=1e-5)
    test = Points.draw([0, 1], 1000, SMALL.noise, "test points")
    cka = similarity(training.model, test.x[:, :250]).mean(dim=0)
    torch.testing.assert_close(portrait.similarity, cka, rtol=0, atol=1e-5)
    first, points = portrait.states[0], test.x[0, :250]
    stem = training.model.stem
    torch.testing.assert_close(first, points @ stem.weight[0].T + stem.bias[0], rtol=0, atol=1e-5)
    assert portrait.steps == [0, 1, 2, 3]
    assert not torch.equal(portrait.distances[0], portrait.distances[-1])


def test_figures_have_a_panel_for_each_method(portraits):
    deep, small = ({case.method: p for case, p in portraits.items() if case.setting.depth == depth} for depth in (7, 6))
    assert list(deep) == list(MAIN)
    heatmaps = figures.similarity(deep).axes[: len(MAIN)]
    for axis, (method, portrait) in zip(heatmaps, deep.items(), strict=True):
        assert axis.get_title() == f"{method}\nrebound of the mean {heatmap_rebound(portrait.similarity):.2f}"
        torch.testing.assert_close(torch.as_tensor(axis.images[0].get_array()), portrait.similarity)
    for axis, portrait in zip(figures.decisions(deep).axes, deep.values(), strict=True):
        torch.testing.assert_close(torch.as_tensor(axis.images[0].get_array()), portrait.probability)
        assert len(axis.collections[0].get_offsets()) == 12
    assert len(figures.features(deep).axes) == 5 * len(MAIN)
    for axis, portrait in zip(figures.training(small).axes, small.values(), strict=False):
        assert axis.images[0].get_array().shape == (7 * 4, len(portrait.steps))


def test_the_command_draws_them(tmp_path, monkeypatch):
    def run_here(cases, seeds, workers, watch):
        return ((case, run_case(case, seeds, lambda _: None)) for case in cases)

    monkeypatch.setattr(spiral, "run_all", run_here)
    options = ["--quick", "--depth", "7", "--width", "4", "--points", "12", "--steps", "2", "--seeds", "1"]
    assert spiral.main([*options, "--out", str(tmp_path)]) == 0
    names = {"features.png", "decisions.png", "similarity.png", "training.png"}
    assert {file.name for file in tmp_path.iterdir()} == {*names, "results.csv"}
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names)
