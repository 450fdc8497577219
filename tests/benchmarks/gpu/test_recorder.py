"""The pytest plugin that writes a row for each test."""

import io
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import answers
from benchmarks.gpu.process import _stop
from benchmarks.gpu.recorder import Recorder
from benchmarks.machine import ROOT
from benchmarks.output import append_csv, read_csv, write_csv


@pytest.fixture
def record(tmp_path):
    """Runs a file of tests with the recorder. Returns the exit code, the output and the rows."""
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


CUT_OFF = """
    import time
    def test_right(): pass
    def test_hangs():
        open(BEGUN, "w").close()
        time.sleep(600)
"""


@pytest.mark.slow
def test_a_run_that_is_cut_off_blames_no_test(tmp_path):
    """When a step's time is over, its tests and their workers are stopped. Budget: 20 seconds."""
    file, begun, tests = tmp_path / "tests.csv", tmp_path / "begun", tmp_path / "test_cut_off.py"
    tests.write_text(textwrap.dedent(CUT_OFF).replace("BEGUN", repr(str(begun))))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    plugin = ["-p", "benchmarks.gpu.recorder", "--record", file, "--record-step", "drawn"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-n", "2", *plugin, tests]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not (begun.exists() and file.exists()):
            assert process.poll() is None
            time.sleep(0.05)
    finally:
        _stop(process)  # an interrupt, and a kill where that doesn't end it
    assert [(row["test"].partition("::")[2], row["outcome"]) for row in read_csv(file)] == [("test_right", "passed")]


def test_rows_of_other_steps_stay(tmp_path):
    """Rows of an earlier commit with other columns stay too."""
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
        """A disk with room for half of the bytes."""

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
