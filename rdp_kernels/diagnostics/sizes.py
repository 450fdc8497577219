"""How large the updates of paths are, relative to the residuals that they are added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ._layers import none_given, put, run, same_labels
from ._plots import axes_or_new, label_layers
from ._progress import track
from .observe import ObservedCall, as_batches, undisturbed
from .similarity import unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class BranchSizes:
    """Means over samples, float64 `[L]` on the CPU, for L calls of paths in the order of the forward.

    Args:
        labels: the paths' names; "name#2" is the second call of a path in a forward.
        ratio: ‖branch‖ / ‖residual‖, Euclidean norms over all features of a sample. Inf where a residual is 0.
        residual, branch: ‖residual‖ (the output of the shortcut) and ‖branch‖ (what is added to it, γ included).
        cosine: between the two; 0 where one of them is 0.
        num_samples: how many rows the first path had in all batches.
    """

    labels: tuple[str, ...]
    ratio: Tensor
    residual: Tensor
    branch: Tensor
    cosine: Tensor
    num_samples: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws `ratio` over depth, on `ax` or on new axes. Returns the axes."""
        ax = axes_or_new(ax)
        ax.plot(self.ratio.tolist(), marker="o", color="#0072B2")
        label_layers(ax, self.labels)
        ax.set(xlabel="path", ylabel="‖branch‖ / ‖residual‖, mean over samples")
        ax.set_ylim(bottom=0)
        return ax


def branch_sizes(model: nn.Module, batches: Any, *, progress: bool | None = None) -> BranchSizes:
    """Measures each path's update and residual, in eval mode. Arguments as in `layer_similarity`; nothing else changes.

    Each row of a path counts as a sample, also where it isn't one (windows, patches).
    """
    labels: tuple[str, ...] | None = None
    sums, counts, num_samples = torch.zeros((), dtype=torch.float64), torch.zeros(()), 0
    with undisturbed(model):
        for batch in track(as_batches(batches), "branch sizes", progress):
            found: dict[str, Tensor] = {}
            run(model, batch, lambda call, found=found: put(found, call.name, _sizes(call)))  # type: ignore[misc]
            labels = same_labels(labels, found)
            rows = [sizes.shape[1] for sizes in found.values()]
            sums = sums + torch.stack([sizes.sum(dim=1).cpu() for sizes in found.values()], dim=1)
            counts, num_samples = counts + torch.tensor(rows), num_samples + rows[0]
    if labels is None:
        raise none_given()
    ratio, residual, branch, cosine = sums / counts
    return BranchSizes(labels, ratio, residual, branch, cosine, num_samples)


def _sizes(call: ObservedCall) -> Tensor:
    """Ratio, norm of the residual, norm of the update and cosine for each sample: float64 `[4, B]`."""
    residual, update = (t.flatten(1).double() for t in (call.residual, call.update))
    norms = [torch.linalg.vector_norm(t, dim=1) for t in (residual, update)]
    ratio = torch.where(norms[1] == 0, 0.0, norms[1] / norms[0])
    return torch.stack([ratio, *norms, (unit(residual) * unit(update)).sum(dim=1)])
