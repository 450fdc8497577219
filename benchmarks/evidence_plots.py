"""Figures of docs/evidence.md, from files with a row for each seed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from examples.intervals import Estimate

from .plot_style import COLOURS, MARKERS, NothingToPlot, Rows, complete, figure_of, legend, styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REMOVED = {
    "accuracy": "the whole network",
    "accuracy_without_1": "1 path removed",
    "accuracy_without_quarter": "8 removed",
}


@styled
def spiral_accuracy(rows: Rows) -> Figure:
    """Accuracy of every method on the spiral's base setting, whole and with paths removed. Each dot is a seed."""
    rows = [row for row in complete(rows, "study", "method", *REMOVED) if row["study"] == "base"]
    if not rows:
        raise NothingToPlot("no row is of the base setting")
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, axes = figure_of(rows, "Two spirals: test accuracy, a dot for each seed, a bar for the mean", 3, (10, 3.2))
    for axis, (column, title) in zip(axes, REMOVED.items(), strict=True):
        for number, method in enumerate(methods):
            values = [100 * row[column] for row in rows if row["method"] == method]
            axis.plot(values, [number] * len(values), "o", color=COLOURS[number], markersize=4, alpha=0.5)
            axis.plot(sum(values) / len(values), number, "|", color="black", markersize=14)
        axis.set(title=title, xlabel="%")
        axis.set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    return figure


@styled
def language_curves(rows: Rows) -> Figure:
    """Validation loss during training by step and by FLOP: means over seeds, with an interval at the last one."""
    rows = complete(rows, "method", "seed", "step", "flops", "validation_loss", "bytes", "equal")
    rows = [row for row in rows if row["equal"] == "steps"]
    if not rows:
        raise NothingToPlot("no row is of a run at equal steps")
    texts = sorted({row["bytes"] for row in rows}, reverse=True)
    figure, axes = figure_of(rows, "Bits per byte of held-out source files", 2 * len(texts), (12, 3.4))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    panels = iter(axes)
    for size in texts:
        for over, label in (("step", "optimizer step"), ("flops", "needed FLOPs")):
            axis = next(panels)
            for number, method in enumerate(methods):
                shown = [row for row in rows if row["method"] == method and row["bytes"] == size]
                if not shown:
                    continue
                curve = _curve(shown, over)
                x, y = ([point[place] for point in curve] for place in (0, 1))
                axis.plot(
                    x, [estimate.mean for estimate in y], color=COLOURS[number], marker=MARKERS[number], markersize=3
                )
                axis.errorbar(x[-1], y[-1].mean, y[-1].half_width or 0, color=COLOURS[number], capsize=2)
            axis.set(title=f"{size / 1e3:,.0f} kB of text", xlabel=label)
    axes[0].set_ylabel("bits per byte")
    legend(figure, [(method, COLOURS[n], MARKERS[n]) for n, method in enumerate(methods)])
    return figure


def _curve(rows: list[dict[str, Any]], over: str) -> list[tuple[float, Estimate]]:
    """Means of x and of the loss over the seeds, for each evaluation but that of the untrained network."""
    seeds: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        seeds.setdefault(row["seed"], []).append(row)
    evaluations = zip(*(sorted(points, key=lambda row: row["step"]) for points in seeds.values()), strict=True)
    return [
        (sum(row[over] for row in same) / len(same), Estimate.of([row["validation_loss"] for row in same]))
        for same in evaluations
        if same[0]["step"] > 0
    ]
