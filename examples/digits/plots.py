"""The report's plots as PNG images. Methods differ in line style, marker and hatch, not only in colour."""

from __future__ import annotations

import io
import math
import statistics

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from examples.digits.results import Summary
from examples.intervals import Estimate
from examples.methods import DROP_PATH, DROP_THEN_FULL, EXACT, FROZEN, PLAIN, RANDOM

matplotlib.use("Agg")

# Okabe and Ito's colours for colour-blind readers, each with a line style and a marker.
STYLES = {
    PLAIN: {"color": "#000000", "linestyle": "-", "marker": "o"},
    DROP_PATH: {"color": "#0072B2", "linestyle": "--", "marker": "s"},
    EXACT: {"color": "#D55E00", "linestyle": "-", "marker": "^"},
    FROZEN: {"color": "#009E73", "linestyle": "-.", "marker": "v"},
    DROP_THEN_FULL: {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
    RANDOM: {"color": "#8C6D00", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "X"},
}
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}
BARS = {"needed": ("#BBBBBB", ""), "counted": ("#56B4E9", "//"), "measured": ("#E69F00", "..")}


def draw_all(summaries: dict[str, Summary], times: dict[str, float], test_set: str) -> dict[str, bytes]:
    """Returns PNG files by name."""
    return {
        "accuracy.png": _accuracy(summaries, test_set),
        "loss.png": _loss(summaries),
        "cost.png": _cost(summaries, times),
        "removed.png": _removed(summaries, test_set),
        "similarity.png": _similarity(summaries),
    }


def _accuracy(summaries: dict[str, Summary], test_set: str) -> bytes:
    figure, axes = _figure(f"Accuracy on the {test_set} while training")
    _curves(axes, summaries, "accuracy", 100)
    last, width = axes.get_xlim()[1], axes.get_xlim()[1] - axes.get_xlim()[0]
    for place, (method, summary) in enumerate(summaries.items()):
        _interval(axes, last + 0.015 * width * (place + 0.5), summary.accuracy, method)
    if _seeds(summaries) > 1:
        axes.set_xlabel(
            f"optimizer step; mean of {_seeds(summaries)} seeds\nbars at the right: 95 % interval at the end"
        )
    # Late differences are small compared with the rise from chance.
    lowest = min(100 * point["accuracy"] for s in summaries.values() for curve in s.curves for point in curve[-7:])
    axes.set_ylim(max(0, lowest - 5), 101)
    axes.set_ylabel(f"accuracy on the {test_set} (%)")
    _legend(axes)
    return _png(figure)


