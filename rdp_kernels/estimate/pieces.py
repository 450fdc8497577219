"""The costs of a model's pieces. A piece is one call of a path, or the part of the rest between two calls.

The rest is what a model computes outside of branches. Shortcuts belong to the rest. Piece l of the rest lies between
the end of call l − 1 and the end of call l. Calls are numbered in the order in which the model makes them. Each call is
assumed to depend on all calls before it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

STATES = ("learning", "learning_first", "frozen", "detached")
"""The states of a branch.

- learning: it learns, and its input needs a gradient.
- learning_first: it learns, and its input needs no gradient, because nothing before it learns.
- frozen: it is frozen, and gradients pass through it.
- detached: it is frozen, and no gradient passes through it.
"""
FROZEN_STATES = ("frozen", "detached")
REST_STATES = ("learning", "frozen")


@dataclass
class Quantity:
    """FLOPs, bytes or seconds of all pieces, float64.

    Attributes:
        forward: the forward of the rest.
        rest: all other costs of the rest, by the state of the rest and by piece, `[2, calls + 1]`. Row 0 holds if no
            path before the piece learns, row 1 if one does.
        branch: the cost of each call on the whole batch, by state, `[calls]`.
        fixed: the part of `branch` that doesn't shrink with the number of rows, by state, `[calls]`.
    """

    forward: float
    rest: dict[str, Tensor]
    branch: dict[str, Tensor]
    fixed: dict[str, Tensor]

    @classmethod
    def zeros(cls, calls: int) -> Quantity:
        rest = {state: torch.zeros(2, calls + 1, dtype=torch.float64) for state in REST_STATES}
        branch, fixed = ({state: torch.zeros(calls, dtype=torch.float64) for state in STATES} for _ in range(2))
        return cls(0.0, rest, branch, fixed)


@dataclass
class Boundaries:
    """The inputs and outputs of calls. Several pieces may save the same tensor, whose bytes count once.

    Tensor 2l is the input of call l, and tensor 2l + 1 is its output. Piece (n + 1) // 2 of the rest touches tensor n.

    Attributes:
        bytes: `[2 · calls]`.
        input_index: int64 `[calls]`, the number of each call's input. If an earlier call has the same tensor as its
            input or output, it is the number that the tensor has there.
        has_activation: bool `[calls]`, whether an activation follows the sum. It saves the output.
        returns_input: bool `[calls]`, whether the output is the input if the branch is left out.
        by_branch: by state, bool `[calls]`, whether the branch saves its input.
        by_rest: by state of the rest, bool `[2, 2 · calls]`, which tensors the rest saves. Rows as in `Quantity.rest`.
    """

    bytes: Tensor
    input_index: Tensor
    has_activation: Tensor
    returns_input: Tensor
    by_branch: dict[str, Tensor]
    by_rest: dict[str, Tensor]

    @classmethod
    def none(cls, calls: int) -> Boundaries:
        flags = functools.partial(torch.zeros, dtype=torch.bool)
        return cls(
            torch.zeros(2 * calls, dtype=torch.float64),
            2 * torch.arange(calls),
            flags(calls),
            flags(calls),
            {state: flags(calls) for state in STATES},
            {state: flags((2, 2 * calls)) for state in REST_STATES},
        )


@dataclass
class PieceCosts:
    """The costs of a model's pieces on one batch.

    Attributes:
        num_paths: the number of the model's paths. One that isn't called costs nothing.
        path: int64 `[calls]`, the path that is called.
        learns: bool `[calls]`, whether the path has parameters that require grad.
        whole: bool `[calls]`, whether the path runs on all rows or none, because it has BatchNorm.
        input_needs_grad: by state of the rest, bool `[calls]`, whether anything but paths before the call learns.
        flops: FLOPs of forward and backward.
        saved: bytes that pieces save, without inputs and outputs of calls.
        boundaries: the inputs and outputs of calls.
        seconds: seconds of forward and backward. None if they weren't measured.
    """

    num_paths: int
    path: Tensor
    learns: Tensor
    whole: Tensor
    input_needs_grad: dict[str, Tensor]
    flops: Quantity
    saved: Quantity
    boundaries: Boundaries
    seconds: Quantity | None
