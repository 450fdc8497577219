"""One call of a path, repeated on its own in each state."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

from .._utils.device import to_device
from ..kernels.spec import RowSet, orders_of, row_set
from ..paths.call import PathCall
from ..paths.decision import FROZEN, LEARN, ROWS, Decision
from ..paths.freezing import FreezeBN, tensors_of
from ..paths.path import batch_norms_of, modules_of, parameters_of
from .meters import Clock, Flops, Saved
from .pieces import FROZEN_STATES, STATES

REPEATS = 5
"""How often a piece is timed. The fastest run counts. Of five runs, one is hardly disturbed by other programs."""


@dataclass(frozen=True)
class RepeatedCall:
    """A call of a path with input `x`, to be measured.

    Attributes:
        call: the call.
        x: its input.
        residual: the shortcut's output. None if the residual is `x` itself.
        freeze_bn: the scheme's option.
        argument_grads: which of the further arguments require grad, by whether the rest is frozen.
    """

    call: PathCall
    x: Tensor
    residual: Tensor | None
    freeze_bn: FreezeBN
    argument_grads: Mapping[bool, Sequence[bool]]

    def likeness(self, *counts: Hashable) -> Hashable:
        """Returns a key that is equal for calls that take the same time.

        These are calls of the same modules with tensors of the same shapes, for which `counts` are the same.
        """
        modules = tuple(type(module) for module in modules_of(self.call.module))
        weights = tuple((p.shape, p.dtype, p.requires_grad) for p in parameters_of(self.call.module))
        return type(self.call.module), modules, weights, self.x.shape, self.x.stride(), self.x.dtype, counts

    def flops(self, state: str) -> float:
        """FLOPs of a forward and a backward."""
        call, x, decision = self._prepare(state)
        with Flops(self.x.device) as flops:
            _backward(call.run_here(x, decision))
        self._forget()
        return float(flops.read())

    def saved(self, state: str, own: Sequence[Tensor]) -> tuple[float, bool]:
        """Returns the bytes that autograd saves besides input, output and arguments, and whether it saves the input."""
        call, x, decision = self._prepare(state)
        saved = Saved([*own, *tensors_of((call.args, call.kwargs))])
        with saved.watching():
            out = call.run_here(x, decision)
        input_too = saved.take(x)
        saved.take(out)
        return saved.bytes()[0], input_too

    def seconds(self) -> dict[str, tuple[float, float]]:
        """Returns seconds on the whole batch, by state, and the part that doesn't shrink with the number of rows."""
        runs: dict[tuple[str, str], RowSet | None] = {(state, "whole"): None for state in STATES}
        size = self.call.batch_size
        keep = torch.arange(size) % 2 == 0
        share = int(keep.sum()) / size
        splits = self.call.module.mode == "sample" and size > 1 and not batch_norms_of(self.call.module)
        if splits:
            order, inverse = to_device(orders_of(keep), self.x.device)
            mixed = RowSet(order, int(keep.sum()), inverse)
            runs |= {("learning", "some"): row_set(keep, self.x.device)}
            runs |= {(state, "mixed"): mixed for state in FROZEN_STATES}
        # Runs take turns, as their differences matter. The fastest counts, as other programs only add time.
        rounds = [{run: self._seconds(run[0], rows) for run, rows in runs.items()} for _ in range(1 + REPEATS)]
        fastest = {run: min(times[run] for times in rounds[1:]) for run in runs}
        whole, fixed = {state: fastest[state, "whole"] for state in STATES}, dict.fromkeys(STATES, 0.0)
        if splits:
            learning = fastest["learning", "some"]
            fixed["learning"] = fixed["learning_first"] = _fixed_part(whole["learning"], learning, share)
            for state in FROZEN_STATES:
                fixed[state] = _fixed_part(whole[state], fastest[state, "mixed"] - learning, 1 - share)
        return {state: (whole[state], fixed[state]) for state in STATES}

    def _prepare(self, state: str, rows: RowSet | None = None) -> tuple[PathCall, Tensor, Decision]:
        """Returns the call in `state`, on copies of its inputs. With `rows`, `state` is that of the frozen rows."""
        passes = rows is not None or state in ("learning", "frozen")
        frozen = state in FROZEN_STATES
        freeze = "branch" if state == "detached" else "parameters"
        kind = FROZEN if frozen else LEARN
        if rows is not None:
            kind = ROWS
        decision = Decision(kind, rows, freeze=freeze, freeze_bn=self.freeze_bn)
        arguments, structure = pytree.tree_flatten((self.call.args, self.call.kwargs))
        flags = self.argument_grads[frozen]
        entering = (_copied(v, passes and flag) for v, flag in zip(arguments, flags, strict=True))
        args, kwargs = pytree.tree_unflatten(list(entering), structure)
        residual = None if self.residual is None else _copied(self.residual, passes)
        call = PathCall(self.call.module, self.call.batch_size, args, kwargs, residual)
        return call, _copied(self.x, passes), decision

    def _seconds(self, state: str, rows: RowSet | None) -> float:
        """Seconds of one forward and backward."""
        clock = Clock(self.x.device)
        grad = torch.ones_like(self.x if self.residual is None else self.residual)
        call, x, decision = self._prepare(state, rows)
        start = clock.read()
        _backward(call.run_here(x, decision), grad)
        seconds = clock.spent(start, clock.read())
        self._forget()
        return seconds

    def _forget(self) -> None:
        for parameter in parameters_of(self.call.module):
            parameter.grad = None


def argument_grads(call: PathCall) -> list[bool]:
    """Whether each further argument requires grad, with containers flattened."""
    leaves = pytree.tree_leaves((call.args, call.kwargs))
    return [isinstance(value, Tensor) and value.requires_grad for value in leaves]


def _copied(value: Any, requires_grad: bool) -> Any:
    """Copies a tensor and sets `requires_grad`. The copy isn't a leaf, so the model may write to it."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return value.requires_grad_().clone() if requires_grad else value.clone()


def _backward(out: Tensor, grad: Tensor | None = None) -> None:
    if out.requires_grad:
        out.backward(torch.ones_like(out) if grad is None else grad)


def _fixed_part(whole: float, part: float, share: float) -> float:
    """The part of `whole` that doesn't depend on the number of rows.

    `share` of the rows take `part`, and time is linear in the number of rows.
    """
    return max(0.0, (part - share * whole) / (1 - share))
