"""The pieces of a model and what they cost: every call of a path by itself, and the rest cut where a call ends.

Piece l of the rest is what is computed outside of branches between the ends of call l − 1 and of call l, shortcuts
among it. Calls count in the order in which the model makes them, and each is taken to feed on those before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STATES = ("learn", "first", "frozen", "still")
"""Of a call whose branch runs: it learns; it learns and nothing before it does, so that its input needs no gradient; it
is frozen and gradients pass it; it runs and no gradient enters it."""
REST = ("learns", "frozen")


@dataclass
class Quantity:
    """FLOPs, bytes or seconds of all pieces, float64.

    Args:
        forward: of the rest.
        rest: beyond that, where the rest learns and where it is frozen: `[2, calls + 1]`, by piece, first where no path
            before it learns and then where one does.
        branch: by state, `[calls]`, on the whole batch.
        fixed: the part of it that fewer rows don't save.
    """

    forward: float
    rest: dict[str, Tensor]
    branch: dict[str, Tensor]
    fixed: dict[str, Tensor]

    @classmethod
    def zeros(cls, calls: int) -> Quantity:
        def by_state() -> dict[str, Tensor]:
            return {state: torch.zeros(calls, dtype=torch.float64) for state in STATES}

        return cls(0.0, {kind: torch.zeros(2, calls + 1, dtype=torch.float64) for kind in REST}, by_state(), by_state())


@dataclass
class Streams:
    """The tensors between branches: several pieces may save one, which takes its bytes once. Number 2l is what call l
    gets, 2l + 1 what it gives; piece (n + 1) // 2 is about where tensor n is.

    Args:
        bytes: `[2 · calls]`.
        entry: int64 `[calls]`: the first number of what each call gets, which an earlier call may give, or get too.
        activation: bool `[calls]`: whether an activation follows the sum, which saves what the call gives.
        passed_on: bool `[calls]`: whether the call gives what it gets where its branch is left out.
        by_branch: by state, bool `[calls]`: whether the branch saves what it gets.
        by_rest: as `Quantity.rest`, bool `[2, 2 · calls]`.
    """

    bytes: Tensor
    entry: Tensor
    activation: Tensor
    passed_on: Tensor
    by_branch: dict[str, Tensor]
    by_rest: dict[str, Tensor]

    @classmethod
    def none(cls, calls: int) -> Streams:
        def flags(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.bool)

        return cls(
            torch.zeros(2 * calls, dtype=torch.float64),
            2 * torch.arange(calls),
            flags(calls),
            flags(calls),
            {state: flags(calls) for state in STATES},
            {kind: flags(2, 2 * calls) for kind in REST},
        )


@dataclass
class Pieces:
    """A model, measured on one batch.

    Args:
        num_paths: of the model; one that isn't called costs nothing.
        path: int64 `[calls]`, which path is called.
        learns: bool `[calls]`, whether it has parameters that can.
        whole: bool `[calls]`, whether BatchNorm has it run on all rows or none.
        follows: by what the rest does, bool `[calls]`: whether something before it learns that is no path.
        seconds: None where not timed.
    """

    num_paths: int
    path: Tensor
    learns: Tensor
    whole: Tensor
    follows: dict[str, Tensor]
    flops: Quantity
    saved: Quantity
    streams: Streams
    seconds: Quantity | None
