"""`python -m benchmarks scaling`, and its question: a scheme's work grows linearly with the number of paths. Function
calls show that exactly."""

import csv
import json
import math
import subprocess
import sys

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from benchmarks import scaling, tiny_paths
from benchmarks.cases import CPU, MODES
from benchmarks.scaling import SMALL
from benchmarks.tiny_paths import BY_HAND, OURS, PLAIN, PLAN, ByHand, Tiny, Ways, count_calls, path_case
from examples.methods import nothing_runs
from rdp_kernels import available_backends
from rdp_kernels.scheme.notices import LOOKS_AT_GRADIENTS
from tests.benchmarks.commands import run_command
from tests.benchmarks.test_command import ONE_THREAD

WAYS = (PLAIN, BY_HAND, PLAN, OURS)


# Linear


class Blocks(nn.Module):
    """Each path has a shortcut and a layer of the rest after it, in a block of its own."""

    def __init__(self, count):
        super().__init__()
        shortcut = lambda: nn.Linear(tiny_paths.WIDTH, tiny_paths.WIDTH)  # noqa: E731
        blocks = (nn.Sequential(rdp.ResidualBranch(Tiny(), shortcut=shortcut()), shortcut()) for _ in range(count))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(x)


def calls_of(build, mode, count):
    """Calls to make a scheme, for a pair of iterations, for a drawn plan while no path runs, and for the state."""
    model, x = build(count), torch.randn(4, tiny_paths.WIDTH)
    keep = torch.tensor([True, False] * (count // 2)) if mode == "block" else torch.tensor([[True, False] * 2] * count)
    plan = rdp.PathPlan(keep, [0.5] * count, mode)
    schemes = []
    made = count_calls(lambda: schemes.append(rdp.ResidualDropPath(model, 0.5, mode=mode, sampling="fixed")))
    (scheme,) = schemes

    def pair():
        for _ in scheme.iterations(plan=plan):
            model(x).sum().backward()

    def alone():
        for _ in scheme.iterations(4):
            scheme.learning_parameters()

    def state():
        scheme.load_state_dict(scheme.state_dict())

    pair()
    with nothing_runs():
        alone()
    return made, *(count_calls(run) for run in (pair, alone, state))


def assert_linear(build, mode, counts):
    """The same number of calls for each further path."""
    calls_of(build, mode, 4)  # some work is done once
    calls = torch.tensor([calls_of(build, mode, count) for count in counts], dtype=torch.float64)
    each = calls.diff(dim=0) / torch.tensor(counts, dtype=torch.float64).diff()[:, None]
    assert ((each - each[0]) * counts[0]).abs().max() <= 2, f"calls a path: {each.tolist()}"


@pytest.mark.parametrize("build", [tiny_paths.tiny_paths, Blocks])
@pytest.mark.parametrize("mode", MODES)
def test_function_calls_grow_linearly_with_the_paths(mode, build):
    assert_linear(build, mode, (20, 40, 80))


MOST_CALLS = {"block": 102, "sample": 320}
"""Function calls that one more path adds to a pair of iterations, as measured on Python 3.11. Later versions make
fewer."""


@pytest.mark.skipif(available_backends()["native"] is not None, reason="about the way through the compiled library")
@pytest.mark.parametrize("mode", MODES)
def test_a_path_makes_no_more_function_calls_than_before(mode):
    def calls(count):
        ways = Ways(mode, count, 1, CPU)
        run = lambda: [None for _ in ways.ours(ways.plans[0])]  # noqa: E731
        for _ in range(LOOKS_AT_GRADIENTS):  # the first iterations do more
            run()
        return count_calls(run)

    assert (calls(60) - calls(20)) / 40 <= MOST_CALLS[mode]


@pytest.mark.slow
@pytest.mark.parametrize("build", [tiny_paths.tiny_paths, Blocks])
@pytest.mark.parametrize("mode", MODES)
def test_function_calls_grow_linearly_up_to_a_thousand_paths(mode, build):
    """Budget: 30 seconds."""
    assert_linear(build, mode, (50, 100, 200, 1000))


def test_calls_are_counted():
    assert count_calls(lambda: None) == 2, "itself, and the end of counting"
    assert count_calls(lambda: [len("a") for _ in range(5)]) >= 2 + 5


# The providers


@pytest.mark.parametrize("mode", MODES)
def test_every_way_is_right(mode):
    ways = Ways(mode, 6, 1, CPU, torch.float64)
    for name in WAYS:
        assert ways.verify(name).passed, name
    assert path_case(mode, 6, 1, "cpu").verify().passed


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [PLAIN, BY_HAND, OURS])
def test_a_wrong_way_is_caught(mode, name, monkeypatch):
    right = rdp.ResidualSequence.forward if name != BY_HAND else Tiny.constant
    if name == BY_HAND:
        monkeypatch.setattr(Tiny, "constant", lambda self, x: 1.001 * right(self, x))
    else:
        monkeypatch.setattr(rdp.ResidualSequence, "forward", lambda self, x: 1.001 * right(self, x))
    assert Ways(mode, 6, 1, CPU, torch.float64).verify(name).error > 1e-6


def test_by_hand_follows_the_plan():
    """With paths kept, dropped, kept, only the second learns in the reuse iteration."""
    paths, x = tiny_paths.tiny_paths(3), torch.randn(4, tiny_paths.WIDTH)
    plan = rdp.PathPlan(torch.tensor([True, False, True]), [tiny_paths.DROP_PROB] * 3, "block")
    learned = []
    for _ in ByHand.of(paths, x, plan).pair():
        learned.append([path.fn.weight.grad is not None for path in paths])
        paths.zero_grad(set_to_none=True)
    assert learned == [[True, False, True], [False, True, False]]


def test_a_turn_leaves_no_gradient_and_runs_what_it_says():
    case = path_case("sample", 4, 2, "cpu")
    counted = {}
    for provider in case.providers:
        provider.run(0)
        counted[provider.name] = [tiny_paths.calls_of(provider)["calls"] for _ in range(2)]
    assert all(first == second for first, second in counted.values()), "the same in every run"
    assert counted[PLAN] < counted[OURS]


# Reports


def row_of(network, provider, mode, paths, ms, batch=10):
    labels = {"network": network, "depth": paths // 2, "width": 2, "batch": batch, "paths": paths, "mode": mode}
    return labels | {"provider": provider, "min_ms": ms, "p50_ms": 9 * ms, "unavailable": "", "calls": 5 * paths}


def tiny_rows(mode, paths, plain, by_hand, ours):
    times = {PLAIN: plain, BY_HAND: by_hand, PLAN: 1.0, OURS: ours}
    return [row_of("tiny", name, mode, paths, ms) for name, ms in times.items()]


def test_overhead_is_beyond_the_faster_of_plain_and_by_hand():
    rows = tiny_rows("block", 24, 5.0, 3.0, 10.0) + tiny_rows("sample", 24, 5.0, 6.0, 10.0)
    rows += [row_of(SMALL.name, PLAIN, "", 24, 1000.0, batch=32), row_of("vit", PLAIN, "", 48, 1.0)]
    made = scaling.shares_of(rows)
    ours = {row["mode"]: row for row in made if row["provider"] == OURS}
    assert (ours["block"]["overhead_ms"], ours["sample"]["overhead_ms"]) == (7.0, 5.0)
    assert ours["sample"]["overhead_us_per_path"] == pytest.approx(5000 / 24)
    steps = [(row["network"], row["mode"], row["share"]) for row in made if row["network"] != "tiny"]
    assert steps == [(SMALL.name, "block", 0.007), (SMALL.name, "sample", 0.005)], "48 paths were not measured"
    assert all(
        row["overhead_ms"] is None for row in made if row["provider"] in (PLAIN, PLAN) and row["network"] == "tiny"
    )


@pytest.mark.parametrize(
    ("step", "growth", "verdicts"), [(700.0, 1.5, ("met", "met")), (690.0, 1.51, ("MISSED", "MISSED"))]
)
def test_verdicts(step, growth, verdicts):
    rows = [row for paths, ms in ((24, 12.0), (100, 10.0 + 5.0), (1000, 10.0 * 5.0 * growth + 5.0)) for row in
            tiny_rows("block", paths, 5.0, 6.0, ms + 0.0)]  # fmt: skip
    rows = [row for row in rows if row["paths"] != 1000] + tiny_rows("block", 1000, 0.0, 1.0, 100.0 * growth)
    rows.append(row_of(SMALL.name, PLAIN, "", 24, step, batch=32))
    first, second = scaling.verdicts_of(scaling.shares_of(rows))
    assert first == f"{SMALL.name}, batch 32, block mode: {7 / step:.2%} of a step, target 1%: {verdicts[0]}"
    assert second == f"a path among 1,000, block mode: {growth:.2f} of one among 100, target 1.5: {verdicts[1]}"


def test_prints_and_writes_the_same_rows(tmp_path, capsys):
    paths = [tmp_path / "scaling.csv", tmp_path / "scaling.json"]
    assert run_command(scaling, "--tiny", "--turns", 1, "--csv", paths[0], "--json", paths[1]) == 0
    rows = json.loads(paths[1].read_text())
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert as_text == list(csv.DictReader(paths[0].read_text().splitlines()))
    assert [row["provider"] for row in rows] == [*WAYS] * 4 + [PLAIN] * 2
    assert {row["threads"] for row in rows} == {1}
    for row in rows:
        if row["network"] == "tiny":
            assert row["calls"] > 0
            assert (row["overhead_ms"] is None) == (row["provider"] != OURS)
        else:
            assert row["share"] == pytest.approx(row["overhead_ms"] / row["min_ms"], rel=1e-4)
            assert not math.isnan(row["share"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "target" not in printed, "so few paths are no verdict"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert run_command(scaling, "--device", "cuda") == 2
    assert "--device cuda: this machine, or this torch, has no cuda device" in capsys.readouterr().err


@pytest.mark.slow
def test_under_pytest_benchmark(tmp_path):
    """Budget: 30 seconds. Every provider of every tiny case of scaling and overhead is a benchmark, with a group per
    case."""
    out = tmp_path / "benchmarks.json"
    files = ["benchmarks/test_scaling.py", "benchmarks/test_overhead.py"]
    options = ["--benchmark-only", f"--benchmark-json={out}"]
    subprocess.run([sys.executable, "-m", "pytest", *files, *options], check=True, env=ONE_THREAD)
    benchmarks = json.loads(out.read_text())["benchmarks"]
    of = {file: [b for b in benchmarks if file in b["fullname"]] for file in files}
    assert len(of[files[0]]) == 4 * len(WAYS)
    assert all(
        {"commit", "device", "paths", "mode", "calls", "provider"} <= b["extra_info"].keys() for b in of[files[0]]
    )
    assert len({b["group"] for b in of[files[0]]}) == 4
    assert all({"commit", "device", "op", "pass", "launches"} <= b["extra_info"].keys() for b in of[files[1]])
    assert len({b["group"] for b in of[files[1]]}) == 5 * 2 * 3
