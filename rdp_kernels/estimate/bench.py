"""Measures the pieces of a model. The rest is measured in runs without branches, and each call of a path separately."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Hashable, Iterable, Mapping
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
from .pieces import REST_STATES, STATES, Boundaries, PieceCosts, Quantity
from .repeated_call import REPEATS, RepeatedCall, argument_grads

OnCall = Callable[[int, PathCall, Tensor], Tensor]
"""`(path, call, x) -> output` replaces one call of a path."""


class Unmeasurable(ValueError):
    """The pieces of a model can't be measured separately. The message is for users."""


@dataclass
class _Run:
    """A forward and a backward of the rest alone.

    Attributes:
        forward: the cost of the forward.
        backward: the cost of the backward, by piece.
        paths: for each call in order, its path.
        requires_grad: for each call, whether its input requires grad.
        argument_grads: for each call, which of its further arguments require grad.
    """

    forward: float = 0.0
    backward: list[float] = field(default_factory=list)
    paths: list[int] = field(default_factory=list)
    requires_grad: list[bool] = field(default_factory=list)
    argument_grads: list[list[bool]] = field(default_factory=list)


Runs = dict[tuple[str, bool], _Run]
REST_RUNS = tuple(itertools.product(REST_STATES, (False, True)))
"""The state of the rest, and whether the output of the first call requires grad."""


