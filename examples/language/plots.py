"""The validation loss over steps, FLOPs and seconds, as a PNG image."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

from examples.digits.plots import STYLES
from examples.digits.results import Estimate

AXES = {"step": "optimizer step", "flops": "FLOPs needed so far", "seconds": "seconds of training so far"}


def draw_losses(by_method: dict[str, list[dict[str, Any]]]) -> bytes:
    """Draws means of x and loss over the seeds, with 95 % intervals of the final loss."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(1, 3, sharey=True), AXES.items(), strict=True):
        for method, results in by_method.items():
            points = list(zip(*(result["curve"] for result in results), strict=True))
            x = [Estimate.of([point[key] for point in seeds]).mean for seeds in points]
            losses = [Estimate.of([point["validation_loss"] for point in seeds]) for seeds in points]
            axes.plot(x, [loss.mean for loss in losses], label=method, markersize=5, **STYLES[method])
            if losses[-1].half_width is not None:
                color = STYLES[method]["color"]
                axes.errorbar(x[-1], losses[-1].mean, losses[-1].half_width, color=color, capsize=4)
        axes.set_xlabel(label)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.grid(alpha=0.3, which="both")
        axes.set_axisbelow(True)
    figure.axes[0].set_ylabel("validation loss (bits per byte, log scale)")
    seeds = max(len(results) for results in by_method.values())
    figure.suptitle(f"Held-out source files; {f'mean of {seeds} seeds' if seeds > 1 else 'one seed'}")
    figure.axes[0].legend(handlelength=4)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
