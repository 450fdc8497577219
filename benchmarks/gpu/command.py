"""`python -m benchmarks gpu`: everything worth knowing of a GPU that is at hand for minutes, the most valuable first.

Runs from a bare copy of the tree. Each step is a process with a limit of its own; the limits keep to --minutes, and
what a step leaves of its time goes to those after it. What a step finds is on disk the moment it is found. At most
eight files are written: a table of the steps, a log, and rows as benchmarks/results/ keeps them. The exit code is 0 if
all was well, 1 if not, 130 after an interrupt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from .. import command
from ..harness import Row
from ..machine import ROOT, Device, facts
from ..output import read_csv
from . import answers, process, report
from .compilations import count
from .files import Files, StepLog
from .report import INTERRUPTED, NOT_RUN, Outcome
from .steps import STEPS, Step, Workspace

MINUTES = 9.0
FOR_THE_TABLE = 5.0  # seconds
LAST_LINES = 4
EXIT_INTERRUPTED = 130


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "gpu", help="all of it, in minutes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [step.name for step in STEPS]
    parser.add_argument("--minutes", type=_minutes, default=MINUTES, help=f"default: {MINUTES:g}")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help="\n".join(map(_line, STEPS)))
    parser.add_argument(
        "--out", type=command.folder, metavar="FOLDER", default=Path("report/gpu"), help="default: report/gpu"
    )
    parser.add_argument("--tiny", action="store_true", help="a rehearsal in small, on the CPU: does it run")
    parser.add_argument(
        "--count", action="store_true", help="only count the kernels that each step has Triton compile; needs no GPU"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    steps = [step for step in STEPS if (step.name in options.only if options.only else step.by_default)]
    if options.count:
        return count([step.name for step in steps])
    if not options.tiny and not torch.cuda.is_available():
        print(f"{command.NO_GPU}; --tiny goes through every step on the CPU", file=sys.stderr)
        return 2
    device = Device.of("cpu" if options.tiny else "cuda")
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as work, _terminated_like_interrupted():
        workspace = Workspace(device.device.type, short_name(device.name, options.tiny), out, Path(work))
        return Visit(workspace, facts(device)).go(steps, 60 * options.minutes)


class Visit:
    """Runs one step after the other, whatever becomes of each."""

    def __init__(self, workspace: Workspace, machine: Row):
        self._workspace, self._machine, self._files = workspace, machine, Files()

    def go(self, steps: Sequence[Step], seconds: float) -> int:
        """Prints a line when a step has ended, and the table at last. The exit code."""
        end = time.monotonic() + seconds - FOR_THE_TABLE
        outcomes = [Outcome(step, NOT_RUN) for step in steps]
        interrupted = False
        self._files.write(self._workspace.file("gpu", "log"), lambda path: path.write_bytes(b""))
        try:
            for outcome, limit in zip(outcomes, limits(steps, end), strict=True):
                outcome.limit = limit
                try:
                    self._run(outcome)
                except Exception as error:  # no process could be started, or worse
                    outcome.verdict, outcome.told = report.FAILED, [f"{type(error).__name__}: {error}"]
                print(f"{outcome.step.name}: {outcome.verdict} after {outcome.seconds:.0f} s", flush=True)
                self._summarise(outcomes)
        except KeyboardInterrupt:
            interrupted = True
            running = next((each for each in outcomes if each.verdict == NOT_RUN), None)
            if running is not None:
                self._find(running, [])
                running.verdict = INTERRUPTED
            self._summarise(outcomes)
        notes = [f"can't write {path}: {reason}" for path, reason in self._files.unwritten.items()]
        print(*report.lines_of(outcomes, self._title(seconds), notes), sep="\n", flush=True)
        if interrupted:
            return EXIT_INTERRUPTED
        return 0 if all(each.well for each in outcomes) and not notes else 1

    def _run(self, outcome: Outcome) -> None:
        step, workspace = outcome.step, self._workspace
        said: deque[str] = deque(maxlen=LAST_LINES)
        log = StepLog(self._files, workspace.file("gpu", "log"))

        def on_line(line: str) -> None:
            if line.strip():
                said.append(line.strip())
            log.add(line)

        before = compiled_kernels()
        arguments = step.arguments(workspace)
        log.add(f"== {step.name}: {shlex.join(['python3', *arguments])}")
        ended = process.run([sys.executable, *arguments], self._environment(step), ROOT, outcome.limit, on_line)
        outcome.seconds = ended.seconds
        outcome.kernels = None if workspace.in_small else compiled_kernels() - before
        wrong = self._find(outcome, list(said))
        outcome.verdict = report.verdict_of(step, ended, wrong)
        if not outcome.well:
            outcome.told = [report.how(outcome, ended), *(wrong or said)]
        elif ended.stopped:
            outcome.number += ", when the time was over"

    def _find(self, outcome: Outcome, said: list[str]) -> list[str]:
        """Sets the number that matters. Of tests, a line for each that failed."""
        step = outcome.step
        if step.rows is None or step.answer is None:
            outcome.number = " ".join(said[-1].split()) if said else ""
            return []
        try:
            rows = self._rows_of(step)
            outcome.number = step.answer(rows)
            return answers.wrong_of_tests(rows, must_run=not self._workspace.in_small) if step.is_tests else []
        except Exception as error:  # a file that is cut off, or rows that lack something
            outcome.number = f"{answers.NOTHING}: {type(error).__name__}: {error}"
            return []

    def _rows_of(self, step: Step) -> list[Row]:
        assert step.rows is not None
        if step.is_tests:
            path = self._workspace.file(step.rows)
            return [row for row in read_csv(path) if row["step"] == step.name] if path.exists() else []
        path = self._workspace.rows_file(step.rows)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def _environment(self, step: Step) -> dict[str, str]:
        small = self._workspace.in_small
        more = dict(step.in_small) if small else {"TRITON_INTERPRET": "0"}
        # Where a GPU machine's Triton is new to interpreting, or numpy to Triton, kernels must never be interpreted.
        return os.environ | more | {"PYTHONUNBUFFERED": "1", "RDP_COMMIT": str(self._machine["commit"])}

    def _title(self, seconds: float) -> str:
        of = self._machine
        versions = f"torch {of['torch']}, triton {of['triton'] or 'none'}, Python {of['python']}"
        return f"{of['device']}, {versions}, commit {of['commit'] or '?'}; {seconds / 60:g} minutes"

    def _summarise(self, outcomes: list[Outcome]) -> None:
        self._files.write(self._workspace.file("gpu"), lambda path: report.write(path, outcomes, self._machine))


def limits(steps: Sequence[Step], end: float) -> Iterator[float]:
    """Seconds that each step may take, when it is about to start: its share of what is left until `end`."""
    for number, step in enumerate(steps):
        share = step.share / sum(each.share for each in steps[number:])
        yield max((end - time.monotonic()) * share, 0.0)


def compiled_kernels() -> int:
    """How many kernels there are in Triton's cache."""
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    return sum(1 for _ in cache.glob("*/*.cubin"))


def short_name(device: str, in_small: bool) -> str:
    """ "h200" of "NVIDIA H200", for the names of files."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-").split("-")
    return "cpu" if in_small else "-".join(word for word in words if word not in ("nvidia", "amd")) or "gpu"


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """`timeout` and the like end a visit as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _line(step: Step) -> str:
    return f"{step.name}: {step.what}" + ("" if step.by_default else " (only when asked for)")


def _minutes(text: str) -> float:
    """An argparse type."""
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes <= 600:
        raise argparse.ArgumentTypeError(f"must be a number of minutes between 0 and 600, got {text!r}")
    return minutes
