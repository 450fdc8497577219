"""The rows of a batch that a branch runs on, as the ops and kernels take them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._device import to_device


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
