"""Figures of rows. The rows are measured ones, or read from a CSV, where every value is text.

save(step_cost(rows), Path("step.svg"))
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .drop_path import Ours, OwnMasks, Subset
from .evidence_plots import language_curves, spiral_accuracy
from .op_goals import setting_of
from .op_providers import OURS, OURS_NATIVE
from .pairs import BranchFrozen, Exact, Naive
from .plot_style import (
    COLOURS,
    MARKERS,
    NothingToPlot,
    Rows,
    complete,
    figure_of,
    legend,
    log_axis,
    read_rows,
    save,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TINY = "tiny"  # the network of nothing but paths
PASSES = {"forward": "forward", "backward": "backward", "both": "forward + backward"}


@styled
def ratio_bars(rows: Rows) -> Figure:
    """Figure of `ops`: the speed-up of ours over each other provider, by the median of the turns' ratios (on a GPU by
    the device's times). A mark shows the ratio of the fastest turns."""
    rows = complete(rows, "op", "shape", "pass", "provider", "to_eager", "ratio_min")
    cases: dict[tuple[str, str], dict[str, dict]] = {}
    for row in rows:
        cases.setdefault((row["pass"], setting_of(row)), {})[row["provider"]] = row
    bars = []  # (pass, setting, the other's name, ours, the other's)
    for (direction, setting), providers in cases.items():
        ours = providers.get(OURS) or providers.get(OURS_NATIVE)
        others = [row for name, row in providers.items() if ours and not name.startswith("ours")]
        bars += [(direction, setting, _short(row["provider"]), ours, row) for row in others]
    if not bars:
        raise NothingToPlot("no row of ours has one of another provider beside it")
    settings, others = (list(dict.fromkeys(bar[place] for bar in bars)) for place in (1, 2))
    passes = [direction for direction in ("forward", "both") if any(bar[0] == direction for bar in bars)]
    passes = passes or ["backward"]
    width = 0.84 / len(others)
    size = (10, 1.4 + 0.12 * (len(others) + 1) * len(settings))
    figure, axes = figure_of(rows, "How many times as fast ours is", len(passes), size)
    for axis, direction in zip(axes, passes, strict=True):
        for _, setting, other, ours, row in (bar for bar in bars if bar[0] == direction):
            number = others.index(other)
            y, ratio = settings.index(setting) + (number + 0.5) * width - 0.42, row["to_eager"] / ours["to_eager"]
            axis.barh(y, ratio - 1, 0.9 * width, left=1, color=COLOURS[number])
            if ours.get("device_ms") is None:
                axis.plot(row["ratio_min"] / ours["ratio_min"], y, "|", color="black", markersize=5)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set(title=PASSES[direction], xlabel="their time / our time", xscale="log")
        axis.set_xlim(min(axis.get_xlim()[0], 0.8), max(axis.get_xlim()[1], 1.25))
        log_axis(axis, "x", (1, 1.5, 2, 3, 5))
        axis.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(settings)), settings, fontsize=7)
    axes[0].set_ylim(len(settings) - 0.5, -0.5)
    entries = [(f"{other} / ours", COLOURS[number], "s") for number, other in enumerate(others)]
    legend(figure, [*entries, ("by the fastest turns", "black", "|")])
    return figure


@styled
def roofline(rows: Rows) -> Figure:
    """Figure of the machine's ceilings and the rates reached. Rows of `step` show FLOP/s by FLOPs per byte. Rows of
    `ops`, which compute little, show bytes/s by bytes. Only needed FLOPs and bytes count."""
    return _step_roofline(rows) if rows and "needed_gflop" in rows[0] else _op_roofline(rows)


