"""The sizes of the paths' updates, relative to the residuals that they are added to."""

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
    """The sizes of updates and residuals, for each call of a path.

    `branch_sizes` returns it. Tensors are means over samples, float64 `[L]` on the CPU, for L calls of paths in the
    order of the forward.

    Attributes:
        labels: the paths' names. "name#2" is the second call of a path in a forward.
        ratio: ‖update‖ / ‖residual‖, with Euclidean norms over all features of a sample. Inf if a residual is 0.
        residual: ‖residual‖, the norm of the shortcut's output.
        branch: ‖update‖, the norm of what is added to the residual, γ included.
        cosine: the cosine between update and residual. 0 if one of them is 0.
        num_samples: the number of rows of the first path in all batches.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> sizes = diagnostics.branch_sizes(model, torch.randn(16, 8))
        >>> sizes.labels, sizes.ratio.shape, sizes.num_samples
        (('0', '1', '2', '3'), torch.Size([4]), 16)
    """

    labels: tuple[str, ...]
    ratio: Tensor
    residual: Tensor
    branch: Tensor
    cosine: Tensor
    num_samples: int

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws `ratio` over depth.

        Args:
            ax: where to draw. None makes a new pyplot figure.

        Returns:
            The axes.
        """
        ax = axes_or_new(ax)
        ax.plot(self.ratio.tolist(), marker="o", color="#0072B2")
        label_layers(ax, self.labels)
        ax.set(xlabel="path", ylabel="‖branch‖ / ‖residual‖, mean over samples", ylim=(0, None))
        return ax


def branch_sizes(model: nn.Module, batches: Any, *, progress: bool | None = None) -> BranchSizes:
    """Measures the sizes of each path's update and residual, in eval mode.

    Each row of a path counts as a sample, even if rows are windows or patches of samples. The model, its gradients and
    torch's random states don't change.

    Args:
        model: a model with paths.
        batches: an iterable of batches on the model's device. A batch is a tensor, a tuple or list of arguments, or a
            mapping of keyword arguments. A tensor or a mapping alone is one batch.
        progress: whether to draw a progress bar on stderr, which needs rich. None draws it if stderr is a terminal.

    Returns:
        Means over all samples, by call of a path.

    Raises:
        ValueError: if the model has no paths or calls none, if there is no batch, or if batches call different paths.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> model = nn.Sequential(*(rdp.ResidualBranch(nn.Identity()) for _ in range(2)))
        >>> diagnostics.branch_sizes(model, torch.randn(16, 8)).ratio
        tensor([1., 1.], dtype=torch.float64)
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
