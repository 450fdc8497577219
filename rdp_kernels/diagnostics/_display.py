"""Axes over the depth of a model, and progress bars. matplotlib and rich are imported only when needed."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

T = TypeVar("T")

MOST_LABELS = 20
"""An axis with more labels can't be read."""


def axes_or_new(ax: Axes | None) -> Axes:
    """Returns `ax`, or the axes of a new pyplot figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def label_layers(ax: Axes, x: Sequence[str], y: Sequence[str] | None = None) -> None:
    """Labels the layers, at 0, 1, 2 … along x and, if given, along y. It draws at most `MOST_LABELS` labels."""
    for axis, labels in ((ax.xaxis, x), (ax.yaxis, y)):
        if labels is not None:
            step = math.ceil(len(labels) / MOST_LABELS)
            axis.set_ticks(range(0, len(labels), step), labels[::step])
    ax.tick_params(axis="x", rotation=90)


def track(items: Iterable[T], description: str, progress: bool | None) -> Iterator[T]:
    """Yields `items` and draws a bar on stderr. With `progress=None` it draws only if stderr is a terminal."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        if progress:
            raise ModuleNotFoundError("progress=True needs rich, which is not installed") from None
        yield from items
        return
    yield from rich_track(items, description, console=Console(stderr=True), transient=True)
