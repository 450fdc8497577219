"""`python -m benchmarks memory`: it counts the bytes computed by hand, in every run."""

import csv
import json

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from benchmarks import memory
from benchmarks.cases import CPU, TINY, VERIFIED, Config, own
from benchmarks.machine import Device
from benchmarks.memory import MemoryCase, MemorySession, peak_of, saved_storages, uses_of
from benchmarks.pairs import TRAINERS, BranchFrozen, Exact, Naive, Plain
from examples.models import ViT
from tests.benchmarks.commands import run_command

FLOAT, DOUBLE = 4, 8
SMALL = Config(own(ViT, 16, 4, 3, 10, 16, 2, 2), batch=4, image=16)
RUNS_ALL, RUNS_SOME = [True] * 4, [True, False, True, False]


class Linear(nn.Linear):
    """A network without paths."""

    @property
    def model(self):
        return self


def plan_of(kept):
    return rdp.PathPlan(torch.tensor(kept), [0.5] * len(kept), "block")


def uses(kind, kept=RUNS_SOME, config=SMALL):
    trainer, plan = config.trainer(kind, "block", CPU), plan_of(kept)
    trainer.train(plan)
    return uses_of(trainer, plan, CPU)


def test_one_layer_is_that_of_a_hand_count():
    batch, inner, outer = 6, 32, 10
    images, labels = torch.randn(batch, inner), torch.randint(outer, (batch,))
    trainer = Plain(Linear(inner, outer), images, labels, "block")
    trainer.train(plan_of(RUNS_ALL))
    logits, number, bias = batch * outer * FLOAT, FLOAT, outer * FLOAT
    for use in uses_of(trainer, plan_of(RUNS_ALL), CPU):
        assert use.saved == logits + number  # log-probabilities and their number; the images don't count
        # at the end of the backward: logits, loss and its gradient; gradients of the logits, the weight and the bias
        assert use.peak == logits + number + number + logits + inner * bias + bias


def test_the_optimizers_state_is_part_of_the_first_peak():
    trainer = Plain(Linear(1000, 2), torch.randn(1, 1000), torch.tensor([0]), "block")
    first, second = uses_of(trainer, plan_of(RUNS_ALL), CPU)
    assert first.peak - second.peak >= 2 * 2000 * FLOAT


def test_a_peak_counts_memory_that_is_alive_at_once():
    x = torch.zeros(1000)

    def run():
        y = x + x
        z = y + y
        del y, z
        return x + x

    assert peak_of(run, CPU) == 2 * 1000 * FLOAT
    assert peak_of(lambda: None, CPU) == 0


