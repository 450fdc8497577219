"""The study's figures as PNG images. Kinds differ in line style and marker, not only in colour."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from examples.intervals import Estimate
from examples.skips.networks import ADDITION, CONCATENATION, KINDS, PLAIN, SCALED, ZERO
from examples.skips.results import LEARNED, has_learned
from examples.skips.study import Measured

matplotlib.use("Agg")

# Okabe and Ito's colours for colour-blind readers.
STYLES = {
    PLAIN: {"color": "#000000", "linestyle": "-", "marker": "o"},
    ADDITION: {"color": "#D55E00", "linestyle": "-", "marker": "^"},
    CONCATENATION: {"color": "#0072B2", "linestyle": "--", "marker": "s"},
    SCALED: {"color": "#009E73", "linestyle": "-.", "marker": "v"},
    ZERO: {"color": "#CC79A7", "linestyle": ":", "marker": "D"},
}

LEARNERS = f",\nof networks with accuracy above {LEARNED:.0%}"


def draw_all(studied: list[Measured]) -> dict[str, bytes]:
    """Returns PNG files by name."""
    figures = {
        "gradients_weights.png": _gradients(studied, "weights", "‖∂L/∂W‖"),
        "gradients_states.png": _gradients(studied, "states", "‖∂L/∂x‖"),
        "accuracy.png": _accuracy(studied),
        "lesions.png": _lesions(studied),
        "effective_depth.png": _effective_depth(studied),
        "alikeness.png": _alikeness(studied),
    }
    return {name: _png(figure) for name, figure in figures.items()}


def _gradients(studied: list[Measured], of: str, label: str) -> Figure:
    """Draws a row for each measured step, a column for each kind, a line for each depth."""
    kinds, steps = _kinds(studied), sorted(studied[0].gradients)
    size = (2.6 * len(kinds) + 1.5, 2.1 * len(steps) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(steps), len(kinds), sharex=True, sharey=True, squeeze=False)
    depths = sorted({measured.depth for measured in studied})
    colours = matplotlib.colormaps["viridis"].resampled(len(depths) + 1)  # the last colour, yellow, is hard to see
    for measured in studied:
        for step, row in zip(steps, grid, strict=True):
            axes, norms = row[kinds.index(measured.kind)], getattr(measured.gradients[step], of)
            estimates = [Estimate.of(layer.tolist()) for layer in norms]
            places = [(layer + 0.5) / measured.depth for layer in range(measured.depth)]
            place = depths.index(measured.depth)
            style = {"color": colours(place), "linewidth": 1 + 0.3 * place, "label": str(measured.depth)}
            axes.plot(places, [10**estimate.mean for estimate in estimates], **style)
            low, high = ([10 ** (e.mean + sign * (e.half_width or 0)) for e in estimates] for sign in (-1, 1))
            axes.fill_between(places, low, high, color=colours(place), alpha=0.25, linewidth=0)
    for step, row in zip(steps, grid, strict=True):
        row[0].set_ylabel(f"{label}\nafter {step} steps" if step else f"{label}\nat the start")
        for axes in row:
            axes.set_yscale("log")
            axes.grid(alpha=0.3)
    for kind, axes in zip(kinds, grid[0], strict=True):
        axes.set_title(kind, fontsize=10)
    for axes in grid[-1]:
        axes.set_xlabel("place in the stack")
        axes.set_xticks([0, 0.5, 1], ["first", "middle", "last"])
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, title="layers", loc="outside right center")
    figure.suptitle(f"Gradient norms {label} of the layers; geometric mean over the seeds, band: 95 % interval")
    return figure


def _accuracy(studied: list[Measured]) -> Figure:
    figure, (axes,) = _figure("Errors of the trained networks", 1)
    _over_depth(axes, studied, lambda m: [100 * (1 - value) for value in m.metrics["accuracy"]])
    axes.set_ylabel("test images mistaken (%, log scale)")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    _legend(figure, axes)
    return figure


def _lesions(studied: list[Measured]) -> Figure:
    figure, grid = _figure("What removing random layers of trained networks costs, as a share of their accuracy", 2)
    studied = [measured for measured in studied if has_learned(measured)]
    for axes, part, title in zip(grid, ("one", "quarter"), ("one layer removed", "a quarter removed"), strict=True):
        _over_depth(axes, studied, lambda m, part=part: _lost(m, f"accuracy_without_{part}"))  # type: ignore[misc]
        axes.set_title(f"{title}{LEARNERS}")
        axes.set_yscale("symlog", linthresh=1e-3)  # linear near 0, as some networks lose nothing
        axes.axhline(0, color="grey", linewidth=0.8)
        axes.set_ylim(-1e-3, 1.5)
    grid[0].set_ylabel("share of accuracy lost (log scale from 0.001)")
    _legend(figure, grid[0])
    return figure


def _lost(measured: Measured, metric: str) -> list[float]:
    pairs = zip(measured.metrics[metric], measured.metrics["accuracy"], strict=True)
    return [1 - part / whole for part, whole in pairs]


def _effective_depth(studied: list[Measured]) -> Figure:
    figure, grid = _figure(
        "Effective depth: (Σe)² / Σe² of the losses e that removing each layer adds; path lengths", 2
    )
    studied = [measured for measured in studied if has_learned(measured)]
    _over_depth(grid[0], studied, lambda m: m.metrics["effective_depth"])
    depths = sorted({measured.depth for measured in studied})
    grid[0].plot(depths, depths, color="grey", linewidth=0.8, label="all layers")
    grid[0].set_yscale("log", base=2)
    grid[0].yaxis.set_major_formatter("{x:g}")
    grid[0].set_title(f"layers that matter{LEARNERS}")
    adding = [measured for measured in studied if KINDS[measured.kind].adds]
    _over_depth(grid[1], adding, lambda m: m.metrics["path_length"])
    grid[1].set_title(f"mean length of paths{LEARNERS}")
    grid[1].set_ylabel("branches that the gradient comes through")
    grid[1].set_ylim(bottom=0)
    _legend(figure, grid[0])
    return figure


def _alikeness(studied: list[Measured]) -> Figure:
    figure, (axes,) = _figure("How alike different images look to the head before training", 1)
    _over_depth(axes, studied, lambda m: m.metrics["alikeness_0"])
    axes.set_ylabel("mean cosine of final states (1 = all the same)")
    axes.set_ylim(top=1.02)
    _legend(figure, axes)
    return figure


def _over_depth(axes: Axes, studied: list[Measured], values: Callable[[Measured], Sequence[float]]) -> None:
    kinds = _kinds(studied)
    for place, kind in enumerate(kinds):
        own = sorted((m for m in studied if m.kind == kind), key=lambda m: m.depth)
        estimates = [Estimate.of(values(measured)) for measured in own]
        depths = [m.depth * 1.04 ** (place - (len(kinds) - 1) / 2) for m in own]  # side by side
        reach = [estimate.half_width or 0 for estimate in estimates]
        means = [estimate.mean for estimate in estimates]
        axes.errorbar(depths, means, reach, label=kind, capsize=3, markersize=5, linewidth=1.5, **STYLES[kind])
    depths = sorted({measured.depth for measured in studied})
    axes.set_xscale("log", base=2)
    axes.set_xticks(depths, [str(depth) for depth in depths])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("layers; mean over the seeds, bars: 95 % interval")


def _kinds(studied: list[Measured]) -> list[str]:
    return [kind for kind in KINDS if any(measured.kind == kind for measured in studied)]


def _figure(title: str, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(3 + 4.5 * columns, 4.2), layout="constrained")
    grid = list(figure.subplots(1, columns, squeeze=False)[0])
    figure.suptitle(title)
    for axes in grid:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, grid


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", handlelength=4)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
