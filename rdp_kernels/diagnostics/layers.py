"""Which layers of a model, or of two models, hold similar features, as a heatmap over depth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .._utils.checks import check_choice
from ._display import Axes, axes_or_new, label_layers
from ._layers import OF, layers_of, measure
from .similarity import MinibatchCKA, MinibatchCosine, heatmap_rebound, unbiased_gram

METRICS = {"cka": "linear CKA, unbiased", "cosine": "mean cosine similarity"}


@dataclass(frozen=True, eq=False)
class LayerSimilarity:
    """The result of `layer_similarity`.

    Args:
        matrix: float64 `[L, L']` on the CPU; NaN for pairs that can't be compared.
        labels: the names of the L rows: "input" for the residual before the first path, and the paths' names.
            "name#2" is the second call of a path in a forward.
        other_labels: the names of the L' columns.
        metric, of: as in `layer_similarity`.
        num_samples: how many rows the first layer had in all batches.
    """

    matrix: Tensor
    labels: tuple[str, ...]
    other_labels: tuple[str, ...]
    metric: str
    of: str
    num_samples: int

    @property
    def rebound(self) -> float:
        """`heatmap_rebound` of the matrix: how much the similarity to a layer rises again behind it, mean over layers.

        Pairs that can't be compared are left out. Raises `ValueError` where L' isn't L.
        """
        return heatmap_rebound(self.matrix).item()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws a heatmap on `ax`, or on new axes, blank where pairs can't be compared. Returns the axes."""
        ax = axes_or_new(ax)
        known = self.matrix[self.matrix.isfinite()]
        lowest = min(0.9, math.floor(10 * known.min().item()) / 10) if len(known) else 0.0
        image = ax.imshow(self.matrix.numpy(), vmin=lowest, vmax=1, cmap="cividis", origin="lower")
        ax.figure.colorbar(image, ax=ax, label=f"{METRICS[self.metric]}, of the {self.of}")
        label_layers(ax, self.other_labels, self.labels)
        ax.set(xlabel="layer", ylabel="layer")
        return ax


def layer_similarity(
    model: nn.Module,
    batches: Any,
    *,
    of: str = "stream",
    metric: str = "cka",
    other: nn.Module | None = None,
    progress: bool | None = None,
) -> LayerSimilarity:
    """How similar the layers of a model are, in eval mode; one forward for each batch.

    Args:
        model: one with paths: built from `ResidualBranch`, or converted.
        batches: an iterable of batches, each a tensor, a tuple or list of arguments, or a mapping of arguments by name;
            a tensor or a mapping alone is one batch. On the model's device.
        of: `"stream"`, the residual before the first path and after each path, or `"branch"`, what each path adds.
        metric: `"cka"`, the unbiased minibatch estimate of linear CKA (`MinibatchCKA`), for which every batch needs at
            least 4 samples, or `"cosine"`, the mean over samples of the cosine of their features.
        other: a second model on the same batches and device, whose layers are the columns.
        progress: draw a progress bar; None draws it where stderr is a terminal.

    All dimensions but the first are a layer's features. Pairs that can't be compared are NaN: with `"cosine"`, layers
    with different numbers of features (stages of a CNN), and layers whose rows mean different things (windows or
    patches of samples, k·B rows, against samples). NaN or Inf among features give NaN too.

    The model, its gradients and torch's random state don't change. Only the features of the current batch are kept,
    for `"cka"` only a `[B, B]` matrix for each layer. Raises `ValueError` or `TypeError` naming the argument.
    """
    check_choice("of", of, OF)
    check_choice("metric", metric, tuple(METRICS))
    cka = metric == "cka"
    similarities: MinibatchCKA | MinibatchCosine = MinibatchCKA() if cka else MinibatchCosine()
    num_samples = 0

    def kept(features: Tensor) -> Tensor:
        return unbiased_gram(features.flatten(1)) if cka else features.flatten(1).clone()

    def add(layers: list[Tensor], others: list[Tensor] | None = None) -> None:
        nonlocal num_samples
        similarities.add(layers, others)
        num_samples += len(layers[0])

    models = [model] if other is None else [model, other]
    labels = measure(models, batches, "layer similarity", progress, layers_of(of, kept), add)
    return LayerSimilarity(similarities.value(), labels[0], labels[-1], metric, of, num_samples)
