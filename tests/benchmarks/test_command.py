"""`python -m benchmarks`: options refused before measuring, output and files, and exit codes."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import library_models, op_cases, step
from benchmarks.__main__ import main
from benchmarks.harness import Case, Check, Provider
from benchmarks.machine import Ceilings, Device
from benchmarks.pairs import TRAINERS


@pytest.fixture
def instant(monkeypatch):
    """Cases whose providers take a moment. Holds the requested (size, model, mode, p, turns, batch, autocast)."""
    asked = []

    def step_case(size, model, mode, drop_prob, turns, device, batch, autocast):
        asked.append((size, model, mode, drop_prob, turns, batch, autocast))
        needed = {"plain": 1e6, "naive": 0.7e6, "drop-path": 0.7e6, "ours exact": 0.7e6, "ours branch-frozen": 0.6e6}
        providers = [
            Provider.missing(trainer.name, "BatchNorm in a branch")
            if trainer.follows_scheme and (model, mode) == ("resnet", "sample")
            else Provider(
                trainer.name, lambda turn: time.sleep(1e-4), lambda: Check(0.0, 1.0), needed_flop=needed[trainer.name]
            )
            for trainer in TRAINERS
        ]
        return Case({"size": size, "model": model, "mode": mode, "p": drop_prob}, "pair of steps", "plain", providers)

    monkeypatch.setattr(step, "step_case", step_case)
    monkeypatch.setattr(Device, "ceilings", lambda self: Ceilings(1e11, 1e10))
    return asked


def test_without_a_command_it_helps(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert "step" in printed
    assert "pages" in printed


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        ("--prob", "0", "between 0.01 and 0.99"),
        ("--prob", "1.5", "between 0.01 and 0.99"),
        ("--prob", "nan", "between 0.01 and 0.99"),
        ("--prob", "half", "between 0.01 and 0.99"),
        ("--turns", "0", "an integer of at least 1"),
        ("--turns", "1.5", "an integer of at least 1"),
        ("--model", "vgg", "'vit', 'resnet'"),
        ("--mode", "row", "'block', 'sample'"),
        ("--device", "tpu", "cpu or cuda"),
        ("--csv", "missing/step.csv", "can't write missing/step.csv: No such file or directory"),
        ("--json", ".", "can't write .: is a directory"),
    ],
)
def test_refuses_invalid_options_before_it_measures(option, value, wanted, instant, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["step", option, value])
    message = capsys.readouterr().err.replace("choose from vit, resnet", "'vit', 'resnet'")
    message = message.replace("choose from block, sample", "'block', 'sample'")
    assert exit.value.code == 2
    assert f"argument {option}: " in message
    assert value in message
    assert wanted in message
    assert not instant


def test_a_path_that_is_refused_leaves_the_others_alone(instant, tmp_path):
    kept = tmp_path / "kept.csv"
    kept.write_text("precious")
    with pytest.raises(SystemExit):
        main(["step", "--csv", str(kept), "--json", str(kept / "step.json")])
    assert kept.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [kept]
    assert not instant


def test_prints_and_writes_the_same_rows(instant, tmp_path, capsys):
    paths = {name: tmp_path / f"step.{name}" for name in ("csv", "json")}
    paths["csv"].write_text("older rows")
    assert main(["step", "--turns", "2", "--csv", str(paths["csv"]), "--json", str(paths["json"])]) == 0
    assert len(instant) == 14
    assert instant[0] == ("full", "vit", "block", 0.1, 2, None, False)
    rows = json.loads(paths["json"].read_text())
    as_text = [{key: "" if value is None else str(value) for key, value in row.items()} for row in rows]
    assert as_text == list(csv.DictReader(paths["csv"].read_text().splitlines()))
    assert len(rows) == 14 * len(TRAINERS)
    assert sorted(tmp_path.iterdir()) == sorted(paths.values()), "no temporary file stays"
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "vit block p=0.3" in printed
    assert "resnet sample: no naive, ours exact, ours branch-frozen: BatchNorm in a branch" in printed.replace(
        "\n", " "
    )
    assert printed.count("target 1.08") == printed.count("target 1.15") == 3
    assert printed.count("target 0.75") == printed.count("target 0.66") == 1


def test_a_full_disk_at_the_end_loses_neither_the_table_nor_the_older_file(instant, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    kept = tmp_path / "kept.csv"
    kept.write_text("precious")
    monkeypatch.setattr("benchmarks.output.os.replace", full)
    assert main(["step", "--turns", "1", "--csv", str(kept), "--json", str(tmp_path / "step.json")]) == 1
    printed = capsys.readouterr()
    assert "vit block p=0.3" in printed.out
    assert printed.err.count("No space left on device; what was there is kept") == 2
    assert kept.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [kept]


def test_passes_its_options_on(instant):
    options = ["--model", "resnet", "--mode", "block", "--prob", "0.2", "0.4", "--batch", "7", "--turns", "3"]
    assert main(["step", "--tiny", *options]) == 0
    assert instant == [("tiny", "resnet", "block", p, 3, 7, False) for p in (0.2, 0.4)]


@pytest.mark.parametrize(("asked", "compiled"), [("eager", [False]), ("compiled", [True]), ("none", [])])
def test_drop_path_is_compiled_on_request(instant, monkeypatch, asked, compiled):
    """Compiling takes minutes on a CPU."""
    got = []

    def drop_path_case(size, model, turns, device, batch, autocast, compiled):
        got.append(compiled)
        return step.step_case(size, model, "sample", 0.4, turns, device, batch, autocast)

    monkeypatch.setattr(step, "drop_path_case", drop_path_case)
    options = ["--model", "vit-s", "--mode", "block", "--prob", "0.3", "--turns", "1"]
    assert main(["step", *options, "--drop-path", asked]) == 0
    assert got == compiled


@pytest.mark.parametrize(("time_ratio", "verdict"), [(0.75, "met"), (0.76, "MISSED")])
def test_verdicts(time_ratio, verdict):
    row = {"model": "vit", "mode": "block", "p": 0.5, "needed_ratio": 0.7, "ratio_rounds": time_ratio}
    naive = row | {"provider": "naive", "ratio_rounds": 1.0, "min_ms": 90.0}
    exact = row | {"provider": "ours exact", "min_ms": 60.0}
    above, of_naive = step.cpu_verdicts([naive, exact])
    assert (
        above == f"vit block p=0.5: ours exact takes {time_ratio / 0.7:.3f} × its needed FLOPs, target 1.08: {verdict}"
    )
    assert of_naive.startswith(f"vit block p=0.5: ours exact takes {time_ratio:.3f} (min 0.667) of naive")
    assert of_naive.endswith(verdict)


ROW = {"model": "vit-b", "mode": "block", "batch": 128, "dtype": "bf16 autocast", "work": "scheme"}


def test_verdicts_of_a_gpu():
    measured = [("ours exact", 0.1, 0.85), ("ours exact", 0.3, 0.79), ("ours exact", 0.5, 0.7)]
    measured += [("ours branch-frozen", 0.3, 0.7), ("ours branch-frozen", 0.5, 0.1), ("naive", 0.3, 0.2)]
    rows = [ROW | {"provider": name, "p": p, "ratio_rounds": ratio} for name, p, ratio in measured]
    assert list(step.gpu_verdicts(rows)) == [
        "vit-b block p=0.1: ours exact takes 0.850 of plain, target 0.84: MISSED",
        "vit-b block p=0.3: ours exact takes 0.790 of plain, target 0.79: met",
        "vit-b block p=0.5: ours exact takes 0.700 of plain, target 0.73: met",
        "vit-b block p=0.3: ours branch-frozen takes 0.700 of plain, target 0.69: MISSED",
    ]
    others = {"model": "vit-s", "mode": "sample", "batch": 64, "dtype": "float32", "ratio_rounds": None}
    assert not list(step.gpu_verdicts([rows[0] | {key: value} for key, value in others.items()]))


def test_a_provider_that_fails_its_check_is_not_timed_and_others_are(instant, tmp_path, monkeypatch, capsys):
    right = step.step_case
    wrong = Provider("plain", lambda turn: pytest.fail("it was timed"), lambda: Check(float("nan"), 1e-10))

    def step_case(size, model, *options):
        if model == "vit":
            return Case({"model": model}, "pair", "plain", [wrong])
        return right(size, model, *options)

    monkeypatch.setattr(step, "step_case", step_case)
    out = tmp_path / "step.csv"
    assert main(["step", "--turns", "1", "--model", "vit", "resnet", "--csv", str(out)]) == 1
    assert "not timed: model vit: 'plain' differs from the float64 reference by nan" in capsys.readouterr().err
    assert {row["model"] for row in csv.DictReader(out.read_text().splitlines())} == {"resnet"}
    out.unlink()
    assert main(["step", "--turns", "1", "--model", "vit", "--csv", str(out)]) == 1
    assert not out.exists()


def test_rows_are_on_disk_before_the_next_case(instant, tmp_path, monkeypatch, capsys):
    """A case that raises doesn't harm the others either."""
    right, seen, out = step.step_case, [], tmp_path / "step.csv"

    def hangs(turn):
        seen.append([row["mode"] for row in csv.DictReader(out.read_text().splitlines())] if out.exists() else [])
        raise RuntimeError("out of memory")

    def step_case(size, model, mode, *options):
        if mode == "sample":
            plain = Provider("plain", hangs, lambda: Check(0.0, 1.0))
            return Case({"model": model, "mode": mode}, "pair", "plain", [plain])
        return right(size, model, mode, *options)

    monkeypatch.setattr(step, "step_case", step_case)
    options = ["--model", "vit", "resnet", "--mode", "sample", "block", "--prob", "0.3", "--turns", "1"]
    assert main(["step", *options, "--csv", str(out)]) == 1
    assert seen == [[], ["block"] * len(TRAINERS)]
    assert capsys.readouterr().err.count("RuntimeError: out of memory") == 2
    assert [row["model"] for row in csv.DictReader(out.read_text().splitlines())] == ["vit"] * 5 + ["resnet"] * 5


