"""Shared by all figures: rows as numbers, style, and files. Equal rows give files with equal bytes. matplotlib is
imported on use, and its global state isn't changed."""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Rows = list[dict[str, Any]]
SUFFIXES = (".svg", ".png", ".pdf")
NO_DATE = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
FACTS = ("device", "torch", "triton", "python", "commit", "date")
"""Columns that stay text, even if they look like numbers."""
# Okabe and Ito's colours for colour-blind readers, without the yellow
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#555555", "#8C6D00")
MARKERS = "os^vDPX<"
STYLE = {
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.titlesize": 10,
    "font.size": 9,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "rdp_kernels",
}


class NothingToPlot(ValueError):
    """The rows lack the values that a figure shows."""


# Rows


def complete(rows: Rows, *columns: str) -> Rows:
    """Returns the rows with a value in all of `columns`. Text of a CSV is converted to numbers. Raises `NothingToPlot`
    if there is no such row or column."""
    if not rows:
        raise NothingToPlot("there are no rows")
    missing = [column for column in (*columns, "threads", *FACTS) if column not in rows[0]]
    if missing:
        raise NothingToPlot(f"the rows have no column {', '.join(missing)}")
    kept = [{key: value if key in FACTS else number(value) for key, value in row.items()} for row in rows]
    kept = [row for row in kept if all(row[column] is not None for column in columns)]
    if not kept:
        raise NothingToPlot(f"no row has {', '.join(columns)}")
    return kept


def number(value: Any) -> Any:
    """Returns the value whose CSV text is `value`."""
    if not isinstance(value, str):
        return value
    if value in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[value]
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(value)
    return value


# Looks


def styled(draw: Callable[[Rows], Figure]) -> Callable[[Rows], Figure]:
    @functools.wraps(draw)
    def in_style(rows: Rows) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(rows)

    return in_style


def figure_of(
    rows: Rows, title: str, panels: int, size: tuple[float, float], stacked: bool = False
) -> tuple[Figure, list[Axes]]:
    """Returns a figure with panels beside each other (one y axis) or below each other (one x axis). The title names the
    machine and the versions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    row = rows[0]
    versions = [f"{name} {row[name]}" for name in ("torch", "triton") if row[name]]
    taken = [row["device"], f"{row['threads']} threads", *versions, row["commit"], row["date"]]
    figure.suptitle(f"{title}\n{', '.join(filter(None, taken))}")
    grid = (panels, 1) if stacked else (1, panels)
    return figure, list(figure.subplots(*grid, sharex=stacked, sharey=True, squeeze=False).flat)


def log_axis(axis: Axes, which: str, steps: tuple[float, ...] = (1, 2, 5)) -> None:
    """Makes axis `"x"` or `"y"` logarithmic within the current limits. Ticks are `steps` times powers of ten."""
    from matplotlib.ticker import NullLocator

    axis.set(**{f"{which}scale": "log"})
    low, high = getattr(axis, f"get_{which}lim")()
    ticks = sorted(step * 10.0**power for step in steps for power in range(-6, 10))
    ticks = [tick for tick in ticks if low <= tick <= high]
    getattr(axis, f"set_{which}ticks")(ticks, [f"{tick:g}" for tick in ticks])
    getattr(axis, f"{which}axis").set_minor_locator(NullLocator())


def legend(figure: Figure, entries: list[tuple[str, str, str]]) -> None:
    """Adds a legend below the figure. Entries are (label, colour, marker)."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=c, marker=m, linestyle="", markersize=7, label=label) for label, c, m in entries]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), handletextpad=0.1)


# Files


def plottable(text: str) -> Path:
    """An argparse type: a path that can be written, with a supported suffix."""
    if Path(text).suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"must end in {', '.join(SUFFIXES)}, got {text!r}")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("needs matplotlib, which is not installed")
    return writable(text)


def save(figure: Figure, path: Path) -> None:
    """Saves a figure in the format of the suffix of `path`."""
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(drawn, format=path.suffix[1:], dpi=150, metadata=NO_DATE[path.suffix])
    path.write_bytes(drawn.getvalue())


def read_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
