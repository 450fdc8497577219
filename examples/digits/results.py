"""The results of a run: a summary of each method with intervals over the seeds, and the findings in sentences."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from examples.intervals import Estimate
from examples.methods import DROP_PATH, DROP_THEN_FULL, EXACT, FROZEN, METHODS, PLAIN, RANDOM


@dataclass(frozen=True)
class Summary:
    """One method's results. Lists have an entry for each seed; curves also have one for each evaluation."""

    iterations: list[dict[str, int]]
    worst_losses: list[dict[str, float]]
    """By phase, the largest loss of the training."""
    accuracies: list[float]
    removed: dict[int, list[float]]
    """Number of removed branches → test accuracies."""
    curves: list[list[dict[str, float]]]
    similarity: list[list[float]]
    """Mean over the seeds."""
    weights_sha256: list[str]
    seed_needed_flops: list[float]
    """Per step, mean over all steps."""
    needed_flops_counted_steps: float
    """Per step, mean over the steps whose FLOPs were counted."""
    counted_flops: float
    counted_steps: int

    @property
    def needed_flops(self) -> float:
        return statistics.fmean(self.seed_needed_flops)

    @property
    def accuracy(self) -> Estimate:
        return Estimate.of(self.accuracies)


def summarize(finished: list[dict[str, Any]]) -> dict[str, Summary]:
    """Returns for each method the results that depend only on the seeds, not on interruptions of the run."""
    return {method: _summarize([run[method] for run in finished]) for method in METHODS}


def _summarize(runs: list[dict[str, Any]]) -> Summary:
    matrices = [run["similarity"] for run in runs]
    mean = [[statistics.fmean(entries) for entries in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]
    return Summary(
        iterations=[run["phases"] for run in runs],
        worst_losses=[run["worst"] for run in runs],
        accuracies=[run["curve"][-1]["accuracy"] for run in runs],
        removed={count: [run["removed"][count] for run in runs] for count in runs[0]["removed"]},
        curves=[run["curve"] for run in runs],
        similarity=mean,
        weights_sha256=[run["weights_sha256"] for run in runs],
        seed_needed_flops=[statistics.fmean(run["needed"]) for run in runs],
        needed_flops_counted_steps=statistics.fmean(runs[0]["needed"][: runs[0]["counted_steps"]]),
        counted_flops=runs[0]["counted"],
        counted_steps=runs[0]["counted_steps"],
    )


def milliseconds(finished: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the median time of a step. It is measured over two steps in a row, as the iterations of a pair differ."""
    return {method: 1e3 * _pair_median([run[method]["seconds"] for run in finished]) for method in METHODS}


def seed_milliseconds(finished: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Returns the median time of a step for each seed."""
    return {method: [1e3 * _pair_median([run[method]["seconds"]]) for run in finished] for method in METHODS}


def _pair_median(runs: list[list[float]]) -> float:
    pairs = [seconds[i : i + 2] for seconds in runs for i in range(0, len(seconds), 2)]
    return statistics.median(statistics.fmean(pair) for pair in pairs)


def findings(summaries: dict[str, Summary], times: dict[str, float], paths: int) -> list[str]:
    """Returns sentences that say for each comparison whether there is a gain."""
    quarter = max(summaries[PLAIN].removed)
    whole = {method: summary.accuracies for method, summary in summaries.items()}
    without = {method: summary.removed[quarter] for method, summary in summaries.items()}
    sentences = [f"Accuracy of {method}: {_compare(whole, method, PLAIN)}." for method in (DROP_PATH, EXACT, FROZEN)]
    for method in (DROP_PATH, EXACT):
        said = _compare(without, method, PLAIN)
        sentences.append(f"Accuracy of {method} without {quarter} of its {paths} branches: {said}.")
    sentences.append(
        f"Letting just the dropped paths learn: {EXACT} is {_compare(whole, EXACT, RANDOM)}, "
        f"and {_compare(whole, EXACT, DROP_THEN_FULL)}."
    )
    saved = 1 - summaries[EXACT].needed_flops / summaries[DROP_THEN_FULL].needed_flops
    sentences.append(f"A step of {EXACT} needs {saved:.0%} fewer FLOPs than one of {DROP_THEN_FULL!r}.")
    for method in (EXACT, FROZEN):
        flops = summaries[method].needed_flops / summaries[PLAIN].needed_flops
        sentences.append(f"A step of {method} needs {flops:.2f} of plain's FLOPs and {_time(times, method)}.")
    return sentences


def _time(times: dict[str, float], method: str) -> str:
    ratio = times[method] / times[PLAIN]
    verdict = "no gain" if ratio > 0.98 else "a gain"
    return f"took {ratio:.2f} of its time: {verdict}"


def _compare(values: dict[str, list[float]], method: str, other: str) -> str:
    """Describes the paired difference over seeds. Both methods of a pair had the same weights and batches."""
    difference = Estimate.of_difference(values[method], values[other])
    direction = "above" if difference.mean >= 0 else "below"
    points = f"{100 * abs(difference.mean):.1f}"
    if difference.half_width is None:
        return f"{points} points {direction} {other!r} with one seed, so no conclusion is possible"
    points = f"{points} ± {100 * difference.half_width:.1f} points {direction} {other!r}"
    return points if difference.excludes_zero else f"{points}, which may be chance"
