"""The similarity of the features of a model's layers, or of two models' layers, as a heatmap over depth."""

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
    """The similarity of each layer with each other layer.

    `layer_similarity` returns it.

    Attributes:
        matrix: float64 `[L, L']` on the CPU. NaN for pairs that can't be compared.
        labels: the names of the L rows: "input" for the residual before the first path, and the paths' names. "name#2"
            is the second call of a path in a forward.
        other_labels: the names of the L' columns.
        metric: `"cka"` or `"cosine"`, as passed to `layer_similarity`.
        of: `"stream"` or `"branch"`, as passed to `layer_similarity`.
        num_samples: the number of rows of the first layer in all batches.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> similar = diagnostics.layer_similarity(model, torch.randn(16, 8), metric="cosine")
        >>> similar.labels
        ('input', '0', '1', '2', '3')
        >>> similar.matrix.shape, 0 <= similar.rebound < 1
        (torch.Size([5, 5]), True)
    """

    matrix: Tensor
    labels: tuple[str, ...]
    other_labels: tuple[str, ...]
    metric: str
    of: str
    num_samples: int

    @property
    def rebound(self) -> float:
        """The rise of the similarity to a layer at later layers, as a mean over layers. See `heatmap_rebound`.

        Pairs that can't be compared are left out. Raises `ValueError` if the matrix isn't square.
        """
        return heatmap_rebound(self.matrix).item()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws a heatmap, blank for pairs that can't be compared.

        Args:
            ax: where to draw. None makes a new pyplot figure.

        Returns:
            The axes.
        """
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
    """Compares the features of each layer with those of each other layer, in eval mode.

    It runs one forward for each batch. All dimensions but the first are a layer's features. These pairs can't be
    compared, and their similarity is NaN: with `"cosine"`, layers with different numbers of features (stages of a CNN);
    layers whose rows mean different things (k·B windows or patches against B samples); layers with NaN or Inf among
    their features.

    The model, its gradients and torch's random states don't change. Memory holds the features of the current batch
    only, and for `"cka"` only a `[B, B]` matrix for each layer.

    Args:
        model: a model with paths, built from `ResidualBranch` or converted.
        batches: an iterable of batches on the model's device. A batch is a tensor, a tuple or list of arguments, or a
            mapping of keyword arguments. A tensor or a mapping alone is one batch.
        of: `"stream"` compares the residual before the first path and after each path. `"branch"` compares the updates
            that paths add to it.
        metric: `"cka"` is the unbiased minibatch estimate of linear CKA (see `MinibatchCKA`). Every batch then needs at
            least 4 samples. `"cosine"` is the mean over samples of the cosine between their features.
        other: a second model on the same device, which gets the same batches. Its layers are the columns. None compares
            the model with itself.
        progress: whether to draw a progress bar on stderr, which needs rich. None draws it if stderr is a terminal.

    Returns:
        The similarity of all pairs of layers.

    Raises:
        ValueError: if an argument has another value than described, if the model has no paths or calls none, if there
            is no batch, or if batches call different paths.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> batches = [torch.randn(16, 8) for _ in range(3)]
        >>> similar = diagnostics.layer_similarity(model, batches)
        >>> similar.num_samples, similar.matrix.diagonal()
        (48, tensor([1.0000, 1.0000, 1.0000, 1.0000, 1.0000], dtype=torch.float64))
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
