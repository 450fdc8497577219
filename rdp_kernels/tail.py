"""The tail of a path as data: how its branch is added to the stream, and what the next branch gets of the sum.

A kernel library serves every op of this package through two functions on these, `tail_fwd` and `tail_bwd`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from .rows import RowSet


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
class Next:
    """What the next branch gets: some rows (None for all), normalised over the last dimension where `norm` is given.

    Args:
        norm: `"layer"`, `"rms"` or None.
        constant: no gradient comes back from its `"frozen"` rows, or from `"all"`, or None.
    """

    rows: RowSet | None = None
    norm: str | None = None
    eps: float = 0.0
    constant: str | None = None

    def num_with_gradient(self, batch_size: int) -> int:
        """How many leading rows a gradient may come back from."""
        if self.constant == "all":
            return 0
        if self.rows is None:
            return batch_size
        return self.rows.num_learning if self.constant == "frozen" else self.rows.num_rows


class Operands(NamedTuple):
    """The tensors of a tail, or their gradients, dtypes, or whether they are wanted. What there isn't is None.

    `residual`: `[B, ...]`; without it `branch` stands alone. `branch`: rows that learn, or all; `frozen`: those that
    are frozen. `gamma`: `[C]`. `weight`, `bias`: of the norm, `[C]`.
    """

    residual: Any = None
    branch: Any = None
    frozen: Any = None
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
