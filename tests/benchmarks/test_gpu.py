"""`python -m benchmarks gpu`: whatever becomes of a step costs the others nothing, time is kept, and nothing is lost."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as benchmarks_main
from benchmarks.__main__ import main
from benchmarks.gpu import answers, command, files, library, process, report
from benchmarks.gpu.compilations import BEFORE_DRAWN
from benchmarks.gpu.recorder import Recorder
from benchmarks.gpu.report import Outcome
from benchmarks.gpu.steps import STEPS, TESTS, Step, Workspace
from benchmarks.machine import ROOT
from benchmarks.output import append_csv, read_csv, write_csv
from benchmarks.suite import parsed

GOOD = "print('found 3.5')"
HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"


def step(name, code, share=10.0, **options):
    return Step(name, f"what {name} does", share, lambda workspace: ["-c", code], **options)


@pytest.fixture
def visit(monkeypatch, tmp_path, capsys):
    """Runs these steps. The exit code, what was printed, and the verdicts in the file."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has it ignored

    def visit(*steps, seconds=60.0, out=tmp_path / "out"):
        monkeypatch.setattr(command, "STEPS", steps)
        monkeypatch.setattr(command, "AT_THE_END", 0.0)
        monkeypatch.setattr(command, "LEAST", 0.01)
        monkeypatch.setattr(process, "GRACE", 0.3)
        code = main(["gpu", "--tiny", "--minutes", str(seconds / 60), "--out", str(out)])
        file = out / "gpu-cpu.csv"
        verdicts = {row["step"]: row["verdict"] for row in read_csv(file)} if file.exists() else {}
        return code, capsys.readouterr().out, verdicts

    yield visit
    signal.signal(signal.SIGINT, before)


