"""The steps of `python -m benchmarks gpu`: their commands exist, their headlines are right, and all of them run in
small."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as benchmarks_main
from benchmarks.__main__ import main
from benchmarks.gpu import answers, command, library
from benchmarks.gpu.compilations import BEFORE_DRAWN
from benchmarks.gpu.report import Outcome
from benchmarks.gpu.steps import STEPS, TESTS, Workspace
from benchmarks.machine import ROOT
from benchmarks.output import read_csv
from benchmarks.suite import parsed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_is_an_existing_command(device, tmp_path):
    """Options that are used on GPUs only are checked too."""
    workspace = Workspace(device, "h200", tmp_path, tmp_path)
    for each in STEPS:
        flag, module, *options = each.arguments(workspace)
        assert flag == "-m"
        if module == "benchmarks":
            parsed(benchmarks_main.COMMANDS, options)
        elif module == "pytest":
            tests = [option for option in options if option.startswith("tests/")]
            assert tests
            assert "-W default" in " ".join(options), "a new warning must not fail a test"
            assert all((ROOT / test).exists() for test in tests)
        else:
            assert (ROOT / f"{module.replace('.', '/')}.py").exists()


def test_at_most_eight_files(tmp_path):
    workspace = Workspace("cuda", "h200", tmp_path, tmp_path / "work")
    files = {workspace.file("gpu"), workspace.file("gpu", "log")} | {workspace.file(s.rows) for s in STEPS if s.rows}
    assert len(files) <= 8
    assert workspace.file("ops").name == "ops-h200.csv"


def test_names_of_machines():
    assert command.short_name("NVIDIA H200", False) == "h200"
    assert command.short_name("NVIDIA A100-SXM4-80GB", False) == "a100-sxm4-80gb"
    assert command.short_name("AMD EPYC 7R13 Processor", True) == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    assert main(["gpu", "--out", str(tmp_path)]) == 2
    assert "--tiny goes through every step on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "1e9", "soon"])
def test_refuses_other_minutes(minutes, capsys):
    with pytest.raises(SystemExit):
        main(["gpu", "--minutes", minutes])
    assert "must be a number of minutes" in capsys.readouterr().err


def test_a_visit_that_ran_no_test_is_no_success(tmp_path):
    """For example if all tests were skipped."""
    file = tmp_path / "tests-h200.csv"
    visit = command.Visit(Workspace("cuda", "h200", tmp_path, tmp_path), {})
    file.write_text("step,test,outcome,budget_used,message\ntable,t,skipped,,no GPU\n")
    outcome = Outcome(next(each for each in STEPS if each.rows == TESTS))
    assert visit._find(outcome, []) == (True, ["no test ran"])


def test_a_test_that_ends_its_process_counts_once():
    """It fails, and its message is the crash's."""
    rows = [{"test": t, "outcome": o, "message": m, "budget_used": ""} for t, o, m in
            (("a", "passed", ""), ("b", "failed", "off by 3"), ("b", "failed", "worker crashed"))]  # fmt: skip
    assert answers.right_of_tests(rows) == "1 of 2 right"
    assert answers.wrong_of_tests(rows) == ["b: off by 3"]


def gpu_row(provider, **columns):
    row = {"provider": provider, "unavailable": "", "op": "residual_add", "shape": "4x5x32", "dtype": "bfloat16"}
    return row | {"layout": "..C", "kept": 3, "gamma": True, "pass": "both", "ratio_rounds": None} | columns


def test_headlines():
    """From rows like those of a GPU."""
    ops = [
        gpu_row("eager", to_eager=1.0, copy_share=0.2, device_ms=2.0),
        gpu_row("ours triton", to_eager=0.5, copy_share=0.8, device_ms=1.0),
        gpu_row("torch.compile", to_eager=0.7, copy_share=0.5, device_ms=1.5),
        gpu_row("xformers", unavailable="xformers is not installed", device_ms=None),
    ]
    assert answers.op_speed(ops) == "ours triton: 0.50 (0.50 to 0.50) of eager's time, 80% of a copy"
    ops[1]["to_eager"] = 1.5
    assert answers.op_speed(ops).endswith("; worst residual_add 4x5x32 bfloat16, 3 of 4, γ: both")
    assert answers.against_compiled(ops) == "1.50 (1.50 to 1.50) times as fast as compiled"
    host = [gpu_row("eager", ratio_rounds=1.0), gpu_row("ours triton", ratio_rounds=6.0)]
    host.append(gpu_row("ours triton", ratio_rounds=9.0) | {"pass": "forward"})
    assert answers.host_time(host) == "ours triton 6.00 (6.00 to 6.00) of eager"
    steps = [
        {"work": work, "model": "vit-s", "mode": "sample", "provider": provider, "ratio_rounds": ratio}
        for work, provider, ratio in (
            ("scheme", "ours exact", 0.8),
            ("drop-path", "drop-path", 1.1),
            ("drop-path", "ours drop-path", 0.66),
        )
    ]
    assert answers.step_time(steps) == "of plain: vit-s sample 0.80; drop-path vit-s 0.60 of timm's"
    memory = {"model": "vit-s", "mode": "block", "iteration": "reuse", "provider": "ours exact", "peak_ratio": 0.7}
    assert answers.peak_memory([memory]) == "of plain: vit-s block reuse 0.70"
    for answer in (
        answers.op_speed,
        answers.against_compiled,
        answers.host_time,
        answers.step_time,
        answers.peak_memory,
    ):
        assert answer([]) == answers.NOTHING


