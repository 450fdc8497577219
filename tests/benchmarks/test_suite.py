"""`python -m benchmarks all`: it runs every command, continues after a failed one, and its table agrees with the
rows."""

import argparse
import csv
import json
from types import SimpleNamespace

import pytest

from benchmarks import findings, suite
from benchmarks.__main__ import main

MACHINE = {"device": "a CPU", "threads": 2, "torch": "2.13", "commit": "abc"}


def stand_in(name, rows, code=0):
    """A command that writes `rows` and ends with `code`."""

    def run(options):
        asked.append((name, options.device, options.size))
        if rows:
            options.json.write_text(json.dumps(rows))
            with options.csv.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        return code

    def add_command(commands):
        parser = commands.add_parser(name)
        suite.command.add_options(parser, "turns", "quick", "tiny")
        parser.set_defaults(run=run)

    asked: list[tuple] = []
    return SimpleNamespace(add_command=add_command, asked=asked)


def told(capsys):
    """The last cell of each printed line, joined."""
    lines = capsys.readouterr().out.splitlines()
    return " ".join(" ".join(line.strip("│").split("│")[-1].split()) for line in lines)


def step_row(provider, ratio, needed, mode="block", p=0.5):
    row = {"model": "vit", "mode": mode, "p": p, "provider": provider, "ratio_rounds": ratio}
    return MACHINE | row | {"needed_ratio": needed}


STEP_ROWS = [
    step_row("plain", 1.0, 1.0),
    step_row("naive", 2.0, 0.6),
    step_row("ours exact", 0.75, 0.6),
    step_row("ours exact", 0.5, 0.4, p=0.7),
    step_row("plain", 1.0, 1.0, mode="sample"),
    step_row("ours exact", None, None, mode="sample"),
]


def op_row(provider, ratio, direction="forward", unavailable="", device_ms=None, shape="2x3"):
    labels = {"op": "residual_add", "shape": shape, "layout": "..C", "dtype": "float32", "kept": 1, "gamma": False}
    times = {"ratio_rounds": ratio, "device_ms": device_ms, "unavailable": unavailable}
    return MACHINE | labels | {"pass": direction, "provider": provider} | times


def test_runs_every_command_and_keeps_their_files(monkeypatch, tmp_path, capsys):
    commands = {"step": stand_in("step", STEP_ROWS), "ops": stand_in("ops", [], code=1), "new": stand_in("new", [])}
    monkeypatch.setattr(suite, "MEASURING", commands)
    (tmp_path / "ops-cpu.json").write_text("of an earlier run")
    assert main(["all", "--tiny", "--out", str(tmp_path)]) == 1, "the highest code"
    assert [command.asked for command in commands.values()] == [[(name, "cpu", "tiny")] for name in commands]
    assert {file.name for file in tmp_path.iterdir()} == {"step-cpu.csv", "step-cpu.json"}
    printed = told(capsys)
    assert "block: 0.50 to 0.75, needed FLOPs 0.40 to 0.60" in printed
    assert printed.count("nothing was measured") == 2
    assert "a CPU, 2 threads, torch 2.13, abc" in printed


def test_the_device_is_every_commands(monkeypatch, tmp_path):
    commands = {"step": stand_in("step", STEP_ROWS), "ops": stand_in("ops", [])}
    monkeypatch.setattr(suite, "MEASURING", commands)
    monkeypatch.setattr(suite.command, "has_device", lambda kind: True)
    assert main(["all", "--device", "cuda", "--out", str(tmp_path)]) == 0
    assert [command.asked for command in commands.values()] == [[(name, "cuda", "full")] for name in commands]
    assert {file.name for file in tmp_path.iterdir()} == {"step-cuda.csv", "step-cuda.json"}


def test_an_interrupt_ends_it(monkeypatch, capsys):
    commands = {"step": stand_in("step", STEP_ROWS, code=130), "ops": stand_in("ops", [])}
    monkeypatch.setattr(suite, "MEASURING", commands)
    assert main(["all"]) == 130
    assert not commands["ops"].asked
    assert "needed FLOPs 0.40 to 0.60" in told(capsys), "results so far"


