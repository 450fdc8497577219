"""Tables for terminals. rich draws them, if installed."""

from __future__ import annotations

import io
from collections.abc import Sequence


def table(header: tuple[str, ...], cells: Sequence[tuple[str, ...]]) -> list[str]:
    """The lines of a table; no lines without rows."""
    if not cells:
        return []
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
        return ["  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, *cells)]
    drawn = Table(*header)
    for row in cells:
        drawn.add_row(*row)
    text = io.StringIO()
    Console(file=text, width=160, force_jupyter=False).print(drawn)  # a notebook would display it here and now
    return [text.getvalue().rstrip("\n")]
