"""A chain of paths in which one kernel ends a path and begins the next.

With residual r, branches f and norms n, a chain computes `r ← r + f(n(r))` path after path. One fused call of kernels
computes `r ← r + update; next_input = n(r)[rows]`, so a path's update waits until the next path's rows are known. Only
the chain sees the residual between two paths. It therefore updates it in place, unless the backward of a norm reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import check_batch
from ..kernels.autograd import FusedCall, plain_add
from ..kernels.dispatch import resolve
from ..kernels.recorded import is_recorded
from ..kernels.spec import Add, Detached, NextInput, Operands, Results
from .arguments import Args, Kwargs, for_each
from .call import PathCall
from .decision import ALL_ROWS, FROZEN, SKIP, Decision
from .norms import Norm
from .recorded import check_arguments


def run_sequence(paths: Iterable[Any], x: Tensor, args: Args, kwargs: Kwargs) -> Tensor:
    """`for path in paths: x = path(x, *args, **kwargs)`, each with the keyword arguments that its `takes()` names. Runs
    the parts of paths that are `is_plain()`, and calls others."""
    kernels, compiling = None, torch.compiler.is_compiling()
    recorded = not compiling and is_recorded(x)
    if recorded:
        check_arguments(paths, args, kwargs)
    else:
        check_batch("x", x)
    if not (recorded or compiling):
        kernels = resolve("path", Operands(x), required=False).kernels
    given: Iterable[Kwargs] = for_each(paths, args, kwargs) if args or kwargs else itertools.repeat(kwargs)
    if kernels is None:
        for path, named in zip(paths, given):  # noqa: B905 (without arguments one dict serves all)
            x = path(x, *args, **named)
        return x
    chain = _Chain(kernels, x)
    for path, named in zip(paths, given):  # noqa: B905
        if path.is_plain():
            chain.run(PathCall(path, x.shape[0], args, named))
        else:
            chain.go_on_from(path(chain.finish(), *args, **named))
    return chain.finish()


class _Chain:
    """The residual, and the update that is still to be added to it."""

    def __init__(self, kernels: ModuleType, x: Tensor):
        self._kernels, self._residual = kernels, x
        self._last_call: FusedCall | None = None
        """The call that returned the residual, if nothing else refers to the residual."""
        self._update: tuple[Operands, Add] | None = None

    def go_on_from(self, x: Tensor) -> None:
        """Replaces the residual by one that others refer to as well."""
        self._residual, self._last_call = x, None

    def finish(self) -> Tensor:
        """The residual with the last update."""
        if self._update is not None and not self._add_plainly(*self._update):
            self._run_fused_add(Operands(), None)
        return self._residual

    def _add_plainly(self, operands: Operands, add: Add) -> bool:
        """Adds an update on all rows by torch's own add, if the residual isn't the chain's own. Returns whether it did.
        That add passes the gradient on as it is, where a kernel's backward would copy it."""
        if self._last_call is not None or add.rows is not None or operands.gamma is not None:
            return False
        out = plain_add(self._residual, operands.update, add.scale)
        if out is None:
            return False
        self._update = None
        self.go_on_from(out)
        return True

    def run(self, call: PathCall) -> None:
        """Runs one path: its input comes with the sum of the last update, and its own update is kept for later."""
        module = call.module
        decision = module.binding.decider.decide(module, self._residual) if module.training else ALL_ROWS
        needs_all_rows = decision.rows is not None and call.needs_all_rows(decision.rows)
        if decision.dummy_calls or decision.row_scale is not None or needs_all_rows:
            self.go_on_from(call.run(self.finish(), decision))
            return
        if decision.kind is SKIP:
            return
        norm = Norm.of(module.norm, self._residual, decision.also_learns)
        if decision.rows is None and not norm.fused:
            inputs = Results(next=self.finish())
            self.go_on_from(inputs.next)
        else:
            inputs = self._inputs(norm, decision)
        update, frozen = call.updates(decision, inputs.next, inputs.frozen_next, norm.fused)
        gamma: Tensor | None = module.gamma
        if gamma is not None and decision.kind is FROZEN:
            gamma = gamma.detach()
        operands = Operands(self._residual, update, frozen, gamma)
        add = call.checked_add(operands, decision.rows, decision.scale)
        self._update = operands._replace(residual=None), add

    def _inputs(self, norm: Norm, decision: Decision) -> Results:
        """Computes the inputs of the branch."""
        frozen = decision.kind is FROZEN
        detached: Detached | None = None
        if decision.freeze == "branch":
            detached = "all" if frozen else "frozen"
        if norm.fused and self._update is not None and not _along_channels(*self._update, self._residual):
            self.finish()
        return self._run_fused_add(norm.operands(detached=frozen), norm.next_input(decision.rows, detached))

    def _run_fused_add(self, norm: Operands, next_input: NextInput | None) -> Results:
        operands, add = self._update or (Operands(), None)
        call = FusedCall(self._kernels, add, next_input, self._last_call)
        operands = operands._replace(residual=self._residual, weight=norm.weight, bias=norm.bias)
        results = call(operands)
        self._residual, self._last_call, self._update = results.out, call, None
        return results


def _along_channels(operands: Operands, add: Add, residual: Tensor) -> bool:
    """Whether γ lies along the norm's dimension, the last."""
    return operands.gamma is None or add.channel_dim % residual.dim() == residual.dim() - 1
