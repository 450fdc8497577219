"""One call of the kernels as data: how a branch is added to the residual, and what the next branch gets of the sum.

A kernel library serves every op of this package through two functions on these, `fused_add_fwd` and `fused_add_bwd`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._utils.device import to_device

ActivationName = Literal["relu"]
NormName = Literal["layer", "rms"]


@dataclass(frozen=True)
class ActivationKind:
    """A function that may follow the sum. Kernels compute its derivative from its output.

    Args:
        code: its number in kernels, that of `Activation` in `csrc/fused_add.h`; 0 stands for no activation.
        formula: the function in torch.
    """

    code: int
    formula: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, ActivationKind] = {"relu": ActivationKind(1, torch.relu)}


@dataclass(frozen=True)
class NormKind:
    """A norm over the last dimension.

    Args:
        module: torch's class.
        formula: the norm in torch, of `(x, weight, bias, eps)`.
        centers: whether the mean is subtracted; the backward then needs the mean.
        has_bias: whether a bias may follow the weight.
    """

    module: type[nn.Module]
    formula: Callable[[Tensor, Tensor | None, Tensor | None, float], Tensor]
    centers: bool
    has_bias: bool


NORMS: dict[str, NormKind] = {
    "layer": NormKind(
        nn.LayerNorm, lambda x, weight, bias, eps: F.layer_norm(x, x.shape[-1:], weight, bias, eps), True, True
    ),
    "rms": NormKind(nn.RMSNorm, lambda x, weight, _, eps: F.rms_norm(x, x.shape[-1:], weight, eps), False, False),
}


def activated(x: Tensor, activation: str | None) -> Tensor:
    """`x` through an activation, or `x` itself without one."""
    return x if activation is None else ACTIVATIONS[activation].formula(x)


def activation_code(activation: str | None) -> int:
    return 0 if activation is None else ACTIVATIONS[activation].code


@dataclass(frozen=True)
class RowSet:
    """Some rows of a batch in the order in which a branch gets them: those that learn, then those that are frozen.

    Args:
        index: int64 `[K]`, unique.
        num_learning: how many leading ones learn.
        inverse: int64 `[B]`: where row b stands in `index`, or any number from K on where it doesn't. None: made when
            a kernel wants it.
    """

    index: Tensor
    num_learning: int
    inverse: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.index.shape[0]

    @property
    def num_frozen(self) -> int:
        return self.num_rows - self.num_learning

    @property
    def learning(self) -> Tensor:
        return self.index[: self.num_learning]

    @property
    def frozen(self) -> Tensor:
        return self.index[self.num_learning :]


def orders_of(learns: Tensor) -> Tensor:
    """int64 `[2, ..., B]` from bools `[..., B]`: the rows that are True, then the others, both ascending; and where in
    that order each row stands."""
    order = (~learns).to(torch.uint8).argsort(dim=-1, stable=True)
    return torch.stack([order, order.argsort(dim=-1)])


def row_set(keep: Tensor, device: torch.device) -> RowSet:
    """The rows where `keep`, bool `[B]` on the CPU, is True: one copy to `device`."""
    order, inverse = to_device(orders_of(keep), device)
    count = int(keep.sum())
    return RowSet(order[:count], count, inverse)


@dataclass(frozen=True)
class Add:
    """`act(residual + scale · γ · branch)`.

    Args:
        rows: those of the residual that a branch is added to; None for all.
        scale: a number, for where there is no `row_scale`.
        row_scale: a factor for each row of the branch; rows with 0 are never read.
        channel_dim: that of γ.
        activation: None or `"relu"`.
    """

    rows: RowSet | None = None
    scale: float = 1.0
    row_scale: Tensor | None = None
    channel_dim: int = -1
    activation: str | None = None


@dataclass(frozen=True)
class NextInput:
    """What the next branch gets: some rows (None for all), normalised over the last dimension where `norm` is given.

    Args:
        norm: `"layer"`, `"rms"` or None.
        detached: no gradient comes back from its `"frozen"` rows, or from `"all"`, or None.
    """

    rows: RowSet | None = None
    norm: str | None = None
    eps: float = 0.0
    detached: str | None = None

    def num_with_gradient(self, batch_size: int) -> int:
        """How many leading rows a gradient may come back from."""
        if self.detached == "all":
            return 0
        if self.rows is None:
            return batch_size
        return self.rows.num_learning if self.detached == "frozen" else self.rows.num_rows


class Operands(NamedTuple):
    """The tensors of a tail, or their gradients, dtypes, or whether they are wanted. What there isn't is None.

    `residual`: `[B, ...]`; without it `update` stands alone. `update`: rows that learn, or all; `frozen_update`: those
    that are frozen. `gamma`: `[C]`. `weight`, `bias`: of the norm, `[C]`.
    """

    residual: Any = None
    update: Any = None
    frozen_update: Any = None
    gamma: Any = None
    weight: Any = None
    bias: Any = None


class Results(NamedTuple):
    """What comes of a tail, or the gradients with respect to it. What there isn't is None.

    `out`: the stream. `next`, `frozen_next`: the next branch's rows. What the norm's backward needs: `norm_input`, the
    rows of the stream that have a norm, and of each position the `mean` (LayerNorm's alone) and `rstd`, the reciprocal
    of the standard deviation.
    """

    out: Any = None
    next: Any = None
    frozen_next: Any = None
    norm_input: Any = None
    mean: Any = None
    rstd: Any = None


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if an argument is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
