"""Axes over the depth of a model. matplotlib is imported only when needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

MOST_LABELS = 20
"""More labels can't be read on one axis."""


def axes_or_new(ax: Axes | None) -> Axes:
    """`ax`, or the axes of a new pyplot figure."""
    if ax is not None:
        return ax
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained")[1]


def label_layers(ax: Axes, x: Sequence[str], y: Sequence[str] | None = None) -> None:
    """Labels the layers, at 0, 1, 2 … along x and, where given, along y. At most `MOST_LABELS` are labelled."""
    ax.set_xticks(**_ticks(x))
    ax.tick_params(axis="x", rotation=90)
    if y is not None:
        ax.set_yticks(**_ticks(y))


def _ticks(labels: Sequence[str]) -> dict[str, Any]:
    step = math.ceil(len(labels) / MOST_LABELS)
    return {"ticks": range(0, len(labels), step), "labels": labels[::step]}
