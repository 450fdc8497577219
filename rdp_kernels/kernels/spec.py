"""One call of the kernels as data: how an update is added to the residual, and which rows the next branch gets.

A kernel library serves every op of this package through two functions that take these classes, `fused_add_fwd` and
`fused_add_bwd`. The kinds of activations and of norms stand in one table each.
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
NormModule = nn.LayerNorm | nn.RMSNorm
Detached = Literal["frozen", "all"]


@dataclass(frozen=True)
class ActivationKind:
    """A function that may follow the sum.

    Args:
        code: its number in `Activation` of `csrc/arithmetic.h`, where 0 means no activation.
        formula: the function in torch.
        derivative: its derivative as a function of its output, which is what a backward has.
    """

    code: int
    formula: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


ACTIVATIONS: dict[str, ActivationKind] = {"relu": ActivationKind(1, torch.relu, lambda out: out > 0)}


@dataclass(frozen=True)
class NormKind:
    """A norm over the last dimension. The kernels divide by the root of the mean square, around the mean if it centers.

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


ACTIVATION_CODES: dict[str | None, int] = {None: 0} | {name: kind.code for name, kind in ACTIVATIONS.items()}


# Calls are made of the classes below. They are not frozen: creating frozen dataclasses takes four times as long.


@dataclass(slots=True)
class RowSet:
    """Some rows of a batch in the order in which a branch gets them: first the rows that learn, then the frozen ones.

    Args:
        index: int64 `[K]`, unique.
        num_learning: how many leading rows learn.
        inverse: int64 `[B]`: the place of row b in `index`; values of K or more mean that row b is not in it. Where it
            is None, a kernel that needs it computes it.
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
    """Sorts rows by whether they learn.

    From bools `[..., B]` returns int64 `[2, ..., B]`: the rows that are True, then the others, both ascending; and the
    place of each row in that order.
    """
    order = (~learns).to(torch.uint8).argsort(dim=-1, stable=True)
    return torch.stack([order, order.argsort(dim=-1)])


def row_set(keep: Tensor, device: torch.device) -> RowSet:
    """The rows where `keep`, bool `[B]` on the CPU, is True. Takes one copy to `device`."""
    order, inverse = to_device(orders_of(keep), device)
    count = int(keep.sum())
    return RowSet(order[:count], count, inverse)


@dataclass(slots=True)
class Add:
    """How an update is added: `act(residual + scale · γ · update)`.

    Args:
        rows: the rows of the residual that the update is added to; None means all.
        scale: a number, used where `row_scale` is None.
        row_scale: a factor for each row of the update; rows whose factor is 0 are never read.
        channel_dim: the dimension of the residual that γ lies along.
        activation: a key of `ACTIVATIONS`, or None.
    """

    rows: RowSet | None = None
    scale: float = 1.0
    row_scale: Tensor | None = None
    channel_dim: int = -1
    activation: str | None = None


@dataclass(slots=True)
class NextInput:
    """What the next branch gets: rows of the sum, normalised over the last dimension where `norm` is given.

    Args:
        rows: the rows; None means all.
        norm: a key of `NORMS`, or None.
        detached: which of the rows pass no gradient back: only the frozen ones, all, or none (None).
    """

    rows: RowSet | None = None
    norm: str | None = None
    eps: float = 0.0
    detached: Detached | None = None

    def num_with_gradient(self, batch_size: int) -> int:
        """How many leading rows may pass a gradient back."""
        if self.detached == "all":
            return 0
        if self.rows is None:
            return batch_size
        return self.rows.num_learning if self.detached == "frozen" else self.rows.num_rows


class Operands(NamedTuple):
    """The tensors that a call computes with. Also used for their gradients, their dtypes, and which gradients are
    wanted. Absent operands are None.

    Args:
        residual: `[B, ...]`; without it the scaled update itself is the result.
        update: what the branch returned, for the learning rows or for all rows.
        frozen_update: what the branch returned for the frozen rows.
        gamma: `[C]`.
        weight, bias: the norm's, `[C]`.
    """

    residual: Any = None
    update: Any = None
    frozen_update: Any = None
    gamma: Any = None
    weight: Any = None
    bias: Any = None


class Results(NamedTuple):
    """What a call returns. Also used for the gradients with respect to it. Absent results are None.

    Args:
        out: the sum, `[B, ...]`.
        next, frozen_next: the next branch's learning rows (or all rows) and its frozen rows.
        norm_input: the rows of the sum that are normed. Saved for the norm's backward, as the next two are.
        mean, rstd: the mean and the reciprocal of the standard deviation at each position. Only norms that center
            have a mean.
    """

    out: Any = None
    next: Any = None
    frozen_next: Any = None
    norm_input: Any = None
    mean: Any = None
    rstd: Any = None


Gradients = tuple[Any, Any, Any]
"""With respect to `out`, `next` and `frozen_next`; None stands for zero."""


def residual_of(operands: Operands) -> Tensor:
    """The operand that the result has its shape, dtype and device from: the residual, or the update without one."""
    like: Tensor = operands.update if operands.residual is None else operands.residual
    return like


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype of the arithmetic: float64 if an argument is float64, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32
