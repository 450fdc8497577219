"""The four figures of arXiv 2411.09475 for each method, as drawn by `examples/spiral.py`."""

from __future__ import annotations

import io
from collections.abc import Mapping

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from examples.spirals.portrait import EDGE, Portrait
from examples.spirals.study import MAIN, Case
from rdp_kernels.diagnostics import heatmap_rebound

matplotlib.use("Agg")

CLASS_COLOURS = ("#b2182b", "#2166ac")
SHOWN_STATES = 5


def draw_all(portraits: Mapping[Case, Portrait]) -> dict[str, bytes]:
    """Returns PNG files by name."""
    by_study: dict[str, dict[str, Portrait]] = {}
    for method in MAIN:
        for case, portrait in portraits.items():
            if case.method == method:
                by_study.setdefault(case.study, {})[method] = portrait
    depths = {name: max(len(p.states) for p in group.values()) for name, group in by_study.items()}
    deep, small = (by_study[choose(depths, key=depths.__getitem__)] for choose in (max, min))
    figures = {
        "features.png": features(deep),
        "decisions.png": decisions(deep),
        "similarity.png": similarity(deep),
        "training.png": training(small),
    }
    return {name: _png(figure) for name, figure in figures.items()}


def features(portraits: Mapping[str, Portrait]) -> Figure:
    """Draws the residual over depth in its first two principal components."""
    figure = Figure(figsize=(2 * SHOWN_STATES, 2 * len(portraits)), layout="constrained")
    figure.suptitle("The residual over depth: two principal components, first seed")
    rows = figure.subplots(len(portraits), SHOWN_STATES, squeeze=False)
    for axes, (method, portrait) in zip(rows, portraits.items(), strict=True):
        shown = torch.linspace(0, len(portrait.states) - 1, SHOWN_STATES).round().int().tolist()
        for ax, layer in zip(axes, shown, strict=True):
            _scatter(ax, _principal(portrait.states[layer]), portrait.state_labels)
            ax.set_title(f"after {layer} paths" if layer else "before the first path", fontsize="small")
        axes[0].set_ylabel(method)
    return figure


def decisions(portraits: Mapping[str, Portrait]) -> Figure:
    """Draws the two spirals, and the networks' decisions over the plane."""
    figure = Figure(figsize=(2.6 * len(portraits), 3.2), layout="constrained")
    figure.suptitle("Training points, and the probability of the blue class, first seed")
    row = figure.subplots(1, len(portraits), squeeze=False)[0]
    for ax, (method, portrait) in zip(row, portraits.items(), strict=True):
        extent = (-EDGE, EDGE, -EDGE, EDGE)
        ax.imshow(portrait.probability, cmap="RdBu", vmin=0, vmax=1, extent=extent, origin="lower", alpha=0.6)
        _scatter(ax, portrait.points, portrait.labels)
        ax.set_title(method, fontsize="medium")
    return figure


def similarity(portraits: Mapping[str, Portrait]) -> Figure:
    """Draws heatmaps of the similarity of layers."""
    figure = Figure(figsize=(2.8 * len(portraits) + 0.6, 3.4), layout="constrained")
    figure.suptitle("Linear CKA between the states of the residual, mean over the seeds")
    row = figure.subplots(1, len(portraits), squeeze=False)[0]
    image = None
    for ax, (method, portrait) in zip(row, portraits.items(), strict=True):
        image = ax.imshow(portrait.similarity, cmap="magma", vmin=0, vmax=1, origin="lower")
        ax.set_title(f"{method}\nrebound of the mean {heatmap_rebound(portrait.similarity):.2f}", fontsize="medium")
        ax.set_xlabel("paths before")
    row[0].set_ylabel("paths before")
    figure.colorbar(image, ax=row, shrink=0.8)
    return figure


def training(portraits: Mapping[str, Portrait]) -> Figure:
    """Draws how far each feature of each layer separates the classes, during training."""
    figure = Figure(figsize=(2.8 * len(portraits) + 0.6, 6), layout="constrained")
    figure.suptitle("Distance of the classes' means in each feature, in its standard deviations, first seed")
    row = figure.subplots(1, len(portraits), squeeze=False, sharey=True)[0]
    image = None
    for ax, (method, portrait) in zip(row, portraits.items(), strict=True):
        looks, layers, width = portrait.distances.shape
        extent = (0, portrait.steps[-1], layers, 0)
        values = portrait.distances.view(looks, -1).T
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=2, extent=extent, aspect="auto", interpolation="nearest")
        for layer in range(1, layers):
            ax.axhline(layer, color="white", linewidth=1)
        ax.set_title(method, fontsize="medium")
        ax.set_xlabel("optimizer step")
    row[0].set_ylabel(f"paths before ({width} features each)")
    row[0].set_yticks([layer + 0.5 for layer in range(layers)], [str(layer) for layer in range(layers)])
    figure.colorbar(image, ax=row, shrink=0.6)
    return figure


def _principal(states: Tensor) -> Tensor:
    """Projects `[points, width]` to `[points, 2]`, each component with variance 1."""
    centred = (states - states.mean(dim=0)).double()
    _, _, basis = torch.linalg.svd(centred, full_matrices=False)
    largest = basis[:2].gather(1, basis[:2].abs().argmax(dim=1, keepdim=True))
    projected = centred @ (basis[:2] * largest.sign()).T  # without this, panels could be mirrored by chance
    return projected / projected.std(dim=0).clamp_min(1e-12)


def _scatter(ax: matplotlib.axes.Axes, points: Tensor, labels: Tensor) -> None:
    ax.scatter(points[:, 0], points[:, 1], s=4, c=[CLASS_COLOURS[label] for label in labels.tolist()], linewidths=0)
    ax.set_xticks([])
    ax.set_yticks([])


def _png(figure: Figure) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=110)
    return drawn.getvalue()
