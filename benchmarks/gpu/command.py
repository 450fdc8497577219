"""`python -m benchmarks gpu`: checks and measures everything on a GPU that is available for minutes, most valuable
first.

It runs from a bare copy of the tree. Each step is a process with its own time limit. Together the limits keep to
--minutes, and time that a step leaves goes to later steps. Results are written as soon as they exist, to at most eight
files: a table of the steps, a log, and rows in the format of benchmarks/results/. The exit code is 0 if every step
succeeded, 1 if not, and 130 after an interrupt.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from .. import command
from ..harness import Row, told
from ..machine import ROOT, Device, facts
from ..output import read_csv
from . import answers, process, report
from .compilations import WORKS, compile_all, count
from .files import Files, StepLog, append, forget
from .report import INTERRUPTED, Outcome
from .steps import STEPS, Step, Workspace

MINUTES = 9.0
AT_THE_END = 12.0  # seconds for stopping a last step that hangs, and for the table
LEAST = 1.0  # seconds; with less time left no step starts
LAST_LINES = 4
NOT_INHERITED = ("RDP_BACKEND", "RDP_EXAMPLES", "PYTEST_ADDOPTS")
"""Environment variables of the caller that would change the measurements."""
EXIT_INTERRUPTED = 130


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "gpu",
        help="all checks and measurements for a GPU, in minutes",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    names = [step.name for step in STEPS]
    parser.add_argument(
        "--minutes", type=_minutes, default=MINUTES, help=f"the time for all steps; default: {MINUTES:g}"
    )
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help="\n".join(map(_line, STEPS)))
    parser.add_argument(
        "--out", type=command.folder, metavar="FOLDER", default=Path("report/gpu"), help="default: report/gpu"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny inputs on the CPU, to check that every step works")
    parser.add_argument(
        "--count", action="store_true", help="only count the kernels that each step has Triton compile; needs no GPU"
    )
    parser.add_argument(
        "--compile", choices=WORKS, metavar="STEP", help="only time the compilation of a step's kernels; needs no GPU"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    steps = [step for step in STEPS if (step.name in options.only if options.only else step.by_default)]
    if options.count:
        return count([step.name for step in steps])
    if options.compile:
        return compile_all(options.compile)
    if not options.tiny and not torch.cuda.is_available():
        print(f"{command.NO_GPU}; --tiny goes through every step on the CPU", file=sys.stderr)
        return 2
    device, out = Device.of("cpu" if options.tiny else "cuda"), options.out.absolute()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as work, process.ended_by_signals():
        workspace = Workspace(device.device.type, short_name(device.name, options.tiny), out, Path(work))
        return Visit(workspace, facts(device)).go(steps, 60 * options.minutes)


class Visit:
    """Runs one step after the other, even if one fails."""

    def __init__(self, workspace: Workspace, machine: Row):
        self._workspace, self._machine, self._files = workspace, machine, Files()

    def go(self, steps: Sequence[Step], seconds: float) -> int:
        """Prints a line when a step has ended, and the table at the end. Returns the exit code."""
        end = time.monotonic() + seconds - min(AT_THE_END, seconds / 5)
        outcomes = [Outcome(step) for step in steps]
        title = self._title(seconds)
        self._say(title)
        interrupted = False
        try:
            for outcome, limit in zip(outcomes, limits(steps, end), strict=True):
                if limit < LEAST:
                    continue
                outcome.limit = limit
                try:
                    self._run(outcome)
                except Exception as error:  # for example no process could be started
                    outcome.verdict, outcome.problems = report.FAILED, [told(error)]
                self._summarise(outcomes)
                self._say(f"{outcome.step.name}: {outcome.verdict} after {outcome.seconds:.0f} s")
        except KeyboardInterrupt:
            interrupted = True
        with process.undisturbed():
            self._summarise(outcomes)
            notes = [f"can't write {path}: {reason}" for path, reason in self._files.unwritten.items()]
            self._say(*report.lines_of(outcomes, title, notes))
        if interrupted:
            return EXIT_INTERRUPTED
        return 0 if all(each.succeeded for each in outcomes) and not notes else 1

    def _run(self, outcome: Outcome) -> None:
        step, workspace = outcome.step, self._workspace
        last_lines: deque[str] = deque(maxlen=LAST_LINES)
        log = StepLog(self._files, workspace.file("gpu", "log"))
        arguments = step.arguments(workspace)
        log.add(f"== {step.name}: {shlex.join(['python3', *arguments])}")
        if step.rows is not None and step.is_tests:
            self._files.write(workspace.file(step.rows), lambda path: forget(path, step.name))

        def on_line(line: str) -> None:
            if line.strip():
                last_lines.append(" ".join(line.split()))
            log.add(line)

        before, start = compiled_kernels(), time.monotonic()
        try:
            ended = process.run([sys.executable, *arguments], self._environment(step), ROOT, outcome.limit, on_line)
        except KeyboardInterrupt:
            outcome.verdict, outcome.seconds = INTERRUPTED, time.monotonic() - start
            self._find(outcome, list(last_lines))
            raise
        outcome.seconds = ended.seconds
        outcome.kernels = None if workspace.in_small else compiled_kernels() - before
        found, failures = self._find(outcome, list(last_lines))
        outcome.verdict = report.verdict_of(step, ended, found, failures)
        if not outcome.succeeded:
            outcome.problems = [report.how_it_ended(ended, outcome.limit), *failures]
            outcome.problems += [] if failures and found else last_lines
        elif ended.stopped:
            outcome.headline += ", when the time was over"

    def _find(self, outcome: Outcome, last_lines: list[str]) -> tuple[bool, list[str]]:
        """Sets the headline. Returns whether there are rows and, for tests, a line for each failure."""
        step = outcome.step
        if step.rows is None or step.answer is None:
            outcome.headline = last_lines[-1] if last_lines else ""
            return True, []
        try:
            rows = self._rows_of(step)
            outcome.headline = step.answer(rows)
            must_run = not self._workspace.in_small
            return bool(rows), answers.wrong_of_tests(rows, must_run) if step.is_tests else []
        except Exception as error:  # a truncated file, or rows without some columns
            outcome.headline = f"{answers.NOTHING}: {told(error)}"
            return False, []

    def _rows_of(self, step: Step) -> list[Row]:
        assert step.rows is not None
        if step.is_tests:
            path = self._workspace.file(step.rows)
            return [row for row in read_csv(path) if row.get("step") == step.name] if path.exists() else []
        path = self._workspace.rows_file(step.rows)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def _environment(self, step: Step) -> dict[str, str]:
        """Returns the environment of a step. On a GPU kernels aren't interpreted; a rehearsal doesn't use the GPU."""
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        device = {"TRITON_INTERPRET": "0"}
        if self._workspace.in_small:
            device = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(step.in_small)
        return inherited | device | {"PYTHONUNBUFFERED": "1", "RDP_COMMIT": str(self._machine["commit"])}

    def _title(self, seconds: float) -> str:
        of = self._machine
        versions = f"torch {of['torch']}, triton {of['triton'] or 'none'}, Python {of['python']}"
        return f"{of['device']}, {versions}, commit {of['commit'] or '?'}, {of['date']}; {seconds / 60:.3g} minutes"

    def _summarise(self, outcomes: list[Outcome]) -> None:
        self._files.write(self._workspace.file("gpu"), lambda path: report.write(path, outcomes, self._machine))

    def _say(self, *lines: str) -> None:
        """Prints to the terminal, if it still exists, and to the log."""
        text = "".join(f"{line}\n" for line in lines)
        with suppress(OSError, ValueError):
            encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
            print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)
        self._files.write(self._workspace.file("gpu", "log"), lambda path: append(path, text))


def limits(steps: Sequence[Step], end: float) -> Iterator[float]:
    """Yields the limit of each step in seconds, when it is about to start: its share of the time left until `end`."""
    for number, step in enumerate(steps):
        share = step.share / sum(each.share for each in steps[number:])
        yield max((end - time.monotonic()) * share, 0.0)


def compiled_kernels() -> int:
    """Returns the number of kernels in Triton's cache."""
    home = Path(os.environ.get("TRITON_HOME") or Path.home())
    cache = Path(os.environ.get("TRITON_CACHE_DIR") or home / ".triton" / "cache")
    return sum(1 for _ in cache.glob("*/*.cubin"))


def short_name(device: str, in_small: bool) -> str:
    """Returns the GPU's name for file names: "h200" for "NVIDIA H200"."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-").split("-")
    return "cpu" if in_small else "-".join(word for word in words if word not in ("nvidia", "amd")) or "gpu"


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
