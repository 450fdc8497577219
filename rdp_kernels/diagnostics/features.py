"""The distribution of each layer's features, and the number of directions in which they vary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._utils.checks import check_choice, check_count
from ._display import Axes, axes_or_new, label_layers
from ._layers import OF, layers_of, measure
from .similarity import centred_gram, u_centred

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)  # the median and three bands around it


@dataclass(frozen=True, eq=False)
class FeatureDistributions:
    """The distribution of the features of each layer.

    `feature_distributions` returns it. Tensors are on the CPU, float64 `[L]` unless stated otherwise.

    Attributes:
        labels: the names of the L layers, as in `LayerSimilarity`.
        mean: the mean of all finite values, over samples, positions and channels. NaN if there are none.
        std: their standard deviation.
        quantiles: float64 `[L, 7]`, the quantiles at 0.01, 0.05, 0.25, 0.5, 0.75, 0.95 and 0.99 of the finite values
            among those picked, interpolated linearly.
        zeros: the fraction of values that are exactly 0.
        non_finite: int64 `[L]`, the number of values that are NaN or Inf.
        effective_rank: participation ratio (Σλ)² / Σλ² of the covariance of a sample's features. If k directions had
            the same variance and all others none, it would be k. It is estimated from U-statistics of each batch
            (HSIC_1 for Σλ²), so it converges with the number of batches and may exceed their size. Batches of fewer
            than 4 samples don't count. 0 for constant features. Inf if a single sample differs from all others. NaN
            without such batches or with non-finite features.
        of: `"stream"` or `"branch"`, as passed to `feature_distributions`.
        num_samples: the number of rows of the first layer in all batches.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> features = diagnostics.feature_distributions(model, torch.randn(16, 8))
        >>> features.labels, features.quantiles.shape
        (('input', '0', '1', '2', '3'), torch.Size([5, 7]))
        >>> int(features.non_finite.sum()), bool((features.effective_rank > 1).all())
        (0, True)
    """

    labels: tuple[str, ...]
    mean: Tensor
    std: Tensor
    quantiles: Tensor
    zeros: Tensor
    non_finite: Tensor
    effective_rank: Tensor
    of: str
    num_samples: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the median and bands between quantiles over depth.

        Args:
            ax: where to draw. None makes a new pyplot figure.

        Returns:
            The axes.
        """
        ax, layers, quantiles = axes_or_new(ax), range(len(self.labels)), self.quantiles.T.tolist()
        for band, alpha in ((0, 0.15), (1, 0.3), (2, 0.5)):
            label = f"{QUANTILES[band]:.0%} to {QUANTILES[-1 - band]:.0%}"
            bounds = quantiles[band], quantiles[-1 - band]
            ax.fill_between(layers, *bounds, color="#0072B2", alpha=alpha, linewidth=0, label=label)
        ax.plot(layers, quantiles[3], color="black", marker=".", label="median")
        label_layers(ax, self.labels)
        ax.set(xlabel="layer", ylabel=f"features of the {self.of}")
        ax.legend()
        return ax


