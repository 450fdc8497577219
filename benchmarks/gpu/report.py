"""The outcomes of the steps: the table at the end of a visit, and its file."""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..harness import Row
from ..output import read_csv, write_csv
from .process import Ended
from .steps import Step

OK, FAILED, STOPPED, CRASHED, INTERRUPTED, NOT_RUN = "ok", "failed", "stopped", "crashed", "interrupted", "not run"
WIDTH = 120
MOST_LINES = 60
INDENT = 43
MOST_PROBLEMS = 6  # lines of one step's problems


@dataclass
class Outcome:
    """The outcome of a step.

    Args:
        verdict: one of the words above.
        headline: the number that matters.
        limit: its time limit in seconds.
        kernels: the number of kernels that Triton compiled for it.
        problems: lines that describe failures.
    """

    step: Step
    verdict: str = NOT_RUN
    headline: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    kernels: int | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def succeeded(self) -> bool:
        return self.verdict == OK


def verdict_of(step: Step, ended: Ended, found: bool, failures: list[str]) -> str:
    """`found` says whether there are rows. `failures` are the failed tests, if the step runs tests."""
    if failures:
        return FAILED
    if ended.stopped:
        return OK if step.fills and found else STOPPED
    if ended.code < 0:
        return CRASHED
    return FAILED if ended.code else OK


def how_it_ended(ended: Ended, limit: float) -> str:
    """Describes in words how a process failed."""
    if ended.stopped:
        return f"it was stopped after {limit:.0f} s"
    if ended.code < 0:
        return f"it died of {signal.Signals(-ended.code).name}"
    return f"it exited with {ended.code}"


def lines_of(outcomes: list[Outcome], title: str, notes: Iterable[str] = ()) -> list[str]:
    """Returns at most `MOST_LINES` lines: a line or a few for each step, then the problems."""
    table = [title, f"{'step':10}{'verdict':13}{'seconds':>9}{'kernels':>9}  number that matters"]
    for each in outcomes:
        took = f"{each.seconds:.0f}/{each.limit:.0f}" if each.limit else ""
        kernels = "" if each.kernels is None else str(each.kernels)
        headline = textwrap.wrap(each.headline, WIDTH - INDENT, max_lines=3, placeholder=" ...") or [""]
        table.append(f"{each.step.name:10}{each.verdict:13}{took:>9}{kernels:>9}  {headline[0]}".rstrip())
        table += [" " * INDENT + line for line in headline[1:]]
    lines = [*table, *notes, *(line for each in outcomes for line in _problems(each))]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} more lines, in the log"]
    return lines


def _problems(outcome: Outcome) -> Iterator[str]:
    for line in outcome.problems[:MOST_PROBLEMS]:
        yield textwrap.shorten(f"{outcome.step.name}: {line}", WIDTH, placeholder=" ...")
    if len(outcome.problems) > MOST_PROBLEMS:
        yield f"{outcome.step.name}: ... and {len(outcome.problems) - MOST_PROBLEMS} more"


def write(path: Path, outcomes: list[Outcome], facts: Row) -> None:
    """Writes a row for each step. Rows of steps that aren't part of this visit are kept. Raises `OSError`."""
    rows: list[Row] = [
        facts
        | {
            "step": each.step.name,
            "verdict": each.verdict,
            "headline": each.headline,
            "seconds": each.seconds,
            "limit": each.limit,
            "kernels": each.kernels,
            "problems": "; ".join(each.problems[:MOST_PROBLEMS]),
        }
        for each in outcomes
    ]
    there = {each.step.name for each in outcomes}
    earlier: list[Row] = []
    if path.exists():
        earlier = [row for row in read_csv(path) if row.get("step") and row["step"] not in there]
    write_csv(path, [*earlier, *rows])