def test_a_storage_counts_once_and_whole():
    x, weight = torch.randn(8, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    with saved_storages([weight]) as saved:
        y = x * weight  # saves x; the weight doesn't count
        (y[:2] * y[2:4]).sum()  # both save y
        y.exp()  # saves its result
    assert sorted(saved.values()) == [64 * FLOAT] * 3


def test_saved_bytes_are_those_alive_after_the_forward():
    """By the allocator: everything left after the forward is saved, except the logits, the loss, and the number by
    which each of the two attentions scales."""
    model, (images, labels) = SMALL.network(CPU).model, SMALL.data(CPU)
    left = []

    def forward():
        with saved_storages([*model.parameters(), images, labels]) as saved:
            logits = model(images)
            loss = torch.nn.functional.cross_entropy(logits, labels)
        left.append((sum(saved.values()), logits.nbytes + loss.nbytes + 2 * DOUBLE))
        torch.zeros(10**8, dtype=torch.uint8)  # the peak is here
        return loss

    peak = peak_of(forward, CPU)
    (saved, others), allocated = left[0], peak - 10**8
    assert saved + others == allocated


def test_ours_keep_less_and_need_less():
    plain, exact, branch = uses(Plain), uses(Exact), uses(BranchFrozen)
    assert plain[0] == plain[1]
    assert exact[0] == branch[0], "the drop iteration is the same"
    assert branch[1].saved < exact[1].saved < plain[1].saved
    assert branch[1].peak < exact[1].peak < plain[1].peak
    assert exact[0].saved < plain[0].saved
    assert exact[0].peak < plain[0].peak
    assert uses(Naive)[0].saved >= plain[0].saved, "masked branches are still saved"


def test_the_prefix_before_the_first_that_learns_keeps_nothing():
    second, last = (uses(Exact, kept)[1].saved for kept in ([True, False, True, True], [True, True, True, False]))
    assert last < second, "paths 1 and 3 are alike; after path 1 frozen ones pass a gradient"


def test_hooks_change_no_peak():
    trainer, plan = SMALL.trainer(Exact, "block", CPU), plan_of(RUNS_SOME)
    trainer.train(plan)
    pair, peaks = trainer.pair(plan), []

    def iteration():
        next(pair)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    peaks = [peak_of(iteration, CPU) for _ in range(2)]
    next(pair, None)
    assert peaks == [use.peak for use in uses_of(trainer, plan, CPU)]


@pytest.mark.parametrize(
    ("model", "mode"), [pytest.param("vit", "sample", marks=pytest.mark.slow), ("resnet", "block")]
)
def test_the_same_twice(model, mode):
    case = MemoryCase(TINY[model], mode, 0.5, {"model": model})
    sessions = [MemorySession(Device.of("cpu"), 2) for _ in range(2)]
    for session in sessions:
        session.measure(case)
    assert sessions[0].rows == sessions[1].rows
    of = {(row["provider"], row["iteration"]): row for row in sessions[0].rows}
    assert len(of) == 2 + 2 * (len(TRAINERS) - 2)
    assert of["plain", "step"]["saved_ratio"] == of["plain", "step"]["peak_max_ratio"] == 1
    for name in ("saved", "peak"):
        drop, exact, branch = (
            of[key][f"{name}_ratio"]
            for key in (("ours exact", "drop"), ("ours exact", "reuse"), ("ours branch-frozen", "reuse"))
        )
        assert drop < 1
        assert branch < exact < 1
        assert all(row[f"{name}_mean_bytes"] <= row[f"{name}_max_bytes"] for row in of.values())


def test_prints_and_writes_the_same_rows(tmp_path, capsys):
    paths = [tmp_path / "memory.csv", tmp_path / "memory.json"]
    options = ["--tiny", "--turns", 1, "--model", "resnet", "--csv", paths[0], "--json", paths[1]]
    assert run_command(memory, *options) == 0
    rows = json.loads(paths[1].read_text())
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert as_text == list(csv.DictReader(paths[0].read_text().splitlines()))
    assert len(rows) == 2 * 8
    for row in rows:
        refused = row["mode"] == "sample" and row["provider"] not in ("plain", "drop-path")
        assert (row["plans"] == 0) == refused == ("BatchNorm" in row["unavailable"]) == (row["saved_ratio"] is None)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "resnet block p=0.5" in printed
    assert "resnet sample: no naive, ours exact, ours branch-frozen: path 'paths.0'" in printed
    cells = [[cell.strip() for cell in line.split("│")[1:4]] for line in printed.splitlines() if line.startswith("│")]
    first = rows[0]
    assert [first["provider"], first["iteration"], f"{first['saved_mean_bytes'] / 1e6:,.1f}"] in cells


def test_in_bf16_it_keeps_less_and_rows_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "TRAINERS", (Plain,))
    rows = {}
    for dtype in ("float32", "bf16"):
        out = tmp_path / f"{dtype}.json"
        options = ["--tiny", "--turns", 1, "--model", "vit", "--mode", "block", "--dtype", dtype, "--json", out]
        assert run_command(memory, *options) == 0
        rows[dtype] = json.loads(out.read_text())
    (wide,), (narrow,) = rows["float32"], rows["bf16"]
    assert (wide["dtype"], narrow["dtype"]) == ("float32", "bf16 autocast")
    assert narrow["saved_mean_bytes"] < wide["saved_mean_bytes"]


def test_a_refusal_of_the_scheme_is_found_on_a_small_network(monkeypatch):
    """Building and converting a whole ViT-B to find out takes one core 17 seconds."""
    asked = []
    monkeypatch.setattr(memory, "scheme_refusal", lambda config, mode: asked.append((config, mode)))
    MemorySession(Device.of("cpu"), 1).measure(MemoryCase(SMALL, "block", 0.5, {"model": "vit"}))
    assert asked == [(VERIFIED["vit"], "block")]


def test_an_interrupt_keeps_the_plans_that_are_complete(monkeypatch, tmp_path):
    right, counted = memory.uses_of, []

    def stopped(*args):
        counted.append(args)
        if len(counted) == len(TRAINERS) + 3:  # in the second plan
            raise KeyboardInterrupt
        return right(*args)

    monkeypatch.setattr(memory, "uses_of", stopped)
    out = tmp_path / "memory.json"
    options = ["--tiny", "--turns", 9, "--model", "vit", "--mode", "block", "--json", out]
    assert run_command(memory, *options) == 130
    assert {row["provider"]: row["plans"] for row in json.loads(out.read_text())} == {
        "plain": 1, "naive": 1, "drop-path": 1, "ours exact": 2, "ours branch-frozen": 2
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert run_command(memory, "--device", "cuda") == 2
    assert "--device cuda: this machine, or this torch, has no cuda device" in capsys.readouterr().err


def test_on_a_gpu_the_allocator_is_asked(monkeypatch):
    happened = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: happened.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: happened.append("before") or 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: happened.append("after") or 350)
    assert peak_of(lambda: happened.append("run"), torch.device("cuda")) == 250
    assert happened == ["reset", "before", "run", "after"]
