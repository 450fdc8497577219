"""A chain of paths in which the tail of one and the head of the next are one kernel.

With stream s, branches f and norms n, a chain computes `s ← s + f(n(s))` path after path. What kernels compute in one
go is `s ← s + update; next input = n(s)[rows]`: the update of one path waits until the next path's rows are known. The
stream in between is seen by nobody but the chain, which therefore updates it in place, unless the backward of a norm
reads it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import check_stream
from ..kernels.autograd import FusedCall, plain_add
from ..kernels.dispatch import Kernels, resolve
from ..kernels.recorded import is_recorded
from ..kernels.spec import Add, NextInput, Operands, Results
from .arguments import for_each
from .call import PathCall
from .norms import Norm
from .path import Decision
from .recorded import check_arguments


def run_sequence(paths: Iterable[Any], x: Tensor, args: tuple, kwargs: dict) -> Tensor:
    """`for path in paths: x = path(x, *args, **kwargs)`, each with those keyword arguments that it takes. A path is a
    module that owns one; its `is_plain()` says whether calling it is nothing but `run_path`, so that its pieces may be
    run instead, and its `takes()` what it takes."""
    kernels, compiling = None, torch.compiler.is_compiling()
    recorded = not compiling and is_recorded(x)
    if recorded:
        check_arguments(paths, args, kwargs)
    else:
        check_stream("x", x)
    if not (recorded or compiling):
        kernels = resolve("path", Operands(x), required=False).kernels
    given: Iterable[dict] = for_each(paths, args, kwargs) if args or kwargs else itertools.repeat(kwargs)
    if kernels is None:
        for path, named in zip(paths, given):  # noqa: B905 (without arguments one dict serves all)
            x = path(x, *args, **named)
        return x
    chain = _Chain(kernels, x)
    for path, named in zip(paths, given):  # noqa: B905
        if path.is_plain():
            chain.run(PathCall(path, x.shape[0], args, named))
        else:
            chain.expose(path(chain.finish(), *args, **named))
    return chain.finish()


class _Chain:
    """The stream, and the update that is still to be added to it."""

    def __init__(self, kernels: Kernels, x: Tensor):
        self._kernels, self._stream = kernels, x
        self._tail: FusedCall | None = None
        """Where the stream comes from, if nobody else has it."""
        self._update: tuple[Operands, Add] | None = None

    def expose(self, x: Tensor) -> None:
        """Goes on from a stream that others have."""
        self._stream, self._tail = x, None

    def finish(self) -> Tensor:
        """The stream with all that was to be added."""
        if self._update is not None and not self._add_plainly(*self._update):
            self._run_fused_add(Operands(), None)
        return self._stream

    def _add_plainly(self, operands: Operands, add: Add) -> bool:
        """Whether torch's own add did it all: a branch on all rows, added to a stream that isn't ours to change. It has
        no backward, where a kernel's would copy the gradient."""
        if self._tail is not None or add.rows is not None or operands.gamma is not None:
            return False
        out = plain_add(self._stream, operands.update, add.scale)
        if out is None:
            return False
        self._update = None
        self.expose(out)
        return True

    def run(self, call: PathCall) -> None:
        """One path: takes its input from the last update's tail, and leaves an update of its own."""
        decision = call.decide(self._stream)
        whole = decision.row_scale is not None or (decision.rows is not None and call.needs_all_rows(decision.rows))
        if decision.dummy_calls or whole:
            self.expose(call.run(self.finish(), decision))
            return
        if not decision.runs:
            return
        norm = Norm.of(call.module.norm, self._stream, decision.also_learns)
        if decision.rows is None and not norm.fused:
            inputs = Results(next=self.finish())
            self.expose(inputs.next)
        else:
            inputs = self._head(norm, decision)
        update, frozen = call.updates(decision, inputs.next, inputs.frozen_next, norm.fused)
        gamma: Tensor | None = call.module.gamma
        if gamma is not None and decision.frozen:
            gamma = gamma.detach()
        operands = Operands(self._stream, update, frozen, gamma)
        add = call.checked_add(operands, decision.rows, decision.scale)
        self._update = operands._replace(residual=None), add

    def _head(self, norm: Norm, decision: Decision) -> Results:
        """What the branch gets."""
        detached = None
        if decision.freeze == "branch":
            detached = "all" if decision.frozen else "frozen"
        if norm.fused and self._update is not None and not _along_channels(*self._update, self._stream):
            self.finish()
        return self._run_fused_add(norm.operands(detached=decision.frozen), norm.next_input(decision.rows, detached))

    def _run_fused_add(self, norm: Operands, next_input: NextInput | None) -> Results:
        operands, add = self._update or (Operands(), None)
        tail = FusedCall(self._kernels, add, next_input, self._tail)
        operands = operands._replace(residual=self._stream, weight=norm.weight, bias=norm.bias)
        results = tail(operands)
        self._stream, self._tail, self._update = results.out, tail, None
        return results


def _along_channels(operands: Operands, add: Add, stream: Tensor) -> bool:
    """Whether γ lies along the norm's dimension, the last."""
    return operands.gamma is None or add.channel_dim % stream.dim() == stream.dim() - 1