def is_there(pid):
    """A process that is dead and waits for its parent doesn't count."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_step_that_raises_crashes_hangs_or_fails_costs_the_others_nothing(visit, tmp_path):
    child = tmp_path / "child"
    steps = [
        step("first", GOOD),
        step("raises", "print('on the way'); raise ValueError('wrong on purpose')"),
        step("aborts", "import os; os.abort()"),
        step("exits", "print('nothing to see'); raise SystemExit(3)"),
        step("hangs", f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {HANGS!r}]); "
             f"open({str(child)!r}, 'w').write(str(p.pid)); {HANGS}", share=0.5),
        step("cannot", GOOD, rows="missing", answer=lambda rows: 1 / 0),
        step("last", GOOD),
    ]  # fmt: skip
    start = time.monotonic()
    code, printed, verdicts = visit(*steps)
    assert code == 1
    assert time.monotonic() - start < 60
    assert verdicts == {
        "first": "ok",
        "raises": "failed",
        "aborts": "crashed",
        "exits": "failed",
        "hangs": "stopped",
        "cannot": "ok",
        "last": "ok",
    }
    assert printed.count("found 3.5") == 2
    assert "raises: ValueError: wrong on purpose" in printed
    assert "aborts: it died of SIGABRT" in printed
    assert "exits: it exited with 3" in printed
    assert "hangs: it was stopped after" in printed
    assert "nothing was found: ZeroDivisionError" in printed
    assert "on the way" in (tmp_path / "out" / "gpu-cpu.log").read_text()
    assert not is_there(child.read_text()), "what the step had started is gone too"


def test_a_step_for_what_time_is_left_may_use_all_of_it(visit):
    code, printed, verdicts = visit(step("drawn", "print('7 right', flush=True); " + HANGS, fills=True), seconds=2)
    assert (code, verdicts) == (0, {"drawn": "ok"})
    assert "7 right, when the time was over" in printed


def test_a_python_that_cannot_be_started_is_a_failed_step(visit, monkeypatch):
    monkeypatch.setattr(command.sys, "executable", "/nonexistent/python")
    code, printed, verdicts = visit(step("one", GOOD), step("two", GOOD))
    assert (code, verdicts) == (1, {"one": "failed", "two": "failed"})
    assert "one: FileNotFoundError" in printed


@pytest.mark.parametrize(
    "numbers", [[signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT, signal.SIGINT, signal.SIGTERM]]
)
def test_an_interrupt_keeps_what_there_is(visit, numbers, tmp_path):
    """Ctrl-C, what `timeout` sends, a terminal that is gone; and more of them while a step that ignores the first is
    being stopped."""
    begun = tmp_path / "begun"

    def interrupt():
        while not begun.exists() or not begun.read_text():
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code = f"import os; print('half way', flush=True); open({str(begun)!r}, 'w').write(str(os.getpid())); {HANGS}"
    code, printed, verdicts = visit(step("first", GOOD), step("second", code), step("third", GOOD))
    thread.join()
    assert code == 130
    assert verdicts == {"first": "ok", "second": "interrupted", "third": "not run"}
    assert "found 3.5" in printed
    assert "half way" in printed
    assert not is_there(begun.read_text())


def test_a_step_without_time_is_not_started(visit, monkeypatch):
    monkeypatch.setattr(command.process, "run", lambda *_: pytest.fail("it was started"))
    code, _, verdicts = visit(step("first", GOOD), step("second", GOOD), seconds=0.01)
    assert (code, verdicts) == (1, {"first": "not run", "second": "not run"})


def test_rows_of_an_earlier_visit_do_not_pass_for_this_ones(visit, tmp_path):
    """A step that writes nothing found nothing, whatever lies there; even one that fills its time."""
    (tmp_path / "out").mkdir()
    rows = [
        {"step": name, "test": "t", "outcome": "passed", "budget_used": 0.5, "message": ""}
        for name in ("table", "drawn")
    ]
    write_csv(tmp_path / "out" / "tests-cpu.csv", rows)
    drawn = step("drawn", HANGS, rows=TESTS, answer=answers.right_of_tests, fills=True)
    code, printed, verdicts = visit(drawn, seconds=1)
    assert (code, verdicts) == (1, {"drawn": "stopped"})
    assert answers.NOTHING in printed
    assert [row["step"] for row in read_csv(tmp_path / "out" / "tests-cpu.csv")] == ["table"]


@pytest.mark.parametrize("older", ["step,verdict,gone\nops,ok,1\n", "device\na GPU\n", "\x00"])
def test_older_files_with_other_columns_end_nothing(visit, tmp_path, older):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gpu-cpu.csv").write_text(older)
    _, printed, verdicts = visit(step("first", GOOD), step("last", GOOD))
    assert printed.count("found 3.5") == 2
    if "step" in older:
        assert verdicts == {"ops": "ok", "first": "ok", "last": "ok"}


class Gone(io.StringIO):
    """The end of a pipe that nobody reads, and that knows no µ."""

    encoding = "ascii"

    def write(self, text):
        text.encode("ascii")
        raise BrokenPipeError(32, "Broken pipe")


def test_a_reader_that_is_gone_ends_nothing(visit, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Gone())
        visit(step("first", "print('3.5 µs')"), step("last", GOOD))
    rows = read_csv(tmp_path / "out" / "gpu-cpu.csv")
    assert [(row["step"], row["verdict"]) for row in rows] == [("first", "ok"), ("last", "ok")]
    assert "number that matters" in (tmp_path / "out" / "gpu-cpu.log").read_text(), "the table is in the log too"


def test_the_log_keeps_earlier_visits_and_is_bounded(visit, monkeypatch, tmp_path):
    visit(step("first", GOOD))
    monkeypatch.setattr(files, "LOG_OF_A_STEP", 500)
    visit(step("second", "print('much\\n' * 1000)"))
    log = (tmp_path / "out" / "gpu-cpu.log").read_text()
    assert "== first: python3 -c" in log
    assert 50 < log.count("much") < 110
    assert "the rest of this step is left out" in log


def test_what_would_change_the_measurement_is_not_inherited(monkeypatch, tmp_path):
    for name in ("RDP_BACKEND", "PYTEST_ADDOPTS", "RDP_EXAMPLES", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    of = {
        device: command.Visit(Workspace(device, device, tmp_path, tmp_path), {"commit": "abc"})._environment(STEPS[-3])
        for device in ("cpu", "cuda")
    }
    assert not {"RDP_BACKEND", "PYTEST_ADDOPTS", "RDP_EXAMPLES"} & of["cuda"].keys()
    assert (of["cuda"]["TRITON_INTERPRET"], of["cpu"]["TRITON_INTERPRET"]) == ("0", "1")
    assert of["cpu"]["CUDA_VISIBLE_DEVICES"] == "", "a rehearsal is on the CPU where there is a GPU too"
    assert of["cuda"]["RDP_COMMIT"] == "abc"


def test_kernels_that_triton_compiles_are_counted(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert command.compiled_kernels() == 0
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "kernel.cubin").touch()
        (tmp_path / str(number) / "kernel.ptx").touch()
    assert command.compiled_kernels() == 3


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["gpu", "--tiny", "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.endswith("Not a directory\n")


FULL_DISK = """
mount -t tmpfs -o size=40k none "$OUT" || exit 77
"$PYTHON" -c "
from benchmarks.gpu import command
from benchmarks.gpu.steps import Step
from benchmarks.__main__ import main
def step(name, code): return Step(name, name, 10.0, lambda workspace: ['-c', code])
command.STEPS = (step('first', 'print(1)'), step('fills', 'print((\\"x\\" * 99 + \\"\\\\\\\\n\\") * 2000)'), step('last', 'print(2)'))
raise SystemExit(main(['gpu', '--tiny', '--minutes', '1', '--out', '$OUT']))
"
code=$?
echo "== file"
cat "$OUT/gpu-cpu.csv"
exit $code
"""


@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare, for a disk of 40 KB")
def test_a_full_disk_costs_nothing_but_what_does_not_fit(tmp_path):
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable}
    shell = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", FULL_DISK]
    result = subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode == 77 or "unshare" in result.stderr:
        pytest.skip(f"no disk of 40 KB can be made here: {result.stderr.strip()}")
    printed, _, file = result.stdout.partition("== file")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "can't write gpu-cpu.log: No space left on device" in printed
    for name in ("first", "fills", "last"):
        assert f"{name}: ok" in printed
    assert "can't write gpu-cpu.csv: No space left on device" in printed
    assert ",first,ok," in file, "what was found while there was room"


def test_limits_keep_to_the_time_and_hand_on_what_is_left(monkeypatch):
    now = 100.0
    monkeypatch.setattr(command.time, "monotonic", lambda: now)
    steps = [step("a", "", share=10), step("b", "", share=30), step("c", "", share=60)]
    found = []
    for limit, share_used in zip(command.limits(steps, 200.0), (1.0, 0.5, 1.0), strict=True):
        found.append(limit)
        now += share_used * limit
    assert found == pytest.approx([10, 30, 75])
    assert now == pytest.approx(200)
    assert list(command.limits(steps, now - 1)) == [0, 0, 0]


def test_the_table_has_at_most_60_lines():
    outcomes = [
        Outcome(each, report.FAILED, "a number " * 900, 1.0, 2.0, 3, [f"line {i} " * 40 for i in range(30)])
        for each in STEPS
    ]
    lines = report.lines_of(outcomes, "a GPU")
    assert len(lines) == report.MOST_LINES
    assert max(map(len, lines)) <= report.WIDTH
    assert lines[-1].endswith("more lines, in the log")
    assert all(any(line.startswith(each.name) for line in lines) for each in STEPS)


def test_steps_of_an_earlier_visit_stay_in_the_file(visit):
    visit(step("table", GOOD), step("ops", "raise SystemExit(1)"))
    _, _, verdicts = visit(step("ops", GOOD))
    assert verdicts == {"table": "ok", "ops": "ok"}


# The steps themselves


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_step_is_a_command_that_there_is(device, tmp_path):
    """Options that only a GPU will see too."""
    workspace = Workspace(device, "h200", tmp_path, tmp_path)
    for each in STEPS:
        flag, module, *options = each.arguments(workspace)
        assert flag == "-m"
        if module == "benchmarks":
            parsed(benchmarks_main.COMMANDS, options)
        elif module == "pytest":
            tests = [option for option in options if option.startswith("tests/")]
            assert tests
            assert "-W default" in " ".join(options), "a new warning doesn't fail a test"
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


# The recorder


@pytest.fixture
def record(tmp_path):
    """Runs a file of tests with the recorder. The exit code, what was printed, and the rows."""
    file = tmp_path / "tests-cpu.csv"

    def record(source, *options, step="table"):
        tests = tmp_path / "test_recorded.py"
        tests.write_text(textwrap.dedent(source))
        plugin = ["-p", "benchmarks.gpu.recorder", "--record", str(file), "--record-step", step]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
        result = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *plugin, *options, str(tests)],
            cwd=ROOT, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        return result.returncode, result.stdout, read_csv(file) if file.exists() else []

    return record


RECORDED = """
    import os, pytest
    def test_right(record_property):
        record_property("budget_used", 0.25)
        record_property("worst", "dgamma")
    def test_wrong():
        assert 1 == 2, "off by one"
    def test_skipped():
        pytest.skip("no such device")
