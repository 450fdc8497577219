"""Inputs of an op, and the expected results of each pass in float64."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .harness import Check
from .op_kinds import Op, Tensors

TINY = 1e-30
DRAWS = 8


class Sets:
    """Sets of inputs and of the results' gradients. All providers of a case cycle through them together. The next set
    is always the least recently used, so no provider finds its inputs in the cache."""

    def __init__(self, op: Op, count: int):
        self.op = op
        self.inputs = [op.inputs(number) for number in range(count)]
        with torch.no_grad():
            outs = op.eager(*self.inputs[0])
        generator = torch.Generator(op.device).manual_seed(count)
        self.douts = [
            tuple(torch.empty_like(out).normal_(generator=generator) for out in outs) for _ in range(count)
        ]  # fmt: skip
        self._numbers = itertools.cycle(range(count))

    def __len__(self) -> int:
        return len(self.inputs)

    def next(self) -> int:
        return next(self._numbers)

    def as_drawn(self, direction: str, results: Tensors) -> Sets:
        """Returns the same inputs with the rows that `results` kept: those that changed or, in a backward alone, have a
        gradient. For the dense add."""
        of_rows = results[1] != 0 if direction == "backward" else results[0] != self.inputs[0][0]
        drawn = copy.copy(self)
        drawn.__dict__.pop("wanted", None)
        drawn.op = copy.copy(self.op)
        drawn.op.rows = of_rows.flatten(1).any(1).nonzero().flatten()
        return drawn

    @functools.cached_property
    def wanted(self) -> dict[str, Tensors]:
        """The expected results of set 0 in float64, by pass: results, gradients, and both."""
        inputs = [t.detach().double().requires_grad_() for t in self.inputs[0]]
        outs = self.op.reference(*inputs)
        grads = torch.autograd.grad(outs, inputs, [dout.double() for dout in self.douts[0]])
        outs = tuple(out.detach() for out in outs)
        return {"forward": outs, "backward": grads, "both": (*outs, *grads)}

    def check(self, direction: str, results: Tensors, ours: bool = False) -> Check:
        """Returns the check of the tensor that comes closest to its bound. Errors are relative to its largest element.

        The bound allows four roundings to the residual's dtype, and those of a float32 sum over all positions, as in
        dγ. These grow like a random walk. On CPUs torch's own LayerNorm sums its weights' gradients in the residual's
        dtype. The bound allows for that too, but not for ours.
        """
        dtype, shape, wanted = self.op.setting.dtype, self.op.setting.shape, self.wanted[direction]
        if [t.shape for t in results] != [t.shape for t in wanted]:
            return Check(math.inf, 0.0)
        walk = math.sqrt(math.prod(shape) // shape[self.op.channel_dim])
        bound = 4 * torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * walk
        loose = bound + torch.finfo(dtype).eps * walk / 2
        sums_in_dtype = self.op.norm and not ours
        checks = [
            Check(relative_error(got, want), loose if want.dim() == 1 and sums_in_dtype else bound)
            for got, want in zip(results, wanted, strict=True)
        ]
        return worst(checks)


def check_of_draws(sets: Sets, direction: str, run: Callable[[], Tensors]) -> Check:
    """Returns the worst of several draws of `run()`, a `"forward"` or `"both"`. Each is compared with the definition on
    the rows that it kept. The check fails if every draw keeps all rows or none, as samples must be drawn one by one."""
    checks, shares = [], []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        results = run()
        drawn = sets.as_drawn(direction, results)
        checks.append(drawn.check(direction, results))
        shares.append(len(drawn.op.rows) / drawn.op.batch)
    return worst(checks) if any(0 < share < 1 for share in shares) else Check(math.inf, 0.0)


def worst(checks: list[Check]) -> Check:
    """Returns a check that doesn't pass, else the one that comes closest to its bound."""
    return next((c for c in checks if not c.passed), None) or max(checks, key=lambda c: c.error / c.bound)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Returns the largest difference, relative to the largest wanted element."""
    if wanted.numel() == 0:
        return 0.0
    return ((got.detach().double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(TINY)).item()
