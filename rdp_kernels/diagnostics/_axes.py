"""Where plots go; matplotlib is imported on use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def axes_of(ax: Any, size: tuple[float, float] = (8, 4.5)) -> Any:
    """`ax`, or the axes of a new figure (`ax.figure.savefig(...)`) that no window shows."""
    if ax is not None:
        return ax
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ModuleNotFoundError("plots need matplotlib, which is not installed") from error
    return Figure(figsize=size, layout="constrained").subplots()


def label_paths(axis: Any, names: Sequence[str]) -> None:
    """Ticks along an axis that has a place for each path: names where there is room, else their numbers."""
    if len(names) <= 32:
        axis.set_ticks(range(len(names)), names, fontsize=8)
        axis.set_tick_params(rotation=90 if axis.axis_name == "x" else 0)
    axis.set_label_text("path")
