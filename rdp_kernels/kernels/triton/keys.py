"""What a call's kernels, tiles and results depend on: its key. Calls with equal keys share one prepared call.

A key holds what is known of tensors without their values. It holds no number of rows that varies from call to call: how
many rows a branch runs on makes no other key.
"""

from __future__ import annotations

from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..buffers import Context
from ..spec import Add, NextInput, Operands, Results

ALIGNMENT = 16
"""Bytes. Triton compiles a kernel anew for pointers that aren't multiples of it."""


SPECIAL_SCALES = (0.0, 1.0)
"""The numbers for which a call reads less."""


class Kind(NamedTuple):
    """What a key holds of a tensor. `misaligned_by` is its address modulo `ALIGNMENT`. `is_negated`: memory holds the
    negative of its values, as of the imaginary part of a conjugate. `shape` is without dimension 0
    for a tensor with a row for each sample. In a backward shape and device aren't looked at, because the forward's
    decide them. But saved tensors may come back with other strides and addresses, if autograd's hooks kept them
    elsewhere.
    """

    strides: tuple[int, ...]
    dtype: torch.dtype
    misaligned_by: int
    is_negated: bool
    shape: tuple[int, ...] = ()
    device: torch.device | None = None

    @property
    def is_plain_vector(self) -> bool:
        return self.strides == (1,) and not self.is_negated


def row_stride(kind: Kind | None) -> int:
    return 0 if kind is None else kind.strides[0]


class AddKey(NamedTuple):
    """Of an `Add` and its operands. `scale` is 0 or 1, or None for any other number."""

    update: Kind | None
    frozen_update: Kind | None
    gamma: Kind | None
    row_scale: Kind | None
    has_rows: bool
    scale: float | None
    channel_dim: int
    activation: str | None


class NextKey(NamedTuple):
    """Of a `NextInput` and its operands."""

    weight: Kind | None
    bias: Kind | None
    has_rows: bool
    has_frozen: bool
    norm: str | None
    eps: float
    saves: bool


NO_ADD = AddKey(None, None, None, None, False, 1.0, -1, None)
NO_NEXT_INPUT = NextKey(None, None, False, False, None, 0.0, False)


class ForwardKey(NamedTuple):
    batch_size: int
    residual: Kind | None
    add: AddKey | None
    next: NextKey | None
    in_place: bool


class BackwardKey(NamedTuple):
    """`context` is the forward's; contexts are equal only to themselves."""

    context: Context
    gradients: tuple[Kind | None, Kind | None, Kind | None]
    results: tuple[Kind | None, Kind | None, Kind | None, Kind | None]
    """Of the sum, what the norm saw, the means and the reciprocals of standard deviations."""
    weight: Kind | None
    add: AddKey | None
    next: NextKey | None
    wanted: Operands
    in_place: bool


# Keys are made at every call, as plain tuples, because making named tuples takes three times as long. `named_forward`
# and `named_backward` are for the first call of a kind.


def forward_key(
    operands: Operands, add: Add | None, next_input: NextInput | None, saves: bool, in_place: bool, batch_size: int
) -> tuple:
    """As a `ForwardKey`."""
    residual, update, frozen_update, gamma, weight, bias = operands
    return (
        batch_size,
        residual if residual is None else of_rows(residual),
        add if add is None else _add_key(update, frozen_update, gamma, add),
        next_input if next_input is None else _next_key(weight, bias, next_input, saves),
        in_place,
    )


def backward_key(
    context: Context,
    operands: Operands,
    results: Results,
    gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
    add: Add | None,
    next_input: NextInput | None,
    wanted: Operands,
    in_place: bool,
) -> tuple:
    """As a `BackwardKey`."""
    _, update, _, gamma, weight, _ = operands
    dout, dnext, dfrozen_next = gradients
    out, _, _, norm_input, mean, rstd = results
    return (
        context,
        (
            dout if dout is None else of(dout),
            dnext if dnext is None else of(dnext),
            dfrozen_next if dfrozen_next is None else of(dfrozen_next),
        ),
        (
            out if out is None else of(out),
            norm_input if norm_input is None else of(norm_input),
            mean if mean is None else of(mean),
            rstd if rstd is None else of(rstd),
        ),
        weight if weight is None else of(weight),
        add if add is None else saved_add_key(update, gamma, add),
        next_input if next_input is None else _next_key(None, None, next_input, False),
        wanted,
        in_place,
    )


