"""Rows of studies with a row for each seed: grouped by setting, and compared seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

from examples.intervals import Estimate

Row = dict[str, str]


def grouped(rows: Sequence[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    """Groups rows by these columns, in the order of the file. Each group is sorted by seed."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return {labels: sorted(group, key=lambda row: int(row["seed"])) for labels, group in groups.items()}


def over_seeds(rows: Sequence[Row], column: str) -> Estimate:
    return Estimate.of([float(row[column]) for row in rows])


def difference(rows: Sequence[Row], others: Sequence[Row], column: str) -> Estimate:
    """Estimates `rows` − `others`, seed by seed. Raises `ValueError` if their seeds differ."""
    seeds, their = ([row["seed"] for row in side] for side in (rows, others))
    if seeds != their:
        raise ValueError(f"{column}: seeds {seeds} can't be compared to {their}")
    return Estimate.of_difference(*([float(row[column]) for row in side] for side in (rows, others)))
