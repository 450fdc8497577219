"""The number of each step that matters, in a few words, from the step's rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence

from .. import drop_path
from ..findings import is_compiled, times_as_fast
from ..harness import Row, quotient
from ..op_goals import case_of
from ..op_providers import EAGER, OURS, OURS_EAGER, OURS_NATIVE
from ..pairs import Exact

Answer = Callable[[list[Row]], str]
NOTHING = "nothing was found"


def right_of_tests(rows: list[Row]) -> str:
    """The number of passed tests, and the largest share of the error budget that a test used."""
    if not rows:
        return NOTHING
    failed = {row["test"] for row in rows if row["outcome"] == "failed"}  # may have two rows
    passed = [row for row in rows if row["outcome"] == "passed" and row["test"] not in failed]
    ran = len(passed) + len(failed)
    text = f"{len(passed)} of {ran} right"
    if skipped := sum(row["outcome"] == "skipped" for row in rows):
        text += f", {skipped} skipped"
    used = [float(row["budget_used"]) for row in passed if row["budget_used"]]
    return f"{text}, {max(used):.0%} of the error budget at most" if used else text


def wrong_of_tests(rows: list[Row], must_run: bool = True) -> list[str]:
    """Returns a line for each failure. With `must_run` it is a failure too if every test was skipped."""
    if must_run and all(row["outcome"] == "skipped" for row in rows):
        return ["no test ran"]
    messages = {row["test"]: row["message"] for row in reversed(rows) if row["outcome"] == "failed"}
    return [f"{test}: {message}" for test, message in reversed(messages.items())]


def host_time(rows: list[Row]) -> str:
    """Time of forward and backward relative to eager's, for each of our backends, over all ops."""
    both = [row for row in rows if row["pass"] == "both"]
    return _of_each(both, (OURS, OURS_NATIVE), "ratio_rounds") or NOTHING


def op_speed(rows: list[Row]) -> str:
    """Time relative to eager's with the worst case, and the share of a copy's bandwidth."""
    name = next((n for n in (OURS, OURS_NATIVE, OURS_EAGER) if _measured(rows, n)), None)
    if name is None:
        return NOTHING
    mine = _measured(rows, name)
    shares = [row["copy_share"] for row in mine if row["copy_share"] is not None]
    ratios = [(row["to_eager"], case_of(row)) for row in mine if row["to_eager"] is not None]
    text = f"{name}: {_spread([ratio for ratio, _ in ratios])} of eager's time"
    if shares:
        text += f", {statistics.median(shares):.0%} of a copy"
    worst, where = max(ratios)
    return f"{text}; worst {where}" if worst > 1 else text


def against_compiled(rows: list[Row]) -> str:
    """The speed-up of our fastest backend over torch.compile."""
    faster = [of for _, of in times_as_fast(rows, is_compiled)]
    return f"{_spread(faster)} times as fast as compiled" if faster else NOTHING


def step_time(rows: list[Row]) -> str:
    """Time of a step of the exact scheme relative to plain training's, and of drop-path alone relative to timm's."""
    found = []
    for row in rows:
        if row["provider"] == Exact.name and row["ratio_rounds"] is not None:
            found.append(f"{row['model']} {row['mode']} {row['ratio_rounds']:.2f}")
    text = f"of plain: {', '.join(found)}" if found else ""
    for row in rows:
        if row["provider"] == drop_path.Ours.name and row["ratio_rounds"] is not None:
            of_model = {r["provider"]: r for r in rows if (r["work"], r["model"]) == (row["work"], row["model"])}
            masked = of_model[drop_path.OwnMasks.name]["ratio_rounds"]
            text += f"; drop-path {row['model']} {quotient(row['ratio_rounds'], masked):.2f} of timm's"
    return text.removeprefix("; ") or NOTHING


def peak_memory(rows: list[Row]) -> str:
    """The mean peak of the exact scheme's iterations relative to a plain step's."""
    peaks = [
        f"{row['model']} {row['mode']} {row['iteration']} {row['peak_ratio']:.2f}"
        for row in rows
        if row["provider"] == Exact.name and row["peak_ratio"] is not None
    ]
    return f"of plain: {', '.join(peaks)}" if peaks else NOTHING


def _measured(rows: list[Row], provider: str) -> list[Row]:
    return [row for row in rows if row["provider"] == provider and not row["unavailable"]]


def _of_each(rows: list[Row], providers: Iterable[str], key: str) -> str:
    found = {name: [row[key] for row in _measured(rows, name) if row[key] is not None] for name in providers}
    return "; ".join(f"{name} {_spread(values)} of {EAGER}" for name, values in found.items() if values)


def _spread(values: Sequence[float]) -> str:
    """Formats the median and the range."""
    if not values:
        return "–"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
