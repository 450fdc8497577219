"""The results of a study: rows for `results.csv`, the table on screen, and findings in sentences."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from typing import Any

from examples.intervals import Estimate
from examples.skips.networks import ADDITION, CONCATENATION, PLAIN, SCALED
from examples.skips.study import Config, Measured

LEARNED = 0.5  # the lowest mean accuracy at which the layers' effects are evaluated; chance is 0.1
BEFORE = {
    "weight_gradient_ratio_0": ("lg ∂L/∂W", ".2f", 1),
    "state_gradient_ratio_0": ("lg ∂L/∂x", ".2f", 1),
    "alikeness_0": ("alikeness", ".2f", 1),
}
"""Columns of the table on screen for untrained networks: metric, heading, format and factor."""
AFTER = {
    "accuracy": ("accuracy, %", ".1f", 100),
    "accuracy_without_one": ("1 removed", ".1f", 100),
    "accuracy_without_quarter": ("¼ removed", ".1f", 100),
    "effective_depth": ("effective\ndepth", ".1f", 1),
}
"""Columns for trained networks."""


def to_csv(studied: list[Measured], config: Config, machine: Mapping[str, str | int]) -> str:
    """Returns a row for each kind, depth and seed with unrounded numbers."""
    rows = []
    for measured in studied:
        for seed in range(config.seeds):
            row: dict[str, Any] = {
                **machine,
                "normalise": int(config.normalise),
                "validate": int(config.validate),
                "steps": config.steps,
                "kind": measured.kind,
                "depth": measured.depth,
                "seed": seed,
                "width": measured.width,
                "growth": measured.growth,
                "parameters": measured.parameters,
                "learning_rate": measured.learning_rate,
            }
            # empty if a kind has no value
            row |= {
                name: "" if math.isnan(values[seed]) else f"{values[seed]:.6g}"
                for name, values in measured.metrics.items()
            }
            rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def estimates(measured: Measured, columns: Mapping[str, tuple[str, str, float]]) -> list[str]:
    """Returns the cells of `BEFORE` or `AFTER`."""
    return [Estimate.of(measured.metrics[name]).text(spec, factor) for name, (_, spec, factor) in columns.items()]


def findings(studied: list[Measured]) -> list[str]:
    """Returns findings in sentences on the deepest networks. The effects of layers are those of the deepest network
    that learned."""
    by_kind: dict[str, dict[int, Measured]] = {}
    for measured in studied:
        by_kind.setdefault(measured.kind, {})[measured.depth] = measured
    shallow, deep = (end(measured.depth for measured in studied) for end in (min, max))
    sentences = [_start(kind, depths[deep]) for kind, depths in by_kind.items()]
    if shallow < deep:
        sentences += [_deeper(kind, depths[shallow], depths[deep]) for kind, depths in by_kind.items()]
    for kind, other in ((ADDITION, PLAIN), (CONCATENATION, PLAIN), (CONCATENATION, ADDITION), (SCALED, ADDITION)):
        if by_kind.keys() >= {kind, other}:
            sentences.append(_against(by_kind[kind][deep], by_kind[other][deep]))
    return sentences + [_lesion(kind, list(depths.values())) for kind, depths in by_kind.items()]


def _start(kind: str, deep: Measured) -> str:
    """Describes gradients and states at the start and early in training."""
    by_step = {
        step: Estimate.of(deep.metrics[f"weight_gradient_ratio_{step}"]).text(".1f") for step in sorted(deep.gradients)
    }
    state = Estimate.of(deep.metrics["state_gradient_ratio_0"]).text(".1f")
    alike = Estimate.of(deep.metrics["alikeness_0"]).text(".3f")
    ratios = ", ".join(f"10^({ratio}) after {step}" for step, ratio in by_step.items())
    return (
        f"{kind}, depth {deep.depth}: norm of the first layer's weight gradient over the last's, {ratios} steps; of "
        f"the gradient at their inputs, 10^({state}) before training. Mean cosine then between the final states of "
        f"different images: {alike}."
    )


def _deeper(kind: str, shallow: Measured, deep: Measured) -> str:
    change = Estimate.of_difference(deep.metrics["accuracy"], shallow.metrics["accuracy"])
    return f"{kind}: from depth {shallow.depth} to {deep.depth} accuracy changes by {_points(change)}."


def _against(measured: Measured, other: Measured) -> str:
    difference = Estimate.of_difference(measured.metrics["accuracy"], other.metrics["accuracy"])
    return f"Accuracy at depth {measured.depth}, {measured.kind!r} less {other.kind!r}: {_points(difference)}."


def _lesion(kind: str, studied: list[Measured]) -> str:
    learned = [measured for measured in studied if has_learned(measured)]
    if not learned:
        return f"{kind}: no accuracy reaches {LEARNED:.0%}, so what removing layers does says nothing."
    measured = max(learned, key=lambda measured: measured.depth)
    metrics = measured.metrics
    one, quarter = (
        _points(Estimate.of_difference(metrics[f"accuracy_without_{part}"], metrics["accuracy"]))
        for part in ("one", "quarter")
    )
    depth = Estimate.of(metrics["effective_depth"]).text(".1f")
    lengths = metrics["path_length"]
    paths = (
        "" if math.isnan(lengths[0]) else f", its gradient comes through {Estimate.of(lengths).text('.1f')} branches"
    )
    return (
        f"{kind}, depth {measured.depth}, trained: without one layer accuracy changes by {one}, without a quarter of "
        f"them by {quarter}; {depth} of its layers matter{paths}."
    )


def has_learned(measured: Measured) -> bool:
    return Estimate.of(measured.metrics["accuracy"]).mean >= LEARNED


def _points(difference: Estimate) -> str:
    text = f"{100 * difference.mean:+.1f}"
    if difference.half_width is None:
        return f"{text} points with one seed, so no conclusion is possible"
    text = f"{text} ± {100 * difference.half_width:.1f} points"
    return text if difference.excludes_zero else f"{text}, which may be chance"