def _step_roofline(rows: Rows) -> Figure:
    rows = complete(rows, "needed_gflop", "needed_gb", "p50_ms", "ceiling_gflops", "ceiling_gbs", "model", "provider")
    rows = [row for row in rows if row.get("work", "scheme") == "scheme"]  # drop-path alone is one step, not a pair
    if not rows:
        raise NothingToPlot("no row of a pair of steps")
    figure, (axis,) = figure_of(rows, "Roofline of pairs of steps, of needed FLOPs and bytes", 1, (8, 5))
    providers, models = (list(dict.fromkeys(row[key] for row in rows)) for key in ("provider", "model"))
    for row in rows:
        axis.plot(
            row["needed_gflop"] / row["needed_gb"],
            row["needed_gflop"] / row["p50_ms"] * 1e3,
            MARKERS[models.index(row["model"]) % len(MARKERS)],
            color=COLOURS[providers.index(row["provider"]) % len(COLOURS)],
            markersize=5,
        )
    flops, bandwidth = (max(row[key] for row in rows) for key in ("ceiling_gflops", "ceiling_gbs"))
    knee = flops / bandwidth
    ends = min(knee / 4, axis.get_xlim()[0]), max(knee * 4, axis.get_xlim()[1])
    axis.plot([ends[0], knee, ends[1]], [ends[0] * bandwidth, flops, flops], color="black", linewidth=1)
    axis.annotate(f"matmul: {flops:.0f} GFLOP/s", (ends[1], flops), (0, 4), textcoords="offset points", ha="right")
    axis.annotate(f"copy: {bandwidth:.0f} GB/s", (ends[0], ends[0] * bandwidth), (6, -6), textcoords="offset points")
    axis.set(xlabel="needed FLOP per byte", ylabel="needed GFLOP/s reached")
    log_axis(axis, "x")
    log_axis(axis, "y")
    entries = [(provider, COLOURS[number % len(COLOURS)], "s") for number, provider in enumerate(providers)]
    legend(figure, entries + [(model, "black", MARKERS[number]) for number, model in enumerate(models)])
    return figure


