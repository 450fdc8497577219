"""What became of the steps: the table that a visit ends in, and its file."""

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
MOST_TOLD = 6  # lines of what went wrong in a step


@dataclass
class Outcome:
    """What became of a step.

    Args:
        verdict: one of the words above.
        number: the one that matters.
        limit: seconds that it had.
        kernels: how many Triton compiled for it.
        told: lines of what went wrong.
    """

    step: Step
    verdict: str
    number: str = ""
    seconds: float = 0.0
    limit: float = 0.0
    kernels: int | None = None
    told: list[str] = field(default_factory=list)

    @property
    def well(self) -> bool:
        return self.verdict == OK


def verdict_of(step: Step, ended: Ended, wrong: list[str]) -> str:
    """`wrong`: of a step that is tests, those that failed."""
    if wrong:
        return FAILED
    if ended.stopped:
        return OK if step.fills else STOPPED
    if ended.code < 0:
        return CRASHED
    return FAILED if ended.code else OK


def how(outcome: Outcome, ended: Ended) -> str:
    """How the process ended, in words, where that isn't well."""
    if ended.stopped:
        return f"it was stopped after {outcome.limit:.0f} s"
    if ended.code < 0:
        return f"it died of {signal.Signals(-ended.code).name}"
    return f"it exited with {ended.code}"


def lines_of(outcomes: list[Outcome], title: str, notes: Iterable[str] = ()) -> list[str]:
    """A line a step, then what went wrong, in `MOST_LINES` lines."""
    table = [title, f"{'step':10}{'verdict':13}{'seconds':>9}{'kernels':>9}  number that matters"]
    for each in outcomes:
        took = f"{each.seconds:.0f}/{each.limit:.0f}" if each.limit else ""
        kernels = "" if each.kernels is None else str(each.kernels)
        number = textwrap.wrap(each.number, WIDTH - 43) or [""]
        table.append(f"{each.step.name:10}{each.verdict:13}{took:>9}{kernels:>9}  {number[0]}".rstrip())
        table += [" " * 43 + line for line in number[1:]]
    wrong = [line for each in outcomes for line in _told(each)]
    lines = [*table, *notes, *wrong]
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], f"... and {len(lines) - MOST_LINES + 1} more lines, in the log"]
    return lines


def _told(outcome: Outcome) -> Iterator[str]:
    for line in outcome.told[:MOST_TOLD]:
        yield textwrap.shorten(f"{outcome.step.name}: {line}", WIDTH, placeholder=" ...")
    if len(outcome.told) > MOST_TOLD:
        yield f"{outcome.step.name}: ... and {len(outcome.told) - MOST_TOLD} more"


def write(path: Path, outcomes: list[Outcome], facts: Row) -> None:
    """A row a step; those of steps that this visit doesn't have stay. Raises `OSError`."""
    rows: list[Row] = [
        facts
        | {
            "step": each.step.name,
            "verdict": each.verdict,
            "number": each.number,
            "seconds": each.seconds,
            "limit": each.limit,
            "kernels": each.kernels,
            "told": "; ".join(each.told[:MOST_TOLD]),
        }
        for each in outcomes
    ]
    there = {each.step.name for each in outcomes}
    earlier = [row for row in read_csv(path) if row["step"] not in there] if path.exists() else []
    write_csv(path, [*earlier, *rows])
