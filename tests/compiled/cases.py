"""One fused add, forward and backward, as a row of a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rdp_kernels.kernels.spec import Add, NextInput, Operands, RowSet
from rdp_kernels.kernels.triton import kernels


def contiguous(x: Tensor) -> Tensor:
    return x


def channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def after_class_token(x: Tensor) -> Tensor:
    """Sequences without their first token."""
    return x.new_empty(x.shape[0], x.shape[1] + 1, *x.shape[2:])[:, 1:]


def one_element_on(x: Tensor) -> Tensor:
    """The address is divisible by the element's size and by nothing more."""
    return x.new_empty(x.numel() + 1)[1:].view(x.shape)


def one_element_apart(x: Tensor) -> Tensor:
    """There is one element between neighbouring samples."""
    return x.new_empty(x.shape[0], x[0].numel() + 1)[:, :-1].unflatten(1, x.shape[1:])


@dataclass(frozen=True)
class Case:
    """One row of the table. Its tensors have no values, because no kernel runs on them.

    Args:
        why: the row's reason.
        shape: the residual's.
        residual, update, vectors: dtypes; None stands for the residual's. The vectors are γ and the norm's weight and
            bias.
        channel_dim: the dimension of γ; None: there is no γ.
        gamma_learns: whether dγ is wanted.
        rows: the rows of the update: "all", "some" or "mixed" (some of them frozen); None: nothing is added.
        next_rows: the same for the next branch; None: there is no next branch.
        norm: the kind of norm before the next branch.
        row_scale: each row of the update has a factor.
        in_place: the sum overwrites the residual, and the residual's gradient overwrites the sum's.
        alone: there is no residual.
        inverted: a list of rows comes with its inverse.
        place: functions that put the residual and the update elsewhere in memory.
        narrow: the arguments that kernels are expected to read and write element by element, not in 16 bytes.
        quick: the case also runs where time is short.
    """

    why: str
    shape: tuple[int, ...]
    residual: torch.dtype = torch.bfloat16
    update: torch.dtype | None = None
    vectors: torch.dtype | None = None
    channel_dim: int | None = -1
    gamma_learns: bool = True
    rows: str | None = "all"
    next_rows: str | None = None
    norm: str | None = None
    activation: str | None = None
    row_scale: bool = False
    in_place: bool = False
    alone: bool = False
    inverted: bool = True
    place: tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] = (contiguous, contiguous)
    narrow: frozenset[str] = frozenset()
    quick: bool = False

    @property
    def widest(self) -> int:
        """The bytes of an element, of the widest tensor with rows."""
        return max(self.residual.itemsize, (self.update or self.residual).itemsize)

    def run(self) -> None:
        """Calls the launchers as autograd does."""
        add, next_input, num_saved = None, None, 0
        if self.rows is not None:
            row_scale = torch.empty(self._num_rows(self.rows)) if self.row_scale else None
            add = Add(self._row_set(self.rows), 1.25, row_scale, self.channel_dim or -1, self.activation)
        if self.next_rows is not None:
            next_input = NextInput(self._row_set(self.next_rows), self.norm, 1e-6)
            num_saved = 0 if self.norm is None else self._num_rows(self.next_rows)
        operands = self._operands()
        results, context = kernels().fused_add_fwd(operands, add, next_input, num_saved, self.in_place)
        out = operands.residual if results.out is None else results.out
        saved = results._replace(out=None if self.activation is None else out, next=None, frozen_next=None)
        gradients = (None if x is None else torch.empty_like(x) for x in (out, results.next, results.frozen_next))
        wanted = Operands(*(x is not None for x in operands))
        kernels().fused_add_bwd(
            context,
            Operands(update=operands.update, gamma=operands.gamma, weight=operands.weight),
            saved,
            tuple(gradients),
            add,
            next_input,
            wanted._replace(gamma=wanted.gamma and self.gamma_learns),
            self.in_place,
        )

    def _operands(self) -> Operands:
        place_residual, place_update = self.place
        rows = self._row_set(self.rows)
        update = frozen_update = gamma = None
        if self.rows is not None:
            num_learning = self.shape[0] if rows is None else rows.num_learning
            update = place_update(self._empty(num_learning))
            frozen_update = place_update(self._empty(rows.num_frozen)) if self.rows == "mixed" else None
            gamma = None if self.channel_dim is None else self._vector(self.channel_dim)
        return Operands(
            residual=None if self.alone else place_residual(torch.empty(self.shape, dtype=self.residual)),
            update=update,
            frozen_update=frozen_update,
            gamma=gamma,
            weight=None if self.norm is None else self._vector(-1),
            bias=self._vector(-1) if self.norm == "layer" else None,
        )

    def _empty(self, num_rows: int) -> Tensor:
        return torch.empty(num_rows, *self.shape[1:], dtype=self.update or self.residual)

    def _vector(self, dim: int) -> Tensor:
        return torch.empty(self.shape[dim], dtype=self.vectors or self.residual)

    def _num_rows(self, which: str) -> int:
        rows = self._row_set(which)
        return self.shape[0] if rows is None else rows.num_rows

    def _row_set(self, which: str | None) -> RowSet | None:
        """Six rows of the batch; all of them or half of them learn."""
        if which in (None, "all"):
            return None
        order = torch.arange(self.shape[0])
        return RowSet(order[:6], {"some": 6, "mixed": 3}[which], order if self.inverted else None)
