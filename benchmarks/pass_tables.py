"""Tables of ops for `ops`, `overhead` and `traffic`: one for each setting, with its passes below each other."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table

from .command import shown
from .harness import Row
from .op_goals import setting_of

Columns = dict[str, tuple[str, str]]
"""Heading → key of a row, and the format of its value."""


def pass_tables(rows: list[Row], columns: Columns, labels: Sequence[str] = ("provider",)) -> Iterator[Table]:
    """Yields tables of the measured rows. `labels` are keys of the text columns."""
    for setting, group in itertools.groupby(rows, setting_of):
        table = Table(title=f"[bold]{setting}[/bold]", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name, width in zip(("pass", *labels), (8, 22, 7), strict=False):
            table.add_column(name, no_wrap=True, min_width=width)
        for name in columns:
            table.add_column(name, justify="right", no_wrap=True)
        for direction, providers in itertools.groupby(group, lambda row: row["pass"]):
            for row in providers:
                if not row["unavailable"]:
                    cells = (shown(row[key], spec) for key, spec in columns.values())
                    table.add_row(direction, *(row[key] for key in labels), *cells)
                    direction = ""
        yield table
