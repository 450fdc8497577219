"""Measures the pieces of a model: runs it without its branches for the rest, and each call of a path apart."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .._utils.autograd import in_backward
from ..convert.converted import ConvertedPath
from ..paths.call import PathCall
from ..paths.decision import ALL_ROWS
from ..paths.freezing import FreezeBN
from ..paths.path import batch_norms_of, find_paths, parameters_of
from ..scheme.rest import Rest
from .meters import Clock, Flops, Saved
from .pieces import REST, Pieces, Quantity, Streams
from .site import REPEATS, Site, argument_grads

OnCall = Callable[[int, PathCall, Tensor], Tensor]
"""Path, call and input; returns the path's output."""


class Unmeasurable(ValueError):
    """The pieces of a model can't be told apart; the message is for users."""


@dataclass
class _Run:
    """A forward and backward of the rest alone."""

    forward: float = 0.0
    backward: list[float] = field(default_factory=list)
    """By piece."""
    paths: list[int] = field(default_factory=list)
    """Which were called, in order."""
    requires_grad: list[bool] = field(default_factory=list)
    """Whether each call's input does."""
    argument_grads: list[list[bool]] = field(default_factory=list)
    """Whether each call's further arguments do."""


class Bench:
    """Measures `model`, a copy whose gradients and statistics don't matter, on one batch.

    Raises what the model raises, and `Unmeasurable`.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], freeze_bn: FreezeBN):
        self._model, self._args, self._kwargs, self._freeze_bn = model, args, kwargs, freeze_bn
        self._paths = find_paths(model)
        self._freezes_rest = False
        self._rest = Rest(model, self._paths, lambda: self._freezes_rest, freeze_bn)
        for path in self._paths:
            path.module.binding.call_override = functools.partial(self._probe, path.index)
        self._one = torch.ones(())
        self._own: list[Tensor] = [*model.parameters(), *model.buffers(), self._one]
        self._device = next(
            t for t in (*self._own, *pytree.tree_leaves((args, kwargs))) if isinstance(t, Tensor)
        ).device

    def pieces(self, timed: bool) -> Pieces:
        """All of them; `timed`: seconds too."""
        runs = {(kind, passes): self._count_rest(kind, passes) for kind in REST for passes in (False, True)}
        first = runs["learns", True]
        if (calls := len(first.paths)) == 0:
            raise Unmeasurable("the model calls none of its paths")
        flops, saved, streams = Quantity.zeros(calls), Quantity.zeros(calls), Streams.none(calls)
        seconds = Quantity.zeros(calls) if timed else None
        flops.forward = first.forward
        for (kind, passes), run in runs.items():
            flops.rest[kind][int(passes)] = torch.tensor(run.backward, dtype=torch.float64)
        timed_before: dict[Hashable, dict[str, tuple[float, float]]] = {}
        numbers = itertools.count()
        last: list[Tensor] = []  # what the call before got and gave, held so that no address is used twice

        def on_call(path: int, call: PathCall, x: Tensor) -> Tensor:
            number, residual = next(numbers), call.residual(x)
            given = None if residual is x else residual
            grads = {kind == "frozen": runs[kind, True].argument_grads[number] for kind in REST}
            site = Site(call, x, given, self._freeze_bn, grads)
            with torch.enable_grad():
                for state in flops.branch:
                    flops.branch[state][number] = site.flops(state)
                    saved.branch[state][number], streams.by_branch[state][number] = site.saved(state, self._own)
                if seconds is not None:
                    counts = [tuple(q.branch[state][number].item() for state in q.branch) for q in (flops, saved)]
                    likeness = site.likeness(*counts)
                    if likeness not in timed_before:
                        timed_before[likeness] = site.seconds()
                    for state, (whole, fixed) in timed_before[likeness].items():
                        seconds.branch[state][number], seconds.fixed[state][number] = whole, fixed
            out = PathCall(call.module, call.batch_size, call.args, call.kwargs, residual).run_here(x, ALL_ROWS)
            _follow(streams, number, last, x, out)
            streams.activation[number] = call.module.activation is not None
            copies = isinstance(call.module, ConvertedPath)  # what follows in its block may write to what it gives
            streams.passed_on[number] = residual is x and call.module.activation is None and not copies
            last[:] = [x, out]
            return out

        with torch.no_grad():
            self._forward(on_call)
        for kind, passes in runs:
            saved.rest[kind][int(passes)], streams.by_rest[kind][int(passes)] = self._saved_by_rest(
                kind, passes, streams
            )
        if seconds is not None:
            self._time_rest(seconds)
        path_modules = [self._paths[path].module for path in first.paths]
        return Pieces(
            num_paths=len(self._paths),
            path=torch.tensor(first.paths, dtype=torch.int64),
            learns=torch.tensor(
                [any(p.requires_grad for p in parameters_of(o)) for o in path_modules], dtype=torch.bool
            ),
            whole=torch.tensor([bool(batch_norms_of(o)) for o in path_modules], dtype=torch.bool),
            follows={kind: torch.tensor(runs[kind, False].requires_grad, dtype=torch.bool) for kind in REST},
            flops=flops,
            saved=saved,
            streams=streams,
            seconds=seconds,
        )

    def _forward(self, on_call: OnCall) -> Tensor | None:
        """Runs the model; the sum of what it returns, None where that doesn't require grad."""
        self._on_call = on_call
        sums = [t.sum() for t in _tensors(self._model(*self._args, **self._kwargs)) if t.requires_grad]
        return torch.stack([s.float() for s in sums]).sum() if sums else None

    def _probe(self, path: int, call: PathCall, x: Tensor) -> Tensor:
        if in_backward():
            raise Unmeasurable("the model recomputes calls of its paths: switch its checkpointing off to estimate")
        return self._on_call(path, call, x) if call.module.training else call.run(x, ALL_ROWS)

    def _run_rest(self, kind: str, passes: bool, meter: Flops | Clock) -> _Run:
        """A forward and backward with every path dropped. `passes`: what the first call gives requires grad."""
        run, read, spent = _Run(), meter.read, meter.spent
        marks: dict[int, Any] = {}

        def on_call(path: int, call: PathCall, x: Tensor) -> Tensor:
            number = len(run.paths)
            run.paths.append(path)
            run.requires_grad.append(x.requires_grad)
            run.argument_grads.append(argument_grads(call))
            out = self._left_out(call, x, passes and number == 0, isinstance(meter, Clock))
            if out.requires_grad:
                out.register_hook(lambda _: marks.__setitem__(number, read()))
            return out

        self._freezes_rest = kind == "frozen"
        start = read()
        loss = self._forward(on_call)
        run.forward = spent(start, start := read())
        if loss is not None:
            loss.backward()
        end = read()
        stops = [start, *(marks.get(number, end) for number in reversed(range(len(run.paths)))), end]
        run.backward = [spent(a, b) for a, b in itertools.pairwise(stops)][::-1]
        self._model.zero_grad(set_to_none=True)
        return run

    def _left_out(self, call: PathCall, x: Tensor, requires_grad: bool, timed: bool = False) -> Tensor:
        """What a call gives without its branch; where nothing is timed, in a tensor of its own and by an operation that
        saves something, which has a checkpoint around it recompute the call, and be found out."""
        out = call.without_branch(x)
        if out is not x and call.module.shortcut is None:  # what is between the residual and x has a backward too
            out = torch.add(out, x.sum().to(out.dtype), alpha=0)
        if not timed:
            out = out * self._one
        if requires_grad:
            out = out + torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        return out

    def _count_rest(self, kind: str, passes: bool) -> _Run:
        with Flops(self._device) as flops:
            return self._run_rest(kind, passes, flops)

    def _time_rest(self, seconds: Quantity) -> None:
        clock = Clock(self._device)
        for kind in REST:
            for passes in (False, True):
                runs = [self._run_rest(kind, passes, clock) for _ in range(1 + REPEATS)][1:]
                pieces = torch.tensor([run.backward for run in runs], dtype=torch.float64)
                seconds.rest[kind][int(passes)] = pieces.min(dim=0).values
                if (kind, passes) == ("learns", True):
                    seconds.forward = min(run.forward for run in runs)

    def _saved_by_rest(self, kind: str, passes: bool, streams: Streams) -> tuple[Tensor, Tensor]:
        """By piece the bytes beside `streams`, and which of these are saved too."""
        ends: list[tuple[Tensor, Tensor]] = []
        saved = Saved(self._own, lambda: len(ends))

        def on_call(path: int, call: PathCall, x: Tensor) -> Tensor:
            ends.append((x, self._left_out(call, x, passes and not ends)))
            return ends[-1][1]

        self._freezes_rest = kind == "frozen"
        with saved.watching():
            self._forward(on_call)
        flags = torch.zeros(2 * len(ends), dtype=torch.bool)
        for number, (x, out) in enumerate(ends):
            flags[streams.entry[number]] |= saved.take(x)
            flags[2 * number + 1] |= saved.take(out)
        return torch.tensor(saved.bytes(len(ends) + 1), dtype=torch.float64), flags


def _follow(streams: Streams, number: int, last: list[Tensor], x: Tensor, out: Tensor) -> None:
    """Notes what call `number` gets and gives; `last`: what the call before did."""
    for before, tensor in zip((streams.entry[number - 1], torch.tensor(2 * number - 1)), last, strict=False):
        if tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            streams.entry[number] = before
            break
    streams.bytes[2 * number], streams.bytes[2 * number + 1] = (t.untyped_storage().nbytes() for t in (x, out))


def _tensors(out: Any) -> list[Tensor]:
    """In whatever the model returns."""
    if isinstance(out, Mapping):
        return [t for value in out.values() for t in _tensors(value)]
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