def test_refuses_an_unwritable_folder_and_an_unknown_device(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["all", "--out", str(tmp_path / "file")])
    assert "argument --out: must be a folder" in capsys.readouterr().err
    if not suite.command.torch.cuda.is_available():
        assert main(["all", "--device", "cuda"]) == 2


def test_every_command_that_measures_takes_the_suites_options():
    for name, module in suite.MEASURING.items():
        device = [] if name in suite.ANY_DEVICE else ["--device", "cpu"]
        options = suite.parsed([module], [name, *device, "--tiny", "--csv", "a.csv", "--json", "a.json"])
        assert isinstance(options, argparse.Namespace)
        assert set(findings.FINDINGS[name]), name


def test_pairs_against_others_by_mode():
    exact = findings.FINDINGS["step"]["the exact scheme, done naively = 1"]
    assert exact(STEP_ROWS) == "block: 0.38", "where naive was measured"
    assert findings.pair_against("ours branch-frozen")(STEP_ROWS) is None


def test_ops_against_others():
    rows = [
        op_row("eager", 1.0),
        op_row("torch.compile", 0.25),
        op_row("xformers", 0.4),
        op_row("ours native", 0.5),
        op_row("ours eager", 3.0),
        op_row("eager", 1.0, "both"),
        op_row("ours native", 0.25, "both"),
        op_row("eager", 1.0, shape="4x3"),
        op_row("ours native", 2.0, shape="4x3"),
    ]
    eager, compiled, peers, lost = findings.FINDINGS["ops"].values()
    assert eager(rows) == "forward: 1.25 × as fast (0.50 to 2.00)\nboth: 4.00 × as fast (4.00)"
    assert compiled(rows) == "forward: 0.50 × as fast (0.50)"
    assert peers(rows) == "forward: 0.80 × as fast (0.80)"
    first, second, third = lost(rows).splitlines()
    assert first == "0.50 × as fast: residual_add 2x3 float32, 1 of 2, forward, torch.compile"
    assert "4x3" in second
    assert "xformers" in third
    assert lost([op_row("eager", 1.0), op_row("ours native", 0.9)]) == "nowhere in these settings"


def test_ops_on_a_gpu_are_compared_by_times_of_the_device_and_with_the_kernels_that_serve_there():
    rows = [op_row("eager", 1.0, device_ms=0.4), op_row("ours triton", 5.0, device_ms=0.1), op_row("ours native", 0.1)]
    assert findings.FINDINGS["ops"]["our ops against eager torch"](rows) == "forward: 4.00 × as fast (4.00)"
    rows[1]["unavailable"] = "no GPU"
    assert findings.FINDINGS["ops"]["our ops against eager torch"](rows) == "forward: 10.00 × as fast (10.00)"


def test_memory_and_traffic():
    rows = [
        {"mode": "block", "provider": "ours exact", "iteration": "reuse", "saved_ratio": ratio, "peak_ratio": 1.0}
        for ratio in (0.5, 0.25, None)
    ]
    assert findings.kept_bytes("ours exact", "reuse")(rows) == "block: saved 0.25 to 0.50, peak 1.00"
    assert findings.kept_bytes("ours exact", "drop")(rows) is None
    rows = [{"pass": "forward", "provider": "eager", "bytes_ratio": ratio} for ratio in (1.0, 2.5, None)]
    assert findings.moved_bytes("eager")(rows) == "forward: 1.00 to 2.50, no more than needed in 1 of 2"
    assert findings.moved_bytes("ours triton")(rows) is None


def test_scaling():
    tiny = {"network": "tiny", "batch": 10, "share": None, "mode": "block"}
    rows = [tiny | {"paths": paths, "overhead_us_per_path": 20.0 + paths} for paths in (100, 1000, 300)]
    rows += [tiny | {"paths": 5000, "overhead_us_per_path": None}]
    rows += [{"network": "vit", "batch": batch, "share": share} for batch in (4, 8) for share in (0.01, 0.02)]
    per_path, share = findings.FINDINGS["scaling"].values()
    assert per_path(rows) == "block: 510 µs, with 1,000 paths"
    assert share(rows) == "vit, batch 4: 1.00% to 2.00%\nvit, batch 8: 1.00% to 2.00%"
