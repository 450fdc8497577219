"""`python -m benchmarks ops`: its output, ratios and goals, and times of the device alone."""

import contextlib
import csv
import json

import pytest
import torch

from benchmarks import op_cases, op_providers, ops, replay
from benchmarks.__main__ import main
from benchmarks.harness import Capture, Check, Provider
from benchmarks.machine import Device
from benchmarks.op_cases import OPS
from benchmarks.op_goals import Goal, cpu_goals, goals
from tests.conftest import DEVICE

GPU = Device(torch.device("cuda"), "a GPU", cache_bytes=1)


@pytest.fixture(autouse=True)
def _quickly(monkeypatch):
    monkeypatch.setattr(op_providers, "COMPILER", "eager")
    monkeypatch.setattr(Device, "copy_rate", lambda self: 10e9)


# The command


def test_prints_and_writes_the_same_rows(tmp_path, capsys):
    paths = [tmp_path / "ops.csv", tmp_path / "ops.json"]
    assert main(["ops", "--tiny", "--csv", str(paths[0]), "--json", str(paths[1])]) == 0
    rows = json.loads(paths[1].read_text())
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert as_text == list(csv.DictReader(paths[0].read_text().splitlines()))
    assert {row["op"] for row in rows} == set(OPS)
    others = 2 * 2 + 4 + 1 + 2  # timm and torchvision in two dense settings, xFormers, flash-attn; with Liger
    assert len(rows) == 3 * (11 * 5 + others)
    assert not any("flop" in key for key in rows[0])
    for row in rows:
        if row["unavailable"]:
            assert row["p50_ms"] is row["gbs"] is row["to_eager"] is None
        else:
            rate = row["needed_gb"] / row["p50_ms"] * 1e3
            assert (row["gbs"] or 0) == pytest.approx(rate, rel=1e-4)
            assert (row["copy_share"] or 0) == pytest.approx(rate / 10, rel=1e-4)
            assert (row["turns"], row["device_ms"]) == (3, None)
    eager = [row for row in rows if row["provider"] == "eager"]
    assert all(row["to_eager"] == 1 and row["bytes_ratio"] != 0 for row in eager)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "residual_add relu 4x8x3x5 NCHW float32, 2 of 4, γ" in printed
    assert "residual_add 6x5x32 float32, no mask" in printed
    assert "device ms" not in printed
    assert "no xformers in 12 cases: xformers is not installed" in printed.replace("\n", " ")


def test_measures_the_requested_settings(tmp_path):
    out = tmp_path / "ops.json"
    options = ["--op", "gather_rows", "path", "--pass", "backward", "--turns", "2", "--json", str(out)]
    assert main(["ops", "--tiny", *options]) == 0
    rows = json.loads(out.read_text())
    assert {(row["op"], row["pass"]) for row in rows} == {("gather_rows", "backward"), ("path", "backward")}
    assert {row["turns"] for row in rows if not row["unavailable"]} == {2}


def test_without_compiled_nothing_is_compiled(monkeypatch, tmp_path):
    """Compiling takes longest and is left out where time is short."""
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("it was compiled"))
    out = tmp_path / "ops.json"
    options = ["--op", "gather_rows", "--pass", "forward", "--turns", "1", "--no-compiled", "--json", str(out)]
    assert main(["ops", "--tiny", *options]) == 0
    assert not [row["provider"] for row in json.loads(out.read_text()) if "compile" in row["provider"]]


@pytest.mark.parametrize(("option", "value"), [("--op", "gather"), ("--pass", "sideways"), ("--turns", "0")])
def test_refuses_invalid_options(option, value, capsys):
    with pytest.raises(SystemExit):
        main(["ops", option, value])
    assert f"argument {option}: " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
@pytest.mark.parametrize("command", ["ops", "step"])
def test_without_a_gpu_it_says_so(command, capsys):
    assert main([command, "--device", "cuda"]) == 2
    assert "--device cuda: this machine, or this torch, has no cuda device" in capsys.readouterr().err