def test_the_library_is_built_where_it_does_not_serve(monkeypatch):
    built = []
    run = lambda command, cwd, env: built.append(env["RDP_BUILD"]) or SimpleNamespace(returncode=0)  # noqa: E731
    monkeypatch.setattr(library, "subprocess", SimpleNamespace(run=run))
    for on_gpu, reason, cuda in ((False, None, False), (True, None, True), (True, None, False), (False, "gone", False)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        monkeypatch.setattr(library, "unavailable", lambda reason=reason: reason)
        monkeypatch.setattr(library, "has_cuda", lambda cuda=cuda: cuda)
        assert library.main() == 0
    assert built == ["cuda", "cpu"]


# All steps


@pytest.fixture
def bare_copy(tmp_path):
    """A copy of the tree without git and without anything built."""
    copy = tmp_path / "tree"
    ignored = shutil.ignore_patterns(".git", ".venv", "build", "report", "*.so", "__pycache__", "*.egg-info", "docs")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.mark.slow
def test_every_step_in_small_from_a_bare_copy(bare_copy, tmp_path):
    """Budget: 4 minutes, with the library built anew; without that under 3 on two idle cores."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"RDP_COMMIT": "abc1234", "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    out = tmp_path / "out"
    options = ["--tiny", "--minutes", "40", "--out", str(out)]  # time enough on a busy machine
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", *options],
        cwd=bare_copy, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read_csv(out / "gpu-cpu.csv")
    assert {row["step"]: row["verdict"] for row in rows} == {s.name: "ok" for s in STEPS if s.by_default}
    assert {row["commit"] for row in rows} == {"abc1234"}
    files = {path.name for path in out.iterdir()}
    assert len(files) <= 8
    for name in ("ops", "host", "step", "memory"):
        committed = read_csv(ROOT / "benchmarks" / "results" / f"{name}-cpu.csv")[0].keys()
        found = read_csv(out / f"{name}-cpu.csv")[0].keys()
        assert set(committed) <= set(found), "rows are as benchmarks/results keeps them"
    right = {row["step"] for row in read_csv(out / "tests-cpu.csv") if row["outcome"] == "passed"}
    assert right == {"table", "beyond", "drawn"}


@pytest.mark.slow
def test_how_many_kernels_a_visit_compiles(capfd):
    """Budget: 2 minutes. Triton takes most of a second for a kernel."""
    assert main(["gpu", "--count"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    asked = {line[0]: int(line[1]) for line in lines if len(line) == 3 and line[1].isdigit()}
    assert list(asked) == ["table", "beyond", "host", "ops", "shares", "step", "memory", "compiled"]
    assert asked["table"] > 60
    total = int(lines[-1][0])
    assert max(asked.values()) <= total <= BEFORE_DRAWN
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert f"{total} before the drawn tests" in page


@pytest.mark.slow
def test_compile_time_of_a_step(capfd):
    """Each distinct kernel is compiled once, in an empty cache. Budget: a minute."""
    assert main(["gpu", "--count", "--only", "compiled"]) == 0
    kernels = int(capfd.readouterr().out.splitlines()[1].split()[1])
    assert main(["gpu", "--compile", "compiled"]) == 0
    words = capfd.readouterr().out.split()
    assert words[:3] == ["compiled:", str(kernels), "kernels,"]
    assert float(words[3]) > 0.05 * kernels


def test_rows_files_have_types(tmp_path):
    """Answers read numbers, not text."""
    visit = command.Visit(Workspace("cpu", "cpu", tmp_path, tmp_path), {})
    (tmp_path / "step.json").write_text(
        json.dumps([{"provider": "ours exact", "model": "vit-s", "mode": "block", "ratio_rounds": 0.7}])
    )
    outcome = Outcome(next(each for each in STEPS if each.name == "step"))
    assert visit._find(outcome, []) == (True, [])
    assert outcome.headline == "of plain: vit-s block 0.70"