def feature_distributions(
    model: nn.Module,
    batches: Any,
    *,
    of: str = "stream",
    values_per_batch: int = 2**14,
    seed: int = 0,
    progress: bool | None = None,
) -> FeatureDistributions:
    """Computes moments, quantiles and effective rank of each layer's features, in eval mode.

    It runs one forward for each batch. The model, its gradients and torch's random states don't change.

    Args:
        model: a model with paths.
        batches: an iterable of batches on the model's device. A batch is a tensor, a tuple or list of arguments, or a
            mapping of keyword arguments. A tensor or a mapping alone is one batch.
        of: `"stream"` measures the residual before the first path and after each path. `"branch"` measures the updates
            that paths add to it.
        values_per_batch: quantiles are computed from at most this many values of a layer and batch. If the largest
            batch has more, values are picked at random, in proportion to the batches' sizes. Picked values are kept
            until the end, so memory grows with the number of batches. All other results count every value.
        seed: for picking values. Torch's global generators aren't used.
        progress: whether to draw a progress bar on stderr, which needs rich. None draws it if stderr is a terminal.

    Returns:
        The distributions, by layer.

    Raises:
        TypeError: if `values_per_batch` or `seed` isn't an integer.
        ValueError: if an argument has another value than described, if the model has no paths or calls none, if there
            is no batch, or if batches call different paths.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> updates = diagnostics.feature_distributions(model, torch.randn(16, 8), of="branch")
        >>> updates.labels, bool((updates.std > 0).all())
        (('0', '1', '2', '3'), True)
    """
    check_choice("of", of, OF)
    limit = check_count("values_per_batch", values_per_batch, minimum=1)
    generator = torch.Generator().manual_seed(check_count("seed", seed))
    seen: list[list[_Seen]] = []
    on_call = layers_of(of, lambda features: _look(features, limit, generator))
    (labels,) = measure([model], batches, "feature distributions", progress, on_call, seen.append)
    columns = zip(*(_joined(list(layer), limit) for layer in zip(*seen, strict=True)), strict=True)
    mean, std, quantiles, zeros, non_finite, rank = (torch.stack(column) for column in columns)
    num_samples = sum(layers[0].rows for layers in seen)
    return FeatureDistributions(labels, mean, std, quantiles, zeros, non_finite.long(), rank, of, num_samples)


class _Seen(NamedTuple):
    """One layer in one batch: the number of rows, the result of `_numbers`, and picked values in random order."""

    rows: int
    numbers: Tensor
    picked: Tensor


def _look(features: Tensor, limit: int, generator: torch.Generator) -> _Seen:
    count = features.numel()
    many = count > limit
    some = torch.randint(count, (limit,), generator=generator) if many else torch.randperm(count, generator=generator)
    picked = features.flatten()[some.to(features.device)].cpu()
    return _Seen(len(features), _numbers(features).cpu(), picked)


def _numbers(features: Tensor) -> Tensor:
    """Numbers of one layer in one batch, float64 `[8]`.

    The first five are the numbers of values, finite values and zeros, the mean, and the sum of squared distances from
    it. The last three are for the effective rank: the number of samples, this number times the trace of the covariance,
    and this number times its squared Frobenius norm. They are 0 for batches that don't count.
    """
    finite, n = features[features.isfinite()].double(), len(features)
    mean = finite.mean() if len(finite) else finite.new_zeros(())
    numbers = [features.numel(), len(finite), (features == 0).sum(), mean, (finite - mean).square().sum(), 0, 0, 0]
    if n >= 4:
        gram = centred_gram(features.flatten(1))
        numbers[-3:] = n, gram.trace() * n / (n - 1), u_centred(gram).square().sum() / (n - 3)
    return torch.stack([torch.as_tensor(number, dtype=torch.float64, device=features.device) for number in numbers])


def _joined(batches: list[_Seen], limit: int) -> tuple[Tensor, ...]:
    """The results of one layer.

    Mean, standard deviation, quantiles, fraction of zeros, number of non-finite values, effective rank.
    """
    values, finite, zeros, means, squares, *rank = torch.stack([batch.numbers for batch in batches]).T
    mean = (finite * means).sum() / finite.sum()
    std = ((squares + finite * (means - mean).square()).sum() / finite.sum()).sqrt()
    share = min(1.0, limit / values.max().item())
    kept = [b.picked[: math.ceil(share * n)] for b, n in zip(batches, values.tolist(), strict=True)]
    rows, trace, norm = (terms.sum() for terms in rank)
    effective_rank = torch.where((trace == 0) & (rows > 0), 0.0, trace.square() / (rows * norm))
    quantiles = _quantiles(torch.cat(kept).double())
    return mean, std, quantiles, zeros.sum() / values.sum(), (values - finite).sum(), effective_rank


def _quantiles(values: Tensor) -> Tensor:
    """The quantiles of `values` at `QUANTILES`. `torch.quantile` takes no more than 2²⁴ values."""
    values = values[values.isfinite()].sort().values
    if not len(values):
        return torch.full((len(QUANTILES),), math.nan, dtype=torch.float64)
    places = torch.tensor(QUANTILES, dtype=torch.float64) * (len(values) - 1)
    below = places.long()
    return values[below].lerp(values[(below + 1).clamp(max=len(values) - 1)], places - below)