class Bench:
    """Measures `model` on one batch.

    The model has to be a copy, because its gradients and statistics change. Raises what the model raises, and
    `Unmeasurable`.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any], freeze_bn: FreezeBN):
        self._model, self._args, self._kwargs, self._freeze_bn = model, args, kwargs, freeze_bn
        self._paths = find_paths(model)
        self._freezes_rest = False
        self._rest = Rest(model, self._paths, lambda: self._freezes_rest, freeze_bn)
        for path in self._paths:
            path.module.binding.call_override = functools.partial(self._override, path.index)
        self._known: dict[Hashable, dict[str, tuple[float, float]]] = {}  # seconds, by the likeness of calls
        self._one = torch.ones(())
        self._own: list[Tensor] = [*model.parameters(), *model.buffers(), self._one]
        self._device = _tensors((self._own, args, kwargs))[0].device

    def costs(self, timed: bool) -> PieceCosts:
        """Returns the costs of all pieces. Seconds are measured only if `timed`."""
        runs: Runs = {}
        for state, passes in REST_RUNS:
            with Flops(self._device) as flops:
                runs[state, passes] = self._run_rest(state, passes, flops)
        first = runs["learning", True]
        if (calls := len(first.paths)) == 0:
            raise Unmeasurable("the model calls none of its paths")
        modules = [self._paths[path].module for path in first.paths]
        costs = PieceCosts(
            num_paths=len(self._paths),
            path=torch.tensor(first.paths, dtype=torch.int64),
            learns=_flags(any(p.requires_grad for p in parameters_of(module)) for module in modules),
            whole=_flags(bool(batch_norms_of(module)) for module in modules),
            input_needs_grad={state: _flags(runs[state, False].requires_grad) for state in REST_STATES},
            flops=Quantity.zeros(calls),
            saved=Quantity.zeros(calls),
            boundaries=Boundaries.none(calls),
            seconds=Quantity.zeros(calls) if timed else None,
        )
        costs.flops.forward = first.forward
        self._measure_calls(costs, runs)
        for (state, passes), run in runs.items():
            costs.flops.rest[state][int(passes)] = torch.tensor(run.backward, dtype=torch.float64)
            bytes_, flags = self._saved_by_rest(state, passes, costs.boundaries)
            costs.saved.rest[state][int(passes)], costs.boundaries.by_rest[state][int(passes)] = bytes_, flags
        if costs.seconds is not None:
            self._time_rest(costs.seconds)
        return costs

    def _measure_calls(self, costs: PieceCosts, runs: Runs) -> None:
        """Measures each call of a path at the point where a forward makes it. Records which tensors are its input and
        output.
        """
        boundaries = costs.boundaries
        numbers = itertools.count()
        last: list[Tensor] = []  # the last call's input and output, kept so that their addresses aren't reused

        def on_call(path: int, call: PathCall, x: Tensor) -> Tensor:
            number, residual = next(numbers), call.residual(x)
            grads = {state == "frozen": runs[state, True].argument_grads[number] for state in REST_STATES}
            repeated = RepeatedCall(call, x, None if residual is x else residual, self._freeze_bn, grads)
            with torch.enable_grad():
                self._measure_call(costs, number, repeated)
            out = PathCall(call.module, call.batch_size, call.args, call.kwargs, residual).run_here(x, ALL_ROWS)
            _note_tensors(boundaries, number, last, x, out)
            boundaries.has_activation[number] = call.module.activation is not None
            copies = isinstance(call.module, ConvertedPath)  # later code in its block may write to the output
            boundaries.returns_input[number] = residual is x and call.module.activation is None and not copies
            last[:] = [x, out]
            return out

        with torch.no_grad():
            self._forward(on_call)

    def _measure_call(self, costs: PieceCosts, number: int, repeated: RepeatedCall) -> None:
        flops, saved, seconds, boundaries = costs.flops, costs.saved, costs.seconds, costs.boundaries
        for state in STATES:
            flops.branch[state][number] = repeated.flops(state)
            saved.branch[state][number], boundaries.by_branch[state][number] = repeated.saved(state, self._own)
        if seconds is None:
            return
        counts = [tuple(q.branch[state][number].item() for state in STATES) for q in (flops, saved)]
        likeness = repeated.likeness(*counts)
        if likeness not in self._known:
            self._known[likeness] = repeated.seconds()
        for state, (whole, fixed) in self._known[likeness].items():
            seconds.branch[state][number], seconds.fixed[state][number] = whole, fixed

    def _forward(self, on_call: OnCall) -> Tensor | None:
        """Runs the model and returns the sum of its outputs, or None if they don't require grad."""
        self._on_call = on_call
        sums = [t.sum() for t in _tensors(self._model(*self._args, **self._kwargs)) if t.requires_grad]
        return torch.stack([s.float() for s in sums]).sum() if sums else None

    def _override(self, path: int, call: PathCall, x: Tensor) -> Tensor:
        if in_backward():
            raise Unmeasurable("the model recomputes calls of its paths: switch its checkpointing off to estimate")
        return self._on_call(path, call, x) if call.module.training else call.run(x, ALL_ROWS)

    def _run_rest(self, state: str, passes: bool, meter: Flops | Clock) -> _Run:
        """A forward and backward with every path dropped. `passes`: the output of the first call requires grad."""
        run, read, spent = _Run(), meter.read, meter.spent
        marks: dict[int, Any] = {}

        def on_call(path: int, call: PathCall, x: Tensor) -> Tensor:
            number = len(run.paths)
            run.paths.append(path)
            run.requires_grad.append(x.requires_grad)
            run.argument_grads.append(argument_grads(call))
            out = self._without_branch(call, x, passes and number == 0, timed=isinstance(meter, Clock))
            if out.requires_grad:
                out.register_hook(lambda _: marks.__setitem__(number, read()))
            return out

        self._freezes_rest = state == "frozen"
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

    def _without_branch(self, call: PathCall, x: Tensor, requires_grad: bool, timed: bool) -> Tensor:
        """The output of a call without its branch.

        If nothing is timed, the output is a new tensor from an operation that saves something. A checkpoint around the
        call then recomputes it, and `_override` notices this.
        """
        out = call.without_branch(x)
        if out is not x and call.module.shortcut is None:  # what computes the residual from x has a backward too
            out = torch.add(out, x.sum().to(out.dtype), alpha=0)
        if not timed:
            out = out * self._one
        if requires_grad:
            out = out + torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        return out

    def _time_rest(self, seconds: Quantity) -> None:
        clock = Clock(self._device)
        for state, passes in REST_RUNS:
            runs = [self._run_rest(state, passes, clock) for _ in range(1 + REPEATS)][1:]  # the first one warms up
            pieces = torch.tensor([run.backward for run in runs], dtype=torch.float64)
            seconds.rest[state][int(passes)] = pieces.min(dim=0).values
            if (state, passes) == ("learning", True):
                seconds.forward = min(run.forward for run in runs)

    def _saved_by_rest(self, state: str, passes: bool, boundaries: Boundaries) -> tuple[Tensor, Tensor]:
        """Returns the bytes that each piece saves besides `boundaries`, and which of `boundaries` are saved."""
        ends: list[tuple[Tensor, Tensor]] = []
        saved = Saved(self._own, lambda: len(ends))

        def on_call(path: int, call: PathCall, x: Tensor) -> Tensor:
            ends.append((x, self._without_branch(call, x, passes and not ends, timed=False)))
            return ends[-1][1]

        self._freezes_rest = state == "frozen"
        with saved.watching():
            self._forward(on_call)
        flags = torch.zeros(2 * len(ends), dtype=torch.bool)
        for number, (x, out) in enumerate(ends):
            flags[boundaries.input_index[number]] |= saved.take(x)
            flags[2 * number + 1] |= saved.take(out)
        return torch.tensor(saved.bytes(len(ends) + 1), dtype=torch.float64), flags


def _note_tensors(boundaries: Boundaries, number: int, last: list[Tensor], x: Tensor, out: Tensor) -> None:
    """Records `x` and `out` as input and output of call `number`; `last`: input and output of the call before."""
    before = boundaries.input_index[number - 1], torch.tensor(2 * number - 1)
    for index, tensor in zip(before, last, strict=False):
        if tensor.untyped_storage().data_ptr() == x.untyped_storage().data_ptr():
            boundaries.input_index[number] = index
            break
    boundaries.bytes[2 * number], boundaries.bytes[2 * number + 1] = (t.untyped_storage().nbytes() for t in (x, out))


def _flags(values: Iterable[bool]) -> Tensor:
    return torch.tensor([*values], dtype=torch.bool)


def _tensors(out: Any) -> list[Tensor]:
    """Returns the tensors in the output of a model."""
    if isinstance(out, Mapping):
        return [t for value in out.values() for t in _tensors(value)]
    return [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
