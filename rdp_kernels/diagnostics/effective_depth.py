"""The effective depth of a network: the number of branches that its gradient comes through.

Veit, Wilber and Belongie, arXiv 1605.06431, section 4.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from .._utils.checks import check_count
from ..kernels.spec import activated
from ..paths.call import PathCall
from ..plan import plan_generator
from ._display import Axes, axes_or_new, track
from .gradients import checked_loss, requiring_grad
from .lesions import subsets
from .observe import observing, overriding, undisturbed, update_of

ALL_SUBSETS = 10  # with up to this many paths all 2ⁿ subsets are measured, in at most 1,024 backward passes
SAMPLES = 16  # random subsets of each length, with more paths


@dataclass(frozen=True)
class EffectiveDepth:
    """The shares of a gradient that came through no branch, through one, through two, and so on.

    `effective_depth` returns it. A length is a number of branches.

    Attributes:
        depth: the mean length, Σ length · share.
        paths: the number of paths that the model calls, which is the greatest length.
        lengths: the lengths that were measured.
        norms: for each length, the mean norm of the gradient through one set of as many branches.
        shares: for each length, this norm times the number of such sets, relative to the sum over lengths.
        sets: for each length, the number of sets that the mean is over. These are all C(paths, length) sets, or random
            ones.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> x = torch.randn(16, 8)
        >>> result = diagnostics.effective_depth(model, lambda m: m(x).square().mean())
        >>> result.lengths, result.sets, 0 < result.depth < 4
        ([0, 1, 2, 3, 4], [1, 4, 6, 4, 1], True)
    """

    depth: float
    paths: int
    lengths: list[int]
    norms: list[float]
    shares: list[float]
    sets: list[int]

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the shares by length as bars.

        Args:
            ax: where to draw. None makes a new pyplot figure.

        Returns:
            The axes.
        """
        ax = axes_or_new(ax)
        ax.bar(self.lengths, self.shares, color="#56B4E9", edgecolor="black", linewidth=0.5)
        ax.axvline(self.depth, color="black", linestyle="--", label=f"effective depth {self.depth:.2f} of {self.paths}")
        ax.set(xlabel="branches that the gradient comes through", ylabel="share of the gradient")
        ax.legend()
        return ax


