"""Drop-path that draws its own masks: timed providers give the textbook's gradients, and wrong ones fail.

Budget: 15 seconds in all, and 60 for the one with inductor.
"""

import csv
import itertools

import pytest
import torch

from benchmarks import drop_path, library_models, step
from benchmarks.__main__ import main
from benchmarks.cases import BOUND, CPU, TINY
from benchmarks.drop_path import (
    TRAINERS,
    Compiled,
    CompiledSubset,
    Ours,
    OursCompiled,
    OwnMasks,
    Subset,
    drop_path_case,
    verify_drawn,
)
from benchmarks.machine import Ceilings, Device

pytestmark = [pytest.mark.slow, pytest.mark.skipif(library_models.missing() is not None, reason="needs timm")]
NAMES = [
    *("plain", "drop-path", "compiled drop-path", "subset", "compiled subset"),
    *("ours drop-path", "ours compiled drop-path"),
]
EAGER_NAMES = [name for name in NAMES if "compiled" not in name]


@pytest.fixture(autouse=True)
def _without_inductor(monkeypatch):
    monkeypatch.setattr(drop_path, "COMPILER", "eager")
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", TRAINERS)
def test_gradients_are_the_textbooks(kind):
    assert verify_drawn(kind, "vit-s").error <= BOUND


def test_a_subset_without_its_scale_is_caught(monkeypatch):
    def unscaled(x, rows, branch):
        return x.index_add(0, rows, branch(x.index_select(0, rows)))

    monkeypatch.setattr(drop_path, "_add_subset", unscaled)
    assert verify_drawn(Subset, "vit-s").error > 1e-4


def test_a_subset_of_other_rows_is_caught(monkeypatch):
    right = drop_path._subset_block
    monkeypatch.setattr(drop_path, "_subset_block", lambda block, x, a, b: right(block, x, b, a))
    assert verify_drawn(Subset, "vit-s").error > 1e-4


@pytest.mark.parametrize("kind", [OwnMasks, Ours])
def test_another_rate_is_caught(kind, monkeypatch):
    right = kind.drawn
    monkeypatch.setattr(kind, "drawn", lambda self: (right(self)[0], 0.3))
    assert verify_drawn(kind, "vit-s").error > 1e-4


@pytest.mark.parametrize("kind", TRAINERS)
def test_masks_are_new_at_each_step_and_of_their_rate(kind):
    config = TINY["vit-s"]
    torch.manual_seed(0)
    trainer = kind(config.network(CPU), *config.data(CPU), 0.4, recorded=True)
    keeps = [trainer.drawn()[0] for _ in range(20)]
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(keeps))
    kept = torch.stack(keeps).double().mean()
    assert abs(kept - (0.5 if issubclass(kind, Subset) else 0.6)) < 0.05  # 3 of 6 rows


def test_compiled_drop_paths_make_one_graph():
    """One graph of a subset serves all blocks; timm's network is one graph."""
    for kind, graphs in ((Compiled, 1), (CompiledSubset, 1)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        config = TINY["vit-s"]
        trainer = kind(config.network(CPU), *config.data(CPU), 0.4)
        trainer.train()
        trainer.train()
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        assert not torch._dynamo.utils.counters["graph_break"]


def test_the_case(monkeypatch):
    case = drop_path_case("tiny", "vit-s", 1, Device.of("cpu"))
    assert [provider.name for provider in case.providers] == NAMES
    assert (case.labels["work"], case.labels["mode"], case.labels["p"]) == ("drop-path", "sample", 0.4)
    assert set(case.count_flop(1)) == set(EAGER_NAMES), "other libraries' are compiled"
    eager = drop_path_case("tiny", "vit-s", 1, Device.of("cpu"), compiled=False)
    assert [provider.name for provider in eager.providers] == EAGER_NAMES

    def fails(self, network, images):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(OursCompiled, "prepare", fails)
    case = drop_path_case("tiny", "vit-s", 1, Device.of("cpu"))
    assert {p.name: p.unavailable for p in case.providers if p.unavailable} == {
        "ours compiled drop-path": "RuntimeError: no compiler"
    }


def test_without_timm_rows_say_so(monkeypatch):
    monkeypatch.setattr(library_models, "installed", lambda name: False)
    case = drop_path_case("tiny", "vit-b", 1, Device.of("cpu"))
    assert [(p.name, p.unavailable) for p in case.providers] == [(name, "timm is not installed") for name in NAMES]


def test_where_it_is_measured():
    models = ["resnet", "vit-s", "vit-b"]
    assert step.drop_path_models(None, "cpu", models) == []
    assert step.drop_path_models(None, "cuda", models) == ["vit-b"]
    assert step.drop_path_models("compiled", "cpu", models) == ["vit-s", "vit-b"]
    assert step.drop_path_models("eager", "cpu", models) == ["vit-s", "vit-b"]
    assert step.drop_path_models("none", "cuda", models) == []


def test_verdicts():
    row = {"model": "vit-b", "mode": "sample", "batch": 128, "dtype": "bf16 autocast", "work": "drop-path", "p": 0.4}
    ratios = {"compiled drop-path": 0.8, "compiled subset": 0.7, "ours drop-path": 0.72, "drop-path": 0.1}
    rows = [row | {"provider": name, "ratio_rounds": ratio} for name, ratio in ratios.items()]
    assert list(step.gpu_verdicts(rows)) == [
        "vit-b sample p=0.4 drop-path: ours drop-path takes 0.900 of compiled drop-path, target 1.0: met",
        "vit-b sample p=0.4 drop-path: ours drop-path takes 1.029 of compiled subset, target 1.0: MISSED",
    ]
    assert not list(step.gpu_verdicts([row | {"ratio_rounds": None, "provider": name} for name in ratios]))


@pytest.mark.slow
def test_the_command_writes_the_rows(tmp_path, monkeypatch):
    """Budget: 10 seconds."""
    monkeypatch.setattr(Device, "ceilings", lambda self: Ceilings(1e11, 1e10))
    out = tmp_path / "step.csv"
    options = [
        "--tiny",
        "--turns",
        "1",
        "--model",
        "vit-s",
        "--mode",
        "block",
        "--drop-path",
        "compiled",
        "--csv",
        str(out),
    ]
    assert main(["step", *options]) == 0
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["work"] for row in rows] == ["scheme"] * 5 + ["drop-path"] * len(NAMES)
    assert [row["provider"] for row in rows[5:]] == NAMES
    assert {(row["unit"], row["mode"], row["p"], row["dtype"]) for row in rows[5:]} == {
        ("two steps of drop-path", "sample", "0.4", "float32")
    }
    assert all(float(row["p50_ms"]) > 0 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Compiled, CompiledSubset])
def test_gradients_with_inductor(kind, monkeypatch):
    """Budget: 40 seconds in all, mostly for compiling."""
    monkeypatch.setattr(drop_path, "COMPILER", "inductor")
    assert verify_drawn(kind, "vit-s").error <= BOUND
