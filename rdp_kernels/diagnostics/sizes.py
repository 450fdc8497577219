"""How large the updates of paths are, relative to the residuals that they are added to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ._display import Axes, axes_or_new, label_layers
from ._layers import measure, put
from .observe import ObservedCall
from .similarity import unit


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
        ax.set(xlabel="path", ylabel="‖branch‖ / ‖residual‖, mean over samples", ylim=(0, None))
        return ax


def branch_sizes(model: nn.Module, batches: Any, *, progress: bool | None = None) -> BranchSizes:
    """Measures each path's update and residual, in eval mode. Arguments as in `layer_similarity`; nothing else changes.

    Each row of a path counts as a sample, also where it isn't one (windows, patches).
    """

    def on_call(call: ObservedCall, found: dict[str, Tensor]) -> None:
        put(found, call.name, _sizes(call))

    found: list[list[Tensor]] = []
    (labels,) = measure([model], batches, "branch sizes", progress, on_call, found.append)
    *sums, rows = torch.stack([torch.stack(sizes, dim=1).cpu() for sizes in found]).sum(dim=0)
    ratio, residual, branch, cosine = (total / rows for total in sums)
    return BranchSizes(labels, ratio, residual, branch, cosine, int(rows[0]))


def _sizes(call: ObservedCall) -> Tensor:
    """Sums over samples, float64 `[5]`: of the ratio, the norms of residual and update, the cosine, and 1."""
    residual, update = (t.flatten(1).double() for t in (call.residual, call.update))
    norms = [torch.linalg.vector_norm(t, dim=1) for t in (residual, update)]
    ratio = torch.where(norms[1] == 0, 0.0, norms[1] / norms[0])
    cosine = (unit(residual) * unit(update)).sum(dim=1)
    return torch.stack([ratio, *norms, cosine, torch.ones_like(cosine)]).sum(dim=1)