def effective_depth(
    model: nn.Module,
    loss: Callable[[Any], Tensor],
    *,
    samples: int | None = None,
    lengths: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> EffectiveDepth:
    """Measures through how many branches a gradient comes on average (Veit et al., arXiv 1605.06431, section 4.3).

    For a set of k paths the forward is the ordinary one, in eval mode. In these k paths the backward goes through the
    branch only, and in the others through the shortcut only. Length k contributes the mean norm of the gradient at the
    input of the first path, over sets of k paths, times the number of sets C(n, k). As in the paper, these are sums of
    norms, not norms of sums: gradients through different sets may cancel. Each set takes a forward and a backward.

    A path that is called several times counts once. Modes, `.grad` and random states don't change.

    Args:
        model: a model with n paths.
        loss: `loss(model)` returns a scalar tensor.
        samples: how many different random sets are measured for each length, or all sets if there are no more. None
            measures all sets of a model with up to 10 paths, else 16.
        lengths: which lengths are measured and make up the distribution. None means 0 to n.
        seed: for the sets. Torch's global generators aren't used.
        progress: whether to draw a progress bar on stderr, which needs rich. None draws it if stderr is a terminal.

    Returns:
        The distribution of the gradient over lengths, and its mean.

    Raises:
        TypeError: if `loss` doesn't return a scalar that depends on the model by autograd, or if a number isn't an
            integer.
        ValueError: if an argument has another value than described, if the model has no paths or `loss` calls none, or
            if no gradient reaches the first path.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> x = torch.randn(16, 8)
        >>> loss = lambda m: m(x).square().mean()
        >>> result = diagnostics.effective_depth(model, loss, samples=2, lengths=[0, 1, 2])
        >>> result.sets, round(sum(result.shares), 6)
        ([1, 2, 2], 1.0)
    """
    if samples is not None:
        check_count("samples", samples, minimum=1)
    check_count("seed", seed, minimum=-(2**63))
    called = _called(model, loss)
    n = len(called)
    limit = samples or (2**ALL_SUBSETS if n <= ALL_SUBSETS else SAMPLES)
    lengths = list(range(n + 1)) if lengths is None else [check_count("lengths", length) for length in lengths]
    if not lengths or max(lengths) > n or len(set(lengths)) < len(lengths):
        raise ValueError(f"lengths must be different numbers from 0 to {n}, the number of paths, got {lengths}")
    chosen = [subsets(n, length, limit, plan_generator(seed, length)) for length in lengths]
    flat = [{called[i] for i in subset} for sets in chosen for subset in sets]
    found = iter([_norm(model, loss, through) for through in track(flat, "effective depth", progress)])
    norms = [math.fsum(next(found) for _ in sets) / len(sets) for sets in chosen]
    if not any(norms) or not all(map(math.isfinite, norms)):
        raise ValueError(
            f"loss must have a finite gradient at the input of the first path, and not 0 for all lengths, got {norms}"
        )
    # In logarithms, as C(2000, 1000) exceeds the range of floats.
    logs = [math.log(math.comb(n, k)) + (math.log(v) if v else -math.inf) for k, v in zip(lengths, norms, strict=True)]
    weights = [math.exp(log - max(logs)) for log in logs]
    shares = [weight / math.fsum(weights) for weight in weights]
    depth = math.fsum(k * share for k, share in zip(lengths, shares, strict=True))
    return EffectiveDepth(depth, n, lengths, norms, shares, [len(sets) for sets in chosen])


def _called(model: nn.Module, loss: Callable[[Any], Tensor]) -> list[int]:
    """Returns the paths that are called, in the order of their first calls."""
    paths: dict[int, None] = {}
    with undisturbed(model), torch.no_grad(), observing(model, lambda call: paths.setdefault(call.path)):
        loss(model)
    if not paths:
        raise ValueError("loss must run the model it is given, but called none of its paths")
    return list(paths)


def _norm(model: nn.Module, loss: Callable[[Any], Tensor], through: set[int]) -> float:
    """Returns the norm of the gradient at the input of the first path that comes through exactly these branches."""
    first: list[GradientEdge] = []

    def limited(path: int, call: PathCall, x: Tensor) -> Tensor:
        if not first:
            x, whole = requiring_grad(x, call)
            if not whole:
                raise ValueError(
                    "the first path's shortcut is computed outside of it, and nothing before it learns: let a "
                    "parameter before it require grad, so that its input has a gradient"
                )
            first.append(get_gradient_edge(x))
        passes = path in through
        with torch.set_grad_enabled(not passes):
            residual = call.residual(x)
        with torch.set_grad_enabled(passes):
            update = update_of(call, x)
        return activated((residual.detach() if passes else residual) + update, call.module.activation)

    with undisturbed(model):
        with torch.enable_grad(), overriding(model, limited):
            value = checked_loss(loss(model))
        (grad,) = torch.autograd.grad(value, first, allow_unused=True)
    return 0.0 if grad is None else grad.double().norm().item()


def participation(values: Sequence[float] | Tensor) -> float:
    """Counts how many of several contributions matter, as (Σv)² / Σv².

    It is n for n equal values, 1 if one value has it all, and 0 if all values are 0.

    Args:
        values: non-negative numbers, for example the sizes of branches, or the changes of the loss without each path.

    Returns:
        A number from 0 to the number of values.

    Raises:
        ValueError: if a value is negative or infinite, or if there are no values.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> diagnostics.participation([1.0, 1.0, 1.0]), diagnostics.participation([2.0, 0.0, 0.0])
        (3.0, 1.0)
    """
    found = torch.as_tensor(values, dtype=torch.float64).detach().flatten()
    if found.numel() == 0 or not bool((found >= 0).all()) or bool(found.isinf().any()):
        raise ValueError(f"values must be finite, non-negative numbers, at least one, got {found.tolist()}")
    found = found / found.max().clamp_min(1e-300)
    return (found.sum().square() / found.square().sum().clamp_min(1e-300)).item()
