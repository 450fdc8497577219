"""The goals of the kernels on a GPU and on CPUs, and a check of rows against them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from .harness import Row, quotient, scaled
from .op_dense import ResidualAdd, ResidualAddNorm, ResidualAddRMSNorm
from .op_providers import EAGER, OURS, OURS_NATIVE
from .op_rows import ResidualAddNormRows

ELEMENTWISE, NORM_BACKWARD, OF_BYTE_RATIO = 0.92, 0.80, 0.92
LARGE_GB = 0.064
CPU_FORWARD = {0.8: 2.2, 0.5: 2.5}
CPU_BOTH = 2.0
CPU_COMPILED = {1.0: 0.95, 0.5: 1.2}
"""Share of kept samples → the goal for the speed-up over eager, and over the compiled formula."""
NORMS = (ResidualAddNorm.name, ResidualAddRMSNorm.name, ResidualAddNormRows.name)


class Goal(NamedTuple):
    """One goal at one row. Without a time of the device alone `measured` is None and the goal isn't met."""

    goal: str
    where: str
    measured: float | None
    met: bool


def goals(rows: Iterable[Row]) -> list[Goal]:
    """Returns every goal at every row of ours that it applies to."""
    return [goal for row, others in _with_others(rows) for goal in _goals_of(row, others)]


def _goals_of(row: Row, others: list[Row]) -> Iterator[Goal]:
    share = quotient(scaled(row["needed_gb"], 1e3 / row["ceiling_gbs"]), row["device_ms"])
    direction, is_norm = row["pass"], row["op"] in NORMS
    if is_norm and direction == "backward":
        yield _at_least(NORM_BACKWARD, "of copy bandwidth in the backward of norms", row, share)
    if not is_norm and direction != "both" and row["needed_gb"] > LARGE_GB:
        yield _at_least(ELEMENTWISE, "of copy bandwidth in elementwise passes over 64 MB", row, share)
    for other in others:
        faster = quotient(other["device_ms"], row["device_ms"])
        bytes_ratio = quotient(other["moved_gb"], row["needed_gb"])
        if bytes_ratio and not other["provider"].startswith("ours"):
            of_ratio = quotient(faster, bytes_ratio)
            comparator = "eager" if other["provider"] == EAGER else "the compiled formula"
            yield _at_least(OF_BYTE_RATIO, f"of the ratio of bytes to {comparator}", row, of_ratio)
        if other["provider"] == EAGER:
            slower = quotient(row["device_ms"], other["device_ms"])
            yield Goal("device time at most eager's", case_of(row), slower, slower is not None and slower <= 1)


def cpu_goals(rows: Iterable[Row]) -> list[Goal]:
    """Returns the goals of the dense add of images' tokens with γ and row_scale, by the fastest turns. One goal is that
    bfloat16 isn't slower than float32."""
    rows = list(rows)
    return [goal for row, others in _with_others(rows, OURS_NATIVE) for goal in _cpu_goals_of(row, others, rows)]


def _cpu_goals_of(row: Row, others: list[Row], rows: list[Row]) -> Iterator[Goal]:
    direction = row["pass"]
    batch, *sample = map(int, row["shape"].split("x"))
    if row["op"] != ResidualAdd.name or not row["gamma"] or len(sample) < 2:
        return
    share = min((1.0, 0.8, 0.5), key=lambda share: abs(share - (row["kept"] or batch) / batch))
    if row["dtype"] == "bfloat16":
        for wide in rows:
            same = all(wide[key] == row[key] for key in ("op", "shape", "kept", "pass", "provider"))
            if same and wide["dtype"] == "float32":
                faster = quotient(wide["min_ms"], row["min_ms"])
                yield _at_least(1.0, "times as fast in bfloat16 as in float32", row, faster)
        return
    for other in others:
        faster = quotient(other["min_ms"], row["min_ms"])
        if other["provider"] == EAGER and direction == "forward" and share in CPU_FORWARD:
            yield _at_least(CPU_FORWARD[share], f"times as fast as eager, forward, {share:.0%} kept", row, faster)
        if other["provider"] == EAGER and direction == "both" and share < 1:
            yield _at_least(CPU_BOTH, "times as fast as eager, forward and backward", row, faster)
        if other["provider"].startswith("torch.compile") and direction == "forward" and share in CPU_COMPILED:
            least = CPU_COMPILED[share]
            yield _at_least(least, f"times as fast as the compiled formula, {share:.0%} kept", row, faster)


def _at_least(least: float, what: str, row: Row, measured: float | None) -> Goal:
    return Goal(f"at least {least:.2f} {what}", case_of(row), measured, measured is not None and measured >= least)


def _with_others(rows: Iterable[Row], provider: str = OURS) -> Iterator[tuple[Row, list[Row]]]:
    """Yields each measured row of ours with the other measured rows of its case."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        if not row["unavailable"]:
            cases.setdefault(case_of(row), []).append(row)
    for case in cases.values():
        ours = [row for row in case if row["provider"] == provider]
        yield from ((row, [other for other in case if other is not row]) for row in ours)


def case_of(row: Row) -> str:
    return f"{setting_of(row)}: {row['pass']}"


def setting_of(row: Row) -> str:
    batch = row["shape"].partition("x")[0]
    kept = "no mask" if row["kept"] is None else f"{row['kept']} of {batch}"
    layout = "" if row["layout"] == "..C" else f" {row['layout']}"
    gamma = ", γ" if row["gamma"] else ""
    return f"{row['op']} {row['shape']}{layout} {row['dtype']}, {kept}{gamma}"