def _op_roofline(rows: Rows) -> Figure:
    rows = complete(rows, "needed_gb", "gbs", "ceiling_gbs", "pass", "provider")
    passes = [direction for direction in PASSES if any(row["pass"] == direction for row in rows)]
    figure, axes = figure_of(rows, "Bandwidth of needed bytes", len(passes), (10, 4.2))
    providers = list(dict.fromkeys(_short(row["provider"]) for row in rows))
    ceiling = max(row["ceiling_gbs"] for row in rows)
    for axis, direction in zip(axes, passes, strict=True):
        for number, provider in enumerate(providers):
            those = [r for r in rows if r["pass"] == direction and _short(r["provider"]) == provider]
            axis.plot(
                [1e3 * row["needed_gb"] for row in those],
                [row["gbs"] for row in those],
                MARKERS[number % len(MARKERS)],
                color=COLOURS[number % len(COLOURS)],
                markersize=4,
            )
        axis.axhline(ceiling, color="black", linewidth=1)
        axis.set(title=PASSES[direction], xlabel="needed bytes, MB")
        log_axis(axis, "x")
    axes[0].set(ylabel="needed GB/s reached", ylim=(0, None))
    axes[0].annotate(f"copy: {ceiling:.0f} GB/s", (0.02, ceiling), (0, 3), ("axes fraction", "data"), "offset points")
    legend(figure, [(name, COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(providers)])
    return figure


@styled
def step_cost(rows: Rows) -> Figure:
    """Figure of `step`: needed FLOPs, counted FLOPs and time of a pair of iterations, relative to plain training. A
    mark shows the ratio of the fastest turns."""
    keys = ("needed_ratio", "counted_ratio", "ratio_rounds")
    rows = complete(rows, "model", "mode", "p", "provider", "ratio_min", "ratio_rounds")
    shown = {name: [row for row in rows if row["provider"] == name] for name in (Exact.name, BranchFrozen.name)}
    cases = list(dict.fromkeys(_case(row) for those in shown.values() for row in those))
    if not cases:
        raise NothingToPlot(f"no row of {Exact.name} or {BranchFrozen.name}")
    figure, axes = figure_of(rows, "Cost of a pair of steps, of plain training's", 2, _size(cases), stacked=True)
    for axis, (name, those) in zip(axes, shown.items(), strict=True):
        for row in those:
            for number, key in enumerate(keys):
                x = cases.index(_case(row)) + 0.27 * (number - 1)
                axis.bar(x, row.get(key) or 0, 0.25, color=COLOURS[number])  # the needs of some networks aren't known
            axis.plot(x, row["ratio_min"], "_", color="black", markersize=6)
        _ratio_axis(axis, cases, name)
    entries = [(what, COLOURS[n], "s") for n, what in enumerate(("needed FLOPs", "counted FLOPs", "time"))]
    legend(figure, [*entries, ("time by the fastest turns", "black", "_")])
    return figure


SHOWN = {
    ("drop-path", "sample", OwnMasks.name): "drop-path: timm",
    ("drop-path", "sample", Subset.name): "drop-path: as in DINOv2",
    ("drop-path", "sample", Ours.name): "drop-path: ours",
    ("scheme", "sample", Naive.name): "scheme, sample mode: naive",
    ("scheme", "sample", Exact.name): "scheme, sample mode: ours",
    ("scheme", "sample", BranchFrozen.name): "scheme, sample mode: ours, branch-frozen",
    ("scheme", "block", Naive.name): "scheme, block mode: naive",
    ("scheme", "block", Exact.name): "scheme, block mode: ours",
    ("scheme", "block", BranchFrozen.name): "scheme, block mode: ours, branch-frozen",
}
"""Work, mode and provider → label of its bar."""


@styled
def drop_path_bars(rows: Rows) -> Figure:
    """Figure of `step --drop-path eager` on one network with one p: the time of an optimizer step relative to plain
    training's. A mark shows the ratio of the fastest turns. Ours are hatched."""
    rows = complete(rows, "work", "model", "batch", "mode", "p", "provider", "ratio_rounds", "ratio_min")
    by_who = {(row["work"], row["mode"], row["provider"]): row for row in rows}
    shown = [(label, by_who[who]) for who, label in SHOWN.items() if who in by_who]
    if not shown:
        raise NothingToPlot("no row of drop-path or of the scheme")
    setting = "timm's {model}, p = {p:g}, {batch} images".format_map(shown[0][1])
    title = f"Time of an optimizer step relative to plain training\n{setting}"
    figure, (axis,) = figure_of(rows, title, 1, (7, 1.6 + 0.3 * len(shown)))
    for place, (_, row) in enumerate(shown):
        ours, colour = row["provider"].startswith("ours"), COLOURS[row["work"] == "scheme"]
        axis.barh(place, row["ratio_rounds"], 0.7, color=colour, hatch="//" if ours else None, edgecolor="white")
        axis.plot(row["ratio_min"], place, "|", color="black", markersize=9)
        end = max(row["ratio_rounds"], row["ratio_min"])
        axis.annotate(f"{row['ratio_rounds']:.2f}", (end, place), (5, 0), textcoords="offset points", va="center")
    axis.axvline(1, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [label for label, _ in shown])
    axis.set_ylim(len(shown) - 0.5, -0.5)
    axis.set(xlabel="plain training = 1", xlim=(0, 1.1 * max(1.0, axis.get_xlim()[1])))
    axis.grid(axis="y", visible=False)
    legend(figure, [("median of the rounds", COLOURS[0], "s"), ("the fastest turns", "black", "|")])
    return figure


KEPT_IN = {
    (Exact.name, "drop"): "drop",
    (Exact.name, "reuse"): "reuse, exact",
    (BranchFrozen.name, "reuse"): "reuse, branch-frozen",
}
"""Provider and iteration → name in the figure. Both ways to freeze have the same drop iteration."""


@styled
def memory_bars(rows: Rows) -> Figure:
    """Figure of `memory`: saved bytes and peak of our iterations, relative to a plain step. Bars are means over the
    plans; a mark shows the largest."""
    rows = complete(rows, "model", "mode", "p", "provider", "iteration", "saved_ratio", "peak_ratio")
    rows = [row for row in rows if (row["provider"], row["iteration"]) in KEPT_IN]
    if not rows:
        raise NothingToPlot(f"no row of {Exact.name} or {BranchFrozen.name}")
    cases, kinds = list(dict.fromkeys(map(_case, rows))), list(KEPT_IN)
    figure, axes = figure_of(rows, "Memory of an iteration, of a plain step's", 2, _size(cases), stacked=True)
    for axis, what in zip(axes, ("saved", "peak"), strict=True):
        for row in rows:
            number = kinds.index((row["provider"], row["iteration"]))
            x = cases.index(_case(row)) + 0.8 / len(kinds) * (number + 0.5) - 0.4
            axis.bar(x, row[f"{what}_ratio"], 0.72 / len(kinds), color=COLOURS[number])
            axis.plot(x, row[f"{what}_max_ratio"], "_", color="black", markersize=5)
        _ratio_axis(axis, cases, {"saved": "saved for the backward", "peak": "most that is allocated"}[what])
    entries = [(KEPT_IN[kind], COLOURS[n], "s") for n, kind in enumerate(kinds)]
    legend(figure, [*entries, ("largest of the plans", "black", "_")])
    return figure


@styled
def scaling_lines(rows: Rows) -> Figure:
    """Figure of `scaling`: the time of a pair of iterations by the number of tiny paths."""
    rows = [row for row in complete(rows, "paths", "mode", "provider", "min_ms") if row.get("network", TINY) == TINY]
    if not rows:
        raise NothingToPlot("no row of paths alone")
    modes, providers = (list(dict.fromkeys(row[key] for row in rows)) for key in ("mode", "provider"))
    counts = sorted({row["paths"] for row in rows})
    figure, axes = figure_of(rows, "A pair of iterations by the number of paths", len(modes), (10, 4))
    for axis, mode in zip(axes, modes, strict=True):
        for number, provider in enumerate(providers):
            line = sorted((r["paths"], r["min_ms"]) for r in rows if (r["mode"], r["provider"]) == (mode, provider))
            axis.plot(*zip(*line, strict=True), f"-{MARKERS[number]}", color=COLOURS[number], markersize=4)
        axis.set(title=f"{mode} mode", xlabel="paths")
        log_axis(axis, "x")
        log_axis(axis, "y")
        axis.set_xticks(counts, counts)
    axes[0].set_ylabel("ms, fastest turn")
    legend(figure, [(name, COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n, name in enumerate(providers)])
    return figure


def _short(provider: str) -> str:
    """Returns one name for all compiled formulas."""
    return "compiled" if provider.startswith(("compiled", "torch.compile")) else provider


def _case(row: dict) -> str:
    return f"{row['model']}\n{row['mode']}\n{row['p']:g}"


def _size(cases: list[str]) -> tuple[float, float]:
    return max(7, 1 + 0.5 * len(cases)), 5.5


def _ratio_axis(axis: Axes, cases: list[str], title: str) -> None:
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(title=title, ylabel="ratio to plain")
    axis.set_xticks(range(len(cases)), cases, fontsize=7)
    axis.grid(axis="x", visible=False)


# Files


FIGURES: dict[str, dict[str, Callable[[Rows], Figure]]] = {
    "ops": {"": ratio_bars, "-roofline": roofline},
    "step": {"": step_cost, "-roofline": roofline},
    "drop-path": {"": drop_path_bars},
    "memory": {"": memory_bars},
    "scaling": {"": scaling_lines},
    "spiral": {"": spiral_accuracy},
    "language": {"": language_curves},
}
"""Command or study → ending of the file's name → function that draws its rows."""


def plots_of_results(results: Path) -> dict[str, Callable[[], Figure]]:
    """Returns a function for each figure of the CSVs in `results`, by the figure's name, for example
    `step-cpu-roofline`."""
    figures: dict[str, Callable[[], Figure]] = {}
    for path in sorted(results.glob("*.csv")):
        rows = read_rows(path)
        for name in FIGURES:
            if path.stem.startswith(f"{name}-"):
                figures |= {path.stem + ending: partial(draw, rows) for ending, draw in FIGURES[name].items()}
    return figures


def write(command: str, rows: Rows, path: Path) -> None:
    """Writes a command's first figure to `path`, and the others beside it."""
    for ending, draw in FIGURES[command].items():
        save(draw(rows), path.with_stem(path.stem + ending))
