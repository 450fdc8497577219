"""The ways to compute an op as providers: on several sets of inputs, one pass at a time, each checked in float64."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

import rdp_kernels as rdp

from .harness import Capture, Check, Provider, told
from .op_bytes import Moved, count_bytes
from .op_kinds import Op, Tensors

EAGER, OURS_EAGER, XFORMERS = "eager", "ours eager", "xformers"
OURS, OURS_NATIVE = "ours triton", "ours native"
INTERPRETED = "on the CPU only Triton's interpreter runs the kernels, and that isn't timed"
COMPILER = "inductor"
TINY = 1e-30
Compute = Callable[..., Tensors]


class Sets:
    """Sets of inputs, and of gradients of the results, that all providers of a case go through in turn, so that none
    finds its own in the cache: the next one was used longest ago, whoever used it."""

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

    @functools.cached_property
    def wanted(self) -> dict[str, Tensors]:
        """By pass, what set 0 must give: results, gradients, and both, in float64."""
        inputs = [t.detach().double().requires_grad_() for t in self.inputs[0]]
        outs = self.op.reference(*inputs)
        grads = torch.autograd.grad(outs, inputs, [dout.double() for dout in self.douts[0]])
        outs = tuple(out.detach() for out in outs)
        return {"forward": outs, "backward": grads, "both": (*outs, *grads)}

    def check(self, direction: str, results: Tensors, ours: bool = False) -> Check:
        """That of the tensor which comes closest to its bound; errors as shares of a tensor's largest element.

        The bound: four roundings to the stream's dtype, and those of a float32 sum over all positions, which is what dγ
        is; they grow like a random walk. On CPUs torch's own LayerNorm sums its weights' gradients in the stream's
        dtype: others are let off with that, ours aren't.
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
        return next((c for c in checks if not c.passed), None) or max(checks, key=lambda c: c.error / c.bound)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference by the largest wanted element."""
    if wanted.numel() == 0:
        return 0.0
    return ((got.detach().double() - wanted.double()).abs().max() / wanted.double().abs().max().clamp_min(TINY)).item()


class Runner:
    """One way to compute an op in each pass. `"backward"` goes through graphs that were made before, again and again;
    each other pass makes its own."""

    def __init__(self, compute: Compute, sets: Sets, ours: bool = False):
        self.compute, self.sets, self.ours = compute, sets, ours

    def run(self, direction: str, number: int) -> Tensors:
        """On set `number`."""
        if direction == "backward":
            return self._gradients(self._graphs[number], number, retain_graph=True)
        outs = self.compute(*self.sets.inputs[number])
        return outs if direction == "forward" else (*outs, *self._gradients(outs, number))

    def count_bytes(self) -> Moved:
        """For eager ops."""
        self.run("backward", 0)  # makes the graphs
        return Moved(*(count_bytes(functools.partial(self.run, direction, 0)) for direction in ("forward", "backward")))

    def provider(self, name: str, direction: str, needed: Moved, moved: Moved | None) -> Provider:
        """One pass of it; `needed` by the op and `moved` by this way, in bytes."""
        sets, check = self.sets, functools.partial(self.sets.check, direction, ours=self.ours)
        return Provider(
            name,
            run=lambda turn: self.run(direction, sets.next()),
            verify=lambda: check(self.run(direction, 0)),
            needed_bytes=needed.by(direction),
            columns={"moved_gb": None if moved is None else moved.by(direction) * 1e-9},
            capture=Capture(
                runs=[functools.partial(self.run, direction, number) for number in range(len(sets))],
                check=check,
                kept=[t for tensors in (*sets.inputs, *sets.douts) for t in tensors],
            ),
        )

    @functools.cached_property
    def _graphs(self) -> list[Tensors]:
        return [self.compute(*inputs) for inputs in self.sets.inputs]

    def _gradients(self, outs: Tensors, number: int, retain_graph: bool = False) -> Tensors:
        inputs, douts = self.sets.inputs[number], self.sets.douts[number]
        return torch.autograd.grad(outs, inputs, douts, retain_graph=retain_graph)


@dataclass(frozen=True)
class Way:
    """How an op is computed, and the bytes that this moves, where that is known; or why it can't be."""

    name: str
    runner: Runner | None = None
    moved: Moved | None = None
    unavailable: str | None = None

    def provider(self, direction: str, needed: Moved) -> Provider:
        if self.runner is None:
            return Provider.missing(self.name, self.unavailable or "")
        return self.runner.provider(self.name, direction, needed, self.moved)


def ways_of(op: Op, sets: Sets, interpreted: bool = False) -> list[Way]:
    """The baseline first.

    Args:
        interpreted: ours with interpreted kernels, to be verified and not to be timed.
    """
    eager, ours_eager = Runner(op.eager, sets), Runner(on_backend("eager", op.ours), sets, ours=True)
    torch._functorch.config.donated_buffer = False  # a compiled backward could else be run only once
    torch._dynamo.reset()  # what earlier cases compiled counts towards a limit of recompilations
    compiled, reason = _available(
        lambda: torch.compile(op.eager, dynamic=False, fullgraph=True, backend=COMPILER), sets
    )
    ways = [
        Way(EAGER, eager, eager.count_bytes()),
        Way(op.compiled, compiled, op.compiled_moves.times(op.sample_bytes), reason),
        Way(OURS_EAGER, ours_eager, _counted(ours_eager)),
    ]
    reason = why_no_triton(op.device, interpreted)
    ours = Runner(on_backend("triton", op.ours), sets, ours=True)
    ways.append(Way(OURS, None if reason else ours, unavailable=reason))
    native, reason = _available(lambda: on_backend("native", op.ours), sets, ours=True)
    ways.append(Way(OURS_NATIVE, native, unavailable=reason))
    if op.has_xformers:
        there = find_spec("xformers") is not None
        others, reason = _available(lambda: op.xformers, sets) if there else (None, "xformers is not installed")
        ways.append(Way(XFORMERS, others, unavailable=reason))
    return ways


def _counted(ours: Runner) -> Moved | None:
    try:
        return ours.count_bytes()
    except Exception:  # its check will tell
        return None


def _available(make: Callable[[], Compute], sets: Sets, ours: bool = False) -> tuple[Runner | None, str | None]:
    """The way that `make()` computes, or why it can't: what others write may fail on what is there, and our compiled
    library serves less on GPUs."""
    try:
        runner = Runner(make(), sets, ours)
        runner.run("both", 0)
    except Exception as error:
        return None, told(error)
    return runner, None


def why_no_triton(device: torch.device, interpreted: bool = False) -> str | None:
    if device.type == "cpu" and not interpreted:
        return INTERPRETED
    return rdp.available_backends()["triton"]


def why_no_native() -> str | None:
    return rdp.available_backends()["native"]


def on_backend(name: str, compute: Compute) -> Compute:
    def run(*inputs: Tensor) -> Tensors:
        with rdp.use_backend(name):
            return compute(*inputs)

    return run