"""


def test_a_row_for_each_test(record):
    code, _, rows = record(RECORDED, "-n", "1")
    assert code == 1
    of = {row["test"].partition("::")[2]: row for row in rows}
    assert {name: row["outcome"] for name, row in of.items()} == {
        "test_right": "passed",
        "test_wrong": "failed",
        "test_skipped": "skipped",
    }
    assert (of["test_right"]["budget_used"], of["test_right"]["worst"]) == ("0.25", "dgamma")
    assert "off by one" in of["test_wrong"]["message"]
    assert "no such device" in of["test_skipped"]["message"]
    assert all(row["torch"] == torch.__version__ and row["step"] == "table" for row in rows)
    assert answers.right_of_tests(rows) == "1 of 2 right, 1 skipped, 25% of the error budget at most"
    assert "off by one" in answers.wrong_of_tests(rows)[0]


@pytest.mark.slow
def test_rows_are_on_disk_when_the_process_dies(record):
    """Budget: 20 seconds."""
    code, _, rows = record("import os\ndef test_right(): pass\ndef test_dies(): os.abort()")
    assert code < 0
    assert [row["outcome"] for row in rows] == ["passed"]
    _, _, rows = record("import os\ndef test_right(): pass\ndef test_dies(): os.abort()", "-n", "1")
    assert {row["outcome"] for row in rows} == {"passed", "failed"}
    assert "crashed" in next(row["message"] for row in rows if row["outcome"] == "failed")
    _, _, rows = record("def test_more(): pass", step="drawn")
    assert [row["step"] for row in rows] == ["table"] * 2 + ["drawn"], "another step's rows stay"


def test_rows_of_other_steps_stay(tmp_path):
    """Also those of an earlier commit, which had other columns."""
    file = tmp_path / "tests.csv"
    write_csv(file, [{"step": "drawn", "test": "t", "gone": 1}, {"step": "table", "test": "t", "gone": 2}])
    recorder = Recorder(file, "table")
    for name in ("a", "b"):
        recorder.pytest_runtest_logreport(pytest.TestReport(name, (name, 0, name), {}, "passed", None, "call"))
    assert [(row["step"], row["test"], row["gone"]) for row in read_csv(file)] == [
        ("drawn", "t", "1"),
        ("table", "a", ""),
        ("table", "b", ""),
    ]


def test_a_file_that_cannot_be_written_fails_the_run(tmp_path):
    recorder = Recorder(tmp_path / "missing" / "tests.csv", "table")
    report = pytest.TestReport("t", ("t", 0, "t"), {}, "passed", None, "call")
    recorder.pytest_runtest_logreport(report)
    session, lines = SimpleNamespace(exitstatus=pytest.ExitCode.OK), []
    recorder.pytest_sessionfinish(session)
    assert session.exitstatus != 0
    recorder.pytest_terminal_summary(SimpleNamespace(write_line=lines.append))
    assert lines == [f"can't write {tmp_path}/missing/tests.csv: No such file or directory"]


def test_a_row_that_does_not_fit_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    file = tmp_path / "rows.csv"
    write_csv(file, [{"a": 1, "b": "x"}])

    class Full(io.BytesIO):
        """A disk with room for half of it."""

        def write(self, content):
            with open(file, "ab") as half:
                half.write(content[: len(content) // 2])
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda *_: Full())
    with pytest.raises(OSError, match="No space"):
        append_csv(file, {"a": 2, "b": "y" * 50}, ["a", "b"])
    monkeypatch.undo()
    assert file.read_text() == "a,b\n1,x\n"
    append_csv(file, {"a": 2, "b": None}, ["a", "b"])
    assert read_csv(file) == [{"a": "1", "b": "x"}, {"a": "2", "b": ""}]


def test_a_gpu_on_which_no_test_ran_is_no_success(tmp_path):
    """All of them skipped, say."""
    file = tmp_path / "tests-h200.csv"
    visit = command.Visit(Workspace("cuda", "h200", tmp_path, tmp_path), {})
    file.write_text("step,test,outcome,budget_used,message\ntable,t,skipped,,no GPU\n")
    outcome = Outcome(next(each for each in STEPS if each.rows == TESTS))
    assert visit._find(outcome, []) == (True, ["no test ran"])


def test_a_test_that_ends_its_process_counts_once():
    """It fails, and is blamed for the crash."""
    rows = [{"test": t, "outcome": o, "message": m, "budget_used": ""} for t, o, m in
            (("a", "passed", ""), ("b", "failed", "off by 3"), ("b", "failed", "worker crashed"))]  # fmt: skip
    assert answers.right_of_tests(rows) == "1 of 2 right"
    assert answers.wrong_of_tests(rows) == ["b: off by 3"]


def gpu_row(provider, **columns):
    row = {"provider": provider, "unavailable": "", "op": "residual_add", "shape": "4x5x32", "dtype": "bfloat16"}
    return row | {"layout": "..C", "kept": 3, "gamma": True, "pass": "both", "ratio_rounds": None} | columns


def test_headlines():
    """From rows as a GPU gives them."""
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


# All of it


@pytest.fixture
def bare_copy(tmp_path):
    """The tree as it travels: no git, nothing built."""
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
    options = ["--tiny", "--minutes", "40", "--out", str(out)]  # a busy machine has time
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
    for name in ("ops", "overhead", "step", "memory"):
        committed = read_csv(ROOT / "benchmarks" / "results" / f"{name}-cpu.csv")[0].keys()
        found = read_csv(out / f"{name}-cpu.csv")[0].keys()
        assert set(committed) <= set(found), "rows are as benchmarks/results keeps them"
    right = {row["step"] for row in read_csv(out / "tests-cpu.csv") if row["outcome"] == "passed"}
    assert right == {"table", "beyond", "drawn"}


@pytest.mark.slow
def test_how_many_kernels_a_visit_compiles(capfd):
    """Budget: 2 minutes. A kernel takes Triton most of a second."""
    assert main(["gpu", "--count"]) == 0
    lines = [line.split() for line in capfd.readouterr().out.splitlines()]
    asked = {line[0]: int(line[1]) for line in lines if len(line) == 3 and line[1].isdigit()}
    assert list(asked) == ["table", "beyond", "host", "ops", "step", "memory", "compiled"]
    assert asked["table"] > 60
    total = int(lines[-1][0])
    assert max(asked.values()) <= total <= BEFORE_DRAWN


def test_rows_files_have_types(tmp_path):
    """An answer reads numbers, not their texts."""
    visit = command.Visit(Workspace("cpu", "cpu", tmp_path, tmp_path), {})
    (tmp_path / "step.json").write_text(
        json.dumps([{"provider": "ours exact", "model": "vit-s", "mode": "block", "ratio_rounds": 0.7}])
    )
    outcome = Outcome(next(each for each in STEPS if each.name == "step"))
    assert visit._find(outcome, []) == (True, [])
    assert outcome.headline == "of plain: vit-s block 0.70"
