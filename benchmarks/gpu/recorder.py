"""A plugin of pytest, `-p benchmarks.gpu.recorder --record FILE --record-step STEP`: a row of FILE for each test,
written when the test ends. Columns of machine and versions are those of `benchmarks/results/`.

The properties "budget_used" and "worst" that a test records become columns.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..harness import Row
from ..machine import Device, facts
from ..output import append_csv, write_csv
from .files import rows_of_other_steps

MESSAGE = 300  # characters of a failure's message


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FILE", help="write a row for each test here")
    parser.addoption("--record-step", default="", metavar="STEP", help="the rows' first column")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record") is not None and not hasattr(config, "workerinput"):  # xdist's workers don't record
        config.pluginmanager.register(Recorder(config.getoption("record"), config.getoption("record_step")))


class Recorder:
    """Writes rows for one step. Rows of other steps in the file are kept."""

    def __init__(self, path: Path, step: str):
        self._path = path
        self._common = facts(Device.of("cuda" if torch.cuda.is_available() else "cpu")) | {"step": step}
        self._others = rows_of_other_steps(path, step)
        self._columns: list[str] = []  # columns of the file, after this run's first row
        self._failed: OSError | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            row = self._common | row_of(report)
            try:
                if self._columns:
                    append_csv(self._path, row, self._columns)
                else:
                    rows = [*self._others, row]
                    write_csv(self._path, rows)
                    self._columns = list(dict.fromkeys(column for row in rows for column in row))
            except OSError as error:
                self._failed = error

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._failed is not None:
            session.exitstatus = session.exitstatus or pytest.ExitCode.INTERNAL_ERROR

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._failed is not None:
            terminalreporter.write_line(f"can't write {self._path}: {self._failed.strerror}")


def row_of(report: pytest.TestReport) -> Row:
    told = dict(report.user_properties)
    return {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": report.duration,
        "budget_used": told.get("budget_used"),
        "worst": told.get("worst", ""),
        "message": "" if report.passed else message_of(report),
    }


def message_of(report: pytest.TestReport) -> str:
    """Returns the failure or the reason of a skip in one line."""
    if isinstance(report.longrepr, tuple):  # for skips: file, line, reason
        text = report.longrepr[2]
    else:
        crash = getattr(report.longrepr, "reprcrash", None)
        text = str(report.longrepr) if crash is None else crash.message
    return " ".join(text.split())[:MESSAGE]