def test_a_case_that_cannot_be_made_leaves_the_others_alone(instant, tmp_path, monkeypatch, capsys):
    """For example, the first network may be too large for a GPU."""
    right, out = step.step_case, tmp_path / "step.csv"

    def step_case(size, model, *options):
        if model == "vit":
            raise RuntimeError("out of memory")
        return right(size, model, *options)

    monkeypatch.setattr(step, "step_case", step_case)
    options = ["--model", "vit", "resnet", "--mode", "block", "--prob", "0.3", "--turns", "1"]
    assert main(["step", *options, "--csv", str(out)]) == 1
    assert capsys.readouterr().err.count("RuntimeError: out of memory") == 1
    assert [row["model"] for row in csv.DictReader(out.read_text().splitlines())] == ["resnet"] * len(TRAINERS)


@pytest.fixture
def _interruptible():
    """Background processes of a shell ignore the signal, and Python doesn't change that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interruptible")
def test_a_signal_prints_and_writes_the_results_so_far(instant, tmp_path, monkeypatch, capsys):
    taken = []

    def take(turn):
        taken.append(turn)
        if len(taken) == 4:  # the first call counts FLOPs, two are complete rounds
            signal.raise_signal(signal.SIGINT)
        time.sleep(1e-4)

    plain = Provider("plain", take, lambda: Check(0.0, 1.0), needed_flop=1.0)
    labels = {"model": "vit", "mode": "block", "p": 0.3}
    monkeypatch.setattr(step, "step_case", lambda *_: Case(labels, "pair", "plain", [plain]))
    out = tmp_path / "step.csv"
    assert main(["step", "--turns", "9", "--csv", str(out)]) == 130
    (row,) = csv.DictReader(out.read_text().splitlines())
    assert (row["provider"], row["turns"]) == ("plain", "2")
    assert "vit block p=0.3" in capsys.readouterr().out


# pytest-benchmark measures nothing in a worker of xdist, so that these tests run it in new processes.
ONE_THREAD = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
ONE_THREAD["OMP_NUM_THREADS"] = "1"


@pytest.mark.slow
def test_step_tiny(tmp_path):
    """Budget: 1 minute. The command verifies, counts and times; needed FLOPs are in the right order."""
    paths = [tmp_path / "step.csv", tmp_path / "step.json"]
    command = [sys.executable, "-m", "benchmarks", "step", "--tiny", "--csv", paths[0], "--json", paths[1]]
    subprocess.run(command, check=True, env=ONE_THREAD)
    rows = json.loads(paths[1].read_text())
    assert len(rows) == len(list(csv.DictReader(paths[0].read_text().splitlines()))) == 40
    for model, mode in (("vit", "block"), ("vit", "sample"), ("resnet", "block")):
        of = {row["provider"]: row for row in rows if (row["model"], row["mode"]) == (model, mode)}
        counted = {name: row["counted_ratio"] for name, row in of.items()}
        assert counted["ours branch-frozen"] < counted["ours exact"] < 0.8 < counted["naive"] == counted["plain"] == 1.0
        assert all(row["needed_ratio"] == row["counted_ratio"] for name, row in of.items() if name.startswith("ours"))
        assert all(row["min_ms"] <= row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] for row in of.values())


@pytest.mark.slow
def test_under_pytest_benchmark(tmp_path):
    """Budget: 1 minute. Every provider of every tiny case is a benchmark, or skipped for the scheme's reason."""
    out = tmp_path / "benchmarks.json"
    options = ["--benchmark-only", f"--benchmark-json={out}"]
    subprocess.run([sys.executable, "-m", "pytest", "benchmarks/test_step.py", *options], check=True, env=ONE_THREAD)
    benchmarks = json.loads(out.read_text())["benchmarks"]
    with_timm = library_models.missing() is None
    assert len(benchmarks) == 17 + 20 * with_timm
    assert len({benchmark["group"] for benchmark in benchmarks}) == 4 + 4 * with_timm
    assert all({"commit", "device", "needed_gflop", "model", "provider"} <= b["extra_info"].keys() for b in benchmarks)


@pytest.mark.slow
def test_ops_under_pytest_benchmark(tmp_path):
    """Budget: 2 minutes, mostly for compiling. Every provider of every tiny case is a benchmark, or skipped."""
    out = tmp_path / "benchmarks.json"
    options = ["--benchmark-only", f"--benchmark-json={out}"]
    environment = ONE_THREAD | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    subprocess.run([sys.executable, "-m", "pytest", "benchmarks/test_ops.py", *options], check=True, env=environment)
    benchmarks = json.loads(out.read_text())["benchmarks"]
    assert len({benchmark["group"] for benchmark in benchmarks}) == 3 * len(op_cases.TINY)
    assert all({"commit", "device", "needed_gb", "op", "provider"} <= b["extra_info"].keys() for b in benchmarks)
    providers = {b["extra_info"]["provider"] for b in benchmarks}
    assert {"eager", "torch.compile", "compiled index ops", "ours eager"} <= providers