def test_a_wrong_provider_is_not_timed_and_others_are(monkeypatch, tmp_path, capsys):
    right = OPS["gather_rows"].ours
    monkeypatch.setattr(OPS["gather_rows"], "ours", lambda self, x: (2 * right(self, x)[0],))
    out = tmp_path / "ops.json"
    options = ["--op", "gather_rows", "path", "--pass", "forward", "--json", str(out)]
    assert main(["ops", "--tiny", *options]) == 1
    assert "not timed: op gather_rows" in capsys.readouterr().err
    assert {row["op"] for row in json.loads(out.read_text())} == {"path"}


def test_an_exception_loses_nothing_that_was_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(OPS["path"], "inputs", lambda self, number: 1 / 0)
    out = tmp_path / "ops.json"
    assert main(["ops", "--tiny", "--op", "gather_rows", "path", "--pass", "forward", "--json", str(out)]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    assert {row["op"] for row in json.loads(out.read_text())} == {"gather_rows"}


# Rows


def row_of(provider, device_ms, op="residual_add", direction="forward", needed_gb=0.1, moved_gb=None, **more):
    row = {"op": op, "shape": "8x4", "layout": "..C", "dtype": "float32", "kept": 4, "gamma": True, "pass": direction}
    row |= {"provider": provider, "device_ms": device_ms, "needed_gb": needed_gb, "moved_gb": moved_gb}
    return row | {"ceiling_gbs": 1000.0, "unavailable": "", "p50_ms": 1.0, "ratio_rounds": 1.0} | more


def test_ratios_are_those_of_a_hand_computation():
    eager = row_of("eager", None, moved_gb=0.25, p50_ms=5.0, ratio_rounds=1.0)
    compiled = row_of("torch.compile", 0.25, moved_gb=0.15, p50_ms=3.0, ratio_rounds=0.75)
    ours = row_of("ours triton", 0.2, p50_ms=2.0, ratio_rounds=0.5, needed_gflop=1.0)
    of_eager, of_compiled, of_ours = ops.compared([eager, compiled, ours])
    assert of_eager["gbs"] == pytest.approx(0.1 / 5e-3), "of the turns where there is no device time"
    assert of_compiled["gbs"] == pytest.approx(0.1 / 0.25e-3)
    assert [of_ours["to_eager"], of_ours["to_compiled"]] == pytest.approx([0.5, 0.8])
    assert [of_eager["to_compiled"], of_compiled["to_compiled"]] == pytest.approx([1 / 0.75, 1])
    assert of_ours["copy_share"] == pytest.approx(0.5)
    assert [of_eager["bytes_ratio"], of_compiled["bytes_ratio"]] == pytest.approx([2.5, 1.5])
    assert of_ours["bytes_ratio"] is None
    assert of_ours["no_device_ms"] == ""
    assert of_eager.keys() == of_ours.keys()


def test_goals():
    least = "at least 0.92 of copy bandwidth in elementwise passes over 64 MB"
    ratio, compiled = ("at least 0.92 of the ratio of bytes to " + other for other in ("eager", "the compiled formula"))
    faster = "device time at most eager's"
    where = "residual_add 8x4 float32, 4 of 8, γ: forward"
    eager, others = row_of("eager", 0.4, moved_gb=0.4), row_of("torch.compile", 0.15, moved_gb=0.15)
    # 0.1 GB in 0.1 ms is all of 1000 GB/s; 4 times as fast as eager, which moves 4 times the bytes
    assert goals([eager, others, row_of("ours triton", 0.1)]) == [
        Goal(least, where, pytest.approx(1.0), True),
        Goal(ratio, where, pytest.approx(1.0), True),
        Goal(faster, where, pytest.approx(0.25), True),
        Goal(compiled, where, pytest.approx(1.0), True),
    ]
    # 0.11 ms make 0.909 of the bandwidth, and of every ratio
    assert [goal.met for goal in goals([eager, others, row_of("ours triton", 0.11)])] == [False, False, True, False]
    assert [goal.met for goal in goals([eager, row_of("ours triton", 0.41)])] == [False, False, False]
    unknown = goals([eager, others, row_of("ours triton", None)])
    assert [(goal.measured, goal.met) for goal in unknown] == [(None, False)] * 4
    unknown = goals([row_of("eager", None, moved_gb=0.4), row_of("ours triton", 0.1)])
    assert [goal.met for goal in unknown] == [True, False, False]


def test_goals_that_are_about_other_rows():
    def of(**row):
        found = goals([row_of("eager", 1.0, **row), row_of("ours triton", 0.1, **row)])
        return [(goal.goal.partition(" in ")[0], goal.met) for goal in found]

    faster = ("device time at most eager's", True)
    assert of(needed_gb=0.06) == [faster], "small"
    assert of(direction="both") == [faster]
    assert of(needed_gb=0.0, direction="backward") == [faster], "nothing to move"
    norm = {"op": "residual_add_norm rows", "direction": "backward"}
    assert of(**norm, needed_gb=0.0801) == [("at least 0.80 of copy bandwidth", True), faster]
    assert of(**norm, needed_gb=0.0799) == [("at least 0.80 of copy bandwidth", False), faster]
    assert of(**norm | {"direction": "forward"}) == [faster]
    assert goals([row_of("eager", 1.0), row_of("ours eager", 0.1)]) == []
    assert goals([row_of("eager", 1.0), row_of("ours triton", None) | {"unavailable": "no GPU"}]) == []


def test_verdicts_say_where_a_goal_is_missed():
    rows = [row_of("eager", 0.4), row_of("ours triton", 0.1)]
    rows += [row_of("eager", 0.4, direction="backward"), row_of("ours triton", 0.5, direction="backward")]
    rows += [row_of("eager", 0.4, direction="both"), row_of("ours triton", None, direction="both")]
    lines = list(ops.verdicts_of(goals(rows)))
    assert lines == [
        "at least 0.92 of copy bandwidth in elementwise passes over 64 MB: MISSED, 1 of 2",
        "  0.20  residual_add 8x4 float32, 4 of 8, γ: backward",
        "device time at most eager's: MISSED, 1 of 3",
        "  1.25  residual_add 8x4 float32, 4 of 8, γ: backward",
        "  not measured  residual_add 8x4 float32, 4 of 8, γ: both",
    ]


def cpu_row(provider, direction, min_ms, kept=16, dtype="float32"):
    return row_of(provider, None, direction=direction) | {
        "shape": "32x8x4", "kept": kept, "gamma": True, "min_ms": min_ms, "dtype": dtype,
    }  # fmt: skip


def test_goals_on_cpus():
    rows = [
        cpu_row("eager", "forward", 2.5),
        cpu_row("torch.compile", "forward", 1.19),
        cpu_row("ours native", "forward", 1.0),
    ]
    rows += [cpu_row("eager", "both", 1.9), cpu_row("ours native", "both", 1.0)]
    rows += [cpu_row("eager", "forward", 2.1, 26), cpu_row("ours native", "forward", 1.0, 26)]
    rows += [cpu_row("torch.compile", "forward", 0.96, 32), cpu_row("ours native", "forward", 1.0, 32)]
    rows += [cpu_row("ours native", "forward", 1.1, 26, "bfloat16")]
    assert [(goal.measured, goal.met) for goal in cpu_goals(rows)] == [
        (2.5, True), (1.19, False), (1.9, False), (2.1, False), (0.96, True), (pytest.approx(1 / 1.1), False),
    ]  # fmt: skip
    assert cpu_goals([row | {"op": "gather_rows"} for row in rows]) == []
    assert cpu_goals([row | {"shape": "32x8"} for row in rows]) == [], "no tokens"
    lines = list(ops.verdicts_of(cpu_goals(rows)))
    assert "at least 1.00 times as fast in bfloat16 as in float32: MISSED, 0 of 1" in lines
    assert "  0.91  residual_add 32x8x4 bfloat16, 26 of 32, γ: forward" in lines


# Times of the device alone


class FakeGraph:
    """Captures by running, and replays by running again into the same results."""

    def __init__(self, monkeypatch, lazy=False):
        self.replays, self.keep, self.lazy = 0, [], lazy
        monkeypatch.setattr(replay, "captured", self.captured)
        monkeypatch.setattr(Device, "milliseconds", self.milliseconds)

    def captured(self, runs, keep):
        self.keep.append(keep)
        results = [run() for run in runs]

        def again():
            self.replays += 1
            for run, outs in zip(runs, results, strict=True):
                for out, new in zip(outs, run(), strict=True):
                    if not self.lazy:
                        out.detach().copy_(new.detach())

        return again, results[-keep:]

    def milliseconds(self, run):
        run()
        return 48.0 * self.replays


def provider_with(runs, check=lambda results: Check(0.0, 1.0), kept=()):
    return Provider("ours", lambda turn: None, lambda: Check(0.0, 1.0), capture=Capture(runs, check, kept))


def test_device_time_is_that_of_a_turn(monkeypatch):
    graph = FakeGraph(monkeypatch)
    x, checked = torch.ones(3), []

    def check(results):
        checked.append([t.tolist() for t in results])
        return Check(0.0, 1.0)

    provider = provider_with([lambda: (x, x * 2), lambda: (x, x * 3)], check, kept=[x])
    assert replay.device_time(GPU, provider, repeats=3) == {"device_ms": 48 * 3 / 24, "no_device_ms": ""}
    # the mean of replays 2, 3 and 4, after the first was checked
    assert checked == [[[1, 1, 1], [2, 2, 2]]], "the input wasn't overwritten, the first run's results were written"
    assert graph.replays == 1 + 3
    assert graph.keep == [4], "results of the last two sweeps over the inputs are kept"


@pytest.mark.parametrize("setting", op_cases.TINY, ids=lambda setting: f"{setting.op} {setting.shape}")
def test_every_provider_can_be_replayed_and_checked(setting, monkeypatch):
    """Results are overwritten and written again; results that are inputs or gradients stay."""
    graph = FakeGraph(monkeypatch)
    monkeypatch.setattr(replay, "MIN_RUNS", 1)
    for case in op_cases.op_cases(setting, Device(torch.device(DEVICE), "a device", 1), interpreted=True):
        case.verify()
        for provider in case.available:
            kept = [t.clone() for t in provider.capture.kept]
            time = replay.device_time(GPU, provider, repeats=1)
            assert time["no_device_ms"] == "", (provider.name, case)
            assert all(torch.equal(a, b) for a, b in zip(kept, provider.capture.kept, strict=True))
    assert graph.replays > 2 * 3 * 3


def test_a_replay_that_writes_nothing_has_no_time(monkeypatch):
    FakeGraph(monkeypatch, lazy=True)
    provider = provider_with([lambda: (torch.ones(2),)], lambda results: Check(results[0].sum().item(), 1.0))
    assert replay.device_time(GPU, provider, repeats=3) == {
        "device_ms": None,
        "no_device_ms": "RuntimeError: its replay differs from the float64 reference by nan",
    }


def test_a_provider_that_cannot_be_captured_says_why(monkeypatch):
    class Graph:
        def replay(self):
            raise AssertionError

    @contextlib.contextmanager
    def capturing(graph, stream):
        assert stream == "a stream"
        try:
            yield
        finally:
            raise RuntimeError("ending the capture fails too")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "a stream")

    def synchronises():
        raise RuntimeError("operation not permitted when stream is capturing")

    time = replay.device_time(GPU, provider_with([synchronises]), repeats=3)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert time == {"device_ms": None, "no_device_ms": reason}
    notes = list(ops.notes_of([row_of("ours triton", None) | time]))
    assert notes[-1] == f"– no device time of ours triton in 1 cases: {reason}"


def test_capture_keeps_the_last_results(monkeypatch):
    class Graph:
        replay = "replay"

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    runs = [lambda n=n: (n,) for n in range(6)]
    assert replay.captured(runs, keep=4) == ("replay", [(2,), (3,), (4,), (5,)])


def test_on_the_cpu_there_is_no_device_time():
    provider = provider_with([lambda: pytest.fail("it was run")])
    nothing = {"device_ms": None, "no_device_ms": ""}
    assert replay.device_time(Device(torch.device("cpu"), "a CPU", 1), provider, 3) == nothing


@pytest.mark.gpu
def test_every_tiny_case_of_ours_has_a_device_time(tmp_path):
    out = tmp_path / "ops.json"
    assert main(["ops", "--tiny", "--device", "cuda", "--json", str(out)]) == 0
    ours = [row for row in json.loads(out.read_text()) if row["provider"] == "ours triton"]
    assert len(ours) == 3 * len(op_cases.TINY)
    assert [row["no_device_ms"] for row in ours if row["needed_gb"]] == [""] * (len(ours) - 1)