def _loss(summaries: dict[str, Summary]) -> bytes:
    figure, axes = _figure("Training loss, mean over the steps since the point before")
    _curves(axes, summaries, "loss", 1)
    axes.set_ylabel("cross-entropy (nats, log scale)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(axes)
    return _png(figure)


def _curves(axes: Axes, summaries: dict[str, Summary], key: str, factor: float) -> None:
    for method, summary in summaries.items():
        steps = [point["step"] for point in summary.curves[0]]
        means = [
            factor * statistics.fmean(point[key] for point in seeds) for seeds in zip(*summary.curves, strict=True)
        ]
        axes.plot(steps, means, label=method, markersize=6, linewidth=1.6, **STYLES[method])
    axes.set_xlabel(f"optimizer step{_mean_note(summaries)}")


def _interval(axes: Axes, x: float, estimate: Estimate, method: str) -> None:
    if estimate.half_width is not None:
        mean, half = 100 * estimate.mean, 100 * estimate.half_width
        reach = [[min(half, mean)], [min(half, 100 - mean)]]  # an accuracy is in [0, 100]
        style = {"color": STYLES[method]["color"], "marker": STYLES[method]["marker"]}
        axes.errorbar(x, mean, reach, capsize=3, markersize=5, linewidth=1.2, **style)


def _cost(summaries: dict[str, Summary], times: dict[str, float]) -> bytes:
    figure, axes = _figure("Cost of an optimizer step, plain training = 1")
    plain = summaries[PLAIN]
    values = {
        "needed": [s.needed_flops / plain.needed_flops for s in summaries.values()],
        "counted": [s.counted_flops / plain.counted_flops for s in summaries.values()],
        "measured": [times[method] / times[PLAIN] for method in summaries],
    }
    labels = {
        "needed": "FLOPs needed",
        "counted": f"FLOPs counted (first {plain.counted_steps} steps)",
        "measured": "time measured (median)",
    }
    for offset, (kind, heights) in zip((-0.27, 0.0, 0.27), values.items(), strict=True):
        colour, hatch = BARS[kind]
        places = [i + offset for i in range(len(summaries))]
        bars = axes.bar(places, heights, 0.25, color=colour, hatch=hatch, edgecolor="black", label=labels[kind])
        axes.bar_label(bars, fmt="%.2f", fontsize=8, label_type="center", bbox=LABEL_BOX)
    needed_then = [s.needed_flops_counted_steps / plain.needed_flops_counted_steps for s in summaries.values()]
    axes.plot(range(len(needed_then)), needed_then, "kD", markersize=4, label="FLOPs needed by those steps")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_xticks(range(len(summaries)), [method.replace(" ", "\n", 1) for method in summaries])
    axes.set_ylabel("ratio to a step of plain training")
    axes.set_ylim(0, 1.3 * max(height for heights in values.values() for height in heights))
    axes.legend(loc="upper right", ncols=2, fontsize=9)
    return _png(figure)


def _removed(summaries: dict[str, Summary], test_set: str) -> bytes:
    figure, axes = _figure("What removing random branches of the trained network does")
    counts = [0, *next(iter(summaries.values())).removed]
    for place, (method, summary) in enumerate(summaries.items()):
        estimates = [Estimate.of(values) for values in (summary.accuracies, *summary.removed.values())]
        places = [count + 0.05 * (place - (len(summaries) - 1) / 2) for count in counts]  # side by side
        means = [100 * estimate.mean for estimate in estimates]
        axes.plot(places, means, label=method, markersize=6, linewidth=1.6, **STYLES[method])
        for x, estimate in zip(places, estimates, strict=True):
            _interval(axes, x, estimate, method)
    paths = len(next(iter(summaries.values())).similarity) - 1
    axes.set_xticks(counts)
    note = ", bars: 95 % interval" if _seeds(summaries) > 1 else ""
    axes.set_xlabel(f"branches removed at random, of {paths}{_mean_note(summaries)}{note}")
    axes.set_ylabel(f"accuracy on the {test_set} (%)")
    axes.set_ylim(top=101)
    _legend(axes)
    return _png(figure)


def _similarity(summaries: dict[str, Summary]) -> bytes:
    figure = Figure(figsize=(10, 7), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    lowest = min(value for summary in summaries.values() for row in summary.similarity for value in row)
    for axes, (method, summary) in zip(grid.flat, summaries.items(), strict=True):
        image = axes.imshow(
            summary.similarity, vmin=math.floor(10 * lowest) / 10, vmax=1, cmap="cividis", origin="lower"
        )
        last = summary.similarity[-1]
        axes.set_title(
            f"{method}\nmean {statistics.fmean(map(statistics.fmean, summary.similarity)):.2f}, "
            f"first to last {last[0]:.2f}",
            fontsize=10,
        )
    for axes in grid[-1]:
        axes.set_xlabel("after path (0 = embedding)")
    for axes in grid[:, 0]:
        axes.set_ylabel("after path")
    figure.colorbar(image, ax=grid, label="linear CKA (1 = same up to rotation and scale)", shrink=0.8)
    figure.suptitle("Similarity of the residual's states over depth, mean over the seeds")
    return _png(figure)


def _seeds(summaries: dict[str, Summary]) -> int:
    return len(next(iter(summaries.values())).accuracies)


def _mean_note(summaries: dict[str, Summary]) -> str:
    return f"; mean of {_seeds(summaries)} seeds" if _seeds(summaries) > 1 else "; one seed"


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=4)


def _figure(title: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
