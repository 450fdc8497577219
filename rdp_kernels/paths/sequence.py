"""A chain of paths in which one kernel ends a path and begins the next.

With residual r, branches f and norms n, a chain computes `r ← r + f(n(r))` path after path. One fused call of kernels
computes `r ← r + update; next_input = n(r)[rows]`, so a path's update waits until the next path's rows are known. Only
the chain sees the residual between two paths. It therefore updates it in place, unless the backward of a norm reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._utils.checks import check_batch
from ..kernels.autograd import FusedCall, fused_add, plain_add
from ..kernels.dispatch import resolve
from ..kernels.recorded import is_recorded
from ..kernels.spec import Add, Detached, NextInput, Operands, Results, RowSet
from .arguments import Args, Kwargs, for_each
from .call import PathCall
from .decision import ALL_ROWS, FROZEN, SKIP, Decision
from .norms import NO_NORM, Norm
from .recorded import check_arguments


def run_sequence(paths: Iterable[Any], x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
    """`for path in paths: x = path(x, *args, **kwargs)`, each with the keyword arguments that its `takes()` names. Runs
    the parts of paths that are `is_plain()`, and calls others."""
    served, compiling = False, torch.compiler.is_compiling()
    recorded = not compiling and is_recorded(x)
    if recorded:
        check_arguments(paths, args, kwargs)
    else:
        check_batch("x", x)
    if not (recorded or compiling):
        served = resolve("path", Operands(x), required=False).library is not None
    given: Iterable[Kwargs] = for_each(paths, args, kwargs) if args or kwargs else itertools.repeat(kwargs)
    if not served:
        for path, named in zip(paths, given):  # noqa: B905 (without arguments one dict serves all)
            x = path(x, *args, **named)
        return x
    chain = _Chain(x)
    for path, named in zip(paths, given):  # noqa: B905
        if path.is_plain():
            chain.run(PathCall(path, x.shape[0], args, named))
        else:
            chain.go_on_from(path(chain.finish(), *args, **named))
    return chain.finish()


class _Chain:
    """The residual, and the update that is still to be added to it."""

    def __init__(self, x: Tensor):
        self._residual = x
        self._last_call: FusedCall | None = None
        """The call that returned the residual, if nothing else refers to the residual."""
        self._update: _Update | None = None
        self._libraries: dict[tuple[Any, ...], ModuleType | None] = {}

    def go_on_from(self, x: Tensor) -> None:
        """Replaces the residual by one that others refer to as well."""
        self._residual, self._last_call = x, None

    def finish(self) -> Tensor:
        """The residual with the last update."""
        if self._update is not None and not self._add_plainly(self._update):
            self._run_fused_add(NO_NORM, None)
        return self._residual

    def _add_plainly(self, update: _Update) -> bool:
        """Adds an update on all rows by torch's own add, if the residual isn't the chain's own. Returns whether it did.
        That add passes the gradient on as it is, where a kernel's backward would copy it."""
        if self._last_call is not None or update.rows is not None or update.gamma is not None:
            return False
        out = plain_add(self._residual, update.update, update.scale)
        if out is None:
            return False
        self._update = None
        self.go_on_from(out)
        return True

    def run(self, call: PathCall) -> None:
        """Runs one path: its input comes with the sum of the last update, and its own update is kept for later."""
        module = call.module
        decision = module.binding.decider.decide(module, self._residual) if module.training else ALL_ROWS
        if decision.dummy_calls or decision.row_scale is not None or call.needs_all_rows(decision):
            self.go_on_from(call.run(self.finish(), decision))
            return
        if decision.kind is SKIP:
            return
        rows, norm = decision.rows, Norm.of(module.norm, self._residual, decision.also_learns)
        if rows is None and not norm.fused:
            x, x_frozen = self.finish(), None
            self.go_on_from(x)
        else:
            inputs = self._inputs(norm, decision)
            x, x_frozen = inputs.next, inputs.frozen_next
        update, frozen_update = call.updates(decision, x, x_frozen, norm.fused)
        gamma: Tensor | None = module.gamma
        if gamma is not None and decision.kind is FROZEN:
            gamma = gamma.detach()
        self._update = _Update(call, update, frozen_update, gamma, rows, decision.scale)

    def _inputs(self, norm: Norm, decision: Decision) -> Results:
        """Computes the inputs of the branch."""
        frozen = decision.kind is FROZEN
        detached: Detached | None = None
        if decision.freeze == "branch":
            detached = "all" if frozen else "frozen"
        if norm.fused and self._update is not None and not _along_channels(self._update, self._residual):
            self.finish()
        return self._run_fused_add(norm.detached() if frozen else norm, norm.next_input(decision.rows, detached))

    def _run_fused_add(self, norm: Norm, next_input: NextInput | None) -> Results:
        residual, update = self._residual, self._update
        if update is None:
            operands, add = Operands(residual, None, None, None, norm.weight, norm.bias), None
        else:
            operands = Operands(residual, update.update, update.frozen_update, update.gamma, norm.weight, norm.bias)
            add = update.call.checked_add(operands, update.rows, update.scale)
        self._update = None
        kernels = self._kernels_for(operands, add, next_input)
        if kernels is None:
            results = fused_add("path", operands, add, next_input)
            self.go_on_from(results.out)
            return results
        call = FusedCall(kernels, add, next_input, self._last_call)
        results = call(operands)
        self._residual, self._last_call = results.out, call
        return results

    def _kernels_for(self, operands: Operands, add: Add | None, next_input: NextInput | None) -> ModuleType | None:
        """The kernels that serve a call with its norm, or None. On GPUs one library may serve sums, and another one
        norms."""
        residual, update, frozen_update, gamma, weight, bias = operands
        kind = (
            *map(type, operands),
            residual.shape,
            residual.dtype,
            residual.device,
            None if next_input is None else next_input.norm,
            None if update is None else update.dtype,
            None if frozen_update is None else frozen_update.dtype,
            None if gamma is None else gamma.dtype,
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
        )
        if kind not in self._libraries:
            served = resolve("path", operands, add, next_input, required=False)
            self._libraries[kind] = served.kernels if served.takes_norm else None
        return self._libraries[kind]


class _Update(NamedTuple):
    """The update of a call that is still to be added to the residual. It is checked then, unless torch adds it."""

    call: PathCall
    update: Tensor
    frozen_update: Tensor | None
    gamma: Tensor | None
    rows: RowSet | None
    scale: float


def _along_channels(update: _Update, residual: Tensor) -> bool:
    """Whether γ lies along the norm's dimension, the last."""
    return update.gamma is None or update.call.module.channel_dim % residual.dim() == residual.dim() - 1
