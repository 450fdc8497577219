"""`python -m benchmarks gpu`: a failed step doesn't harm the others, limits of time are kept, and no result is lost."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.gpu import answers, command, files, process, report
from benchmarks.gpu.report import Outcome
from benchmarks.gpu.steps import STEPS, TESTS, Step, Workspace
from benchmarks.machine import ROOT
from benchmarks.output import read_csv, write_csv

GOOD = "print('found 3.5')"
HANGS = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(600)"


def step(name, code, share=10.0, **options):
    return Step(name, f"what {name} does", share, lambda workspace: ["-c", code], **options)


@pytest.fixture
def visit(monkeypatch, tmp_path, capsys):
    """Runs these steps. Returns the exit code, the output and the verdicts in the file."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background processes of a shell ignore it

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
    """False for a zombie."""
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_step_that_raises_crashes_hangs_or_fails_leaves_the_others_alone(visit, tmp_path):
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
    assert not is_there(child.read_text()), "the step's child is gone too"


def test_a_step_that_fills_its_time_may_use_all_of_it(visit):
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
def test_an_interrupt_keeps_the_results_so_far(visit, numbers, tmp_path):
    """Ctrl-C, the signal of `timeout`, a closed terminal; and more signals while a step that ignores the first one is
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
    """A step that writes nothing has no result, even if old files are there, and even if it fills its time."""
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
    """A closed pipe whose encoding has no µ."""

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


def test_variables_that_change_the_measurement_are_not_inherited(monkeypatch, tmp_path):
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


def test_limits_keep_to_the_time_and_pass_on_unused_time(monkeypatch):
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