def saved_add_key(update: Tensor | None, gamma: Tensor | None, add: Add) -> tuple:
    """As an `AddKey` in a backward."""
    row_scale = add.row_scale
    return (
        update if update is None else of(update),
        None,
        gamma if gamma is None else of(gamma),
        row_scale if row_scale is None else of(row_scale),
        add.rows is not None,
        add.scale if add.scale in SPECIAL_SCALES else None,
        add.channel_dim,
        add.activation,
    )


def _add_key(update: Tensor | None, frozen_update: Tensor | None, gamma: Tensor | None, add: Add) -> tuple:
    scale, row_scale = add.scale, add.row_scale
    return (
        update if update is None else of_rows(update),
        frozen_update if frozen_update is None else of_rows(frozen_update),
        gamma if gamma is None else of_vector(gamma),
        row_scale if row_scale is None else of_rows(row_scale),
        add.rows is not None,
        scale if scale in SPECIAL_SCALES else None,
        add.channel_dim,
        add.activation,
    )


def _next_key(weight: Tensor | None, bias: Tensor | None, next_input: NextInput, saves: bool) -> tuple:
    rows = next_input.rows
    return (
        weight if weight is None else of_vector(weight),
        bias if bias is None else of_vector(bias),
        rows is not None,
        rows is not None and rows.index.shape[0] > rows.num_learning,
        next_input.norm,
        next_input.eps,
        saves,
    )


def of(x: Tensor) -> tuple:
    """As a `Kind` in a backward."""
    return x.stride(), x.dtype, x.data_ptr() % ALIGNMENT, x.is_neg()


def of_vector(x: Tensor) -> tuple:
    """As a `Kind`."""
    return x.stride(), x.dtype, x.data_ptr() % ALIGNMENT, x.is_neg(), x.shape, x.device


def of_rows(x: Tensor) -> tuple:
    """As a `Kind` of a tensor with rows."""
    return x.stride(), x.dtype, x.data_ptr() % ALIGNMENT, x.is_neg(), x.shape[1:], x.device


def named_forward(key: tuple) -> ForwardKey:
    batch_size, residual, add, next_input, in_place = key
    return ForwardKey(batch_size, named(residual), named_add(add), named_next(next_input), in_place)


def named_backward(key: tuple) -> BackwardKey:
    context, gradients, results, weight, add, next_input, wanted, in_place = key
    dout, dnext, dfrozen_next = map(named, gradients)
    out, norm_input, mean, rstd = map(named, results)
    return BackwardKey(
        context,
        (dout, dnext, dfrozen_next),
        (out, norm_input, mean, rstd),
        named(weight),
        named_add(add),
        named_next(next_input),
        wanted,
        in_place,
    )


def named(kind: tuple | None) -> Kind | None:
    return None if kind is None else Kind(*kind)


def named_add(add: tuple | None) -> AddKey | None:
    if add is None:
        return None
    update, frozen_update, gamma, row_scale, *others = add
    return AddKey(named(update), named(frozen_update), named(gamma), named(row_scale), *others)


def named_next(next_input: tuple | None) -> NextKey | None:
    if next_input is None:
        return None
    weight, bias, *others = next_input
    return NextKey(named(weight), named(bias), *others)


Value = TypeVar("Value")


class Cache(dict[tuple, Value], Generic[Value]):
    """Prepared calls by key, at most `LARGEST` of them: a full cache drops the oldest eighth. Threads may share it."""

    LARGEST = 4096

    def add(self, key: tuple, value: Value) -> Value:
        if len(self) >= self.LARGEST:
            for old in list(self)[: self.LARGEST // 8]:
                self.pop(old, None)
        self[key] = value
        return value
