"""The ways to compute an op as providers. Each runs one pass on several sets of inputs, and is checked in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

import rdp_kernels as rdp
from rdp_kernels.kernels.native.library import has_cuda

from .harness import Capture, Check, Provider, told
from .op_bytes import Moved, count_bytes
from .op_kinds import Op, Tensors
from .op_others import Compute, Other, others_of
from .op_sets import Sets, check_of_draws

EAGER, OURS_EAGER = "eager", "ours eager"
OURS, OURS_NATIVE = "ours triton", "ours native"
INTERPRETED = "on the CPU only Triton's interpreter runs the kernels, and that isn't timed"
COMPILER = "inductor"


class Runner:
    """One way to compute an op in each pass. `"backward"` reuses graphs that were made before; the other passes make
    new graphs."""

    def __init__(self, compute: Compute, sets: Sets, ours: bool = False, draws: bool = False):
        self.compute, self.sets, self.ours, self.draws = compute, sets, ours, draws

    def run(self, direction: str, number: int) -> Tensors:
        """Runs a pass on input set `number`."""
        if direction == "backward":
            return self._gradients(self._graphs[number], number, retain_graph=True)
        outs = self.compute(*self.sets.inputs[number])
        return outs if direction == "forward" else (*outs, *self._gradients(outs, number))

    def count_bytes(self) -> Moved:
        """Counts the moved bytes of eager ops."""
        self.run("backward", 0)  # makes the graphs
        return Moved(*(count_bytes(functools.partial(self.run, direction, 0)) for direction in ("forward", "backward")))

    def provider(self, name: str, direction: str, needed: Moved, moved: Moved | None) -> Provider:
        """Returns a provider of one pass. `needed` are the op's bytes, `moved` those of this way."""
        sets = self.sets
        return Provider(
            name,
            run=lambda turn: self.run(direction, sets.next()),
            verify=lambda: self.verify(direction),
            needed_bytes=needed.by(direction),
            columns={"moved_gb": None if moved is None else moved.by(direction) * 1e-9},
            capture=Capture(
                runs=[functools.partial(self.run, direction, number) for number in range(len(sets))],
                check=functools.partial(self.check, direction),
                kept=[t for tensors in (*sets.inputs, *sets.douts) for t in tensors],
            ),
        )

    def verify(self, direction: str) -> Check:
        """Checks a pass. If masks are drawn, a backward is checked together with the forward that draws them."""
        if self.draws:
            drawn = "forward" if direction == "forward" else "both"
            return check_of_draws(self.sets, drawn, lambda: self.run(drawn, 0))
        return self.check(direction, self.run(direction, 0))

    def check(self, direction: str, results: Tensors) -> Check:
        """Checks the results of one run."""
        sets = self.sets.as_drawn(direction, results) if self.draws else self.sets
        return sets.check(direction, results, self.ours)

    @functools.cached_property
    def _graphs(self) -> list[Tensors]:
        return [self.compute(*inputs) for inputs in self.sets.inputs]

    def _gradients(self, outs: Tensors, number: int, retain_graph: bool = False) -> Tensors:
        inputs, douts = self.sets.inputs[number], self.sets.douts[number]
        return torch.autograd.grad(outs, inputs, douts, retain_graph=retain_graph)


@dataclass(frozen=True)
class Way:
    """One way to compute an op, with its moved bytes if they are known. `unavailable` says why it can't run."""

    name: str
    runner: Runner | None = None
    moved: Moved | None = None
    unavailable: str | None = None

    def provider(self, direction: str, needed: Moved) -> Provider:
        if self.runner is None:
            return Provider.missing(self.name, self.unavailable or "")
        return self.runner.provider(self.name, direction, needed, self.moved)


def ways_of(op: Op, sets: Sets, interpreted: bool = False, compiled: bool = True) -> list[Way]:
    """Returns the ways, with the baseline first.

    Args:
        interpreted: whether ours may use interpreted kernels, for verification without timing.
        compiled: whether to include the formula compiled by torch.
    """
    eager, ours_eager = Runner(op.eager, sets), Runner(on_backend("eager", op.ours), sets, ours=True)
    ways = [Way(EAGER, eager, eager.count_bytes())]
    if compiled:
        ways.append(_compiled(op, sets))
    ways.append(Way(OURS_EAGER, ours_eager, _counted(ours_eager)))
    reason = why_no_triton(op.device, interpreted)
    ours = Runner(on_backend("triton", op.ours), sets, ours=True)
    ways.append(Way(OURS, None if reason else ours, unavailable=reason))
    native, reason = _available(lambda: on_backend("native", op.ours), sets, ours=True)
    ways.append(Way(OURS_NATIVE, native, unavailable=reason))
    return ways + [_way_of(other, op, sets) for other in others_of(op)]


def _compiled(op: Op, sets: Sets) -> Way:
    torch._functorch.config.donated_buffer = False  # else a compiled backward can run only once
    torch._dynamo.reset()  # compilations of earlier cases count towards dynamo's limit
    runner, reason = _available(lambda: torch.compile(op.eager, dynamic=False, fullgraph=True, backend=COMPILER), sets)
    return Way(op.compiled, runner, op.compiled_moves.times(op.sample_bytes), reason)


def _way_of(other: Other, op: Op, sets: Sets) -> Way:
    reason = other.why_not(op.device)
    if reason is not None:
        return Way(other.library, unavailable=reason)
    runner, reason = _available(lambda: other.make(op), sets, draws=other.draws)
    if runner is None:
        return Way(other.library, unavailable=reason)
    check = runner.verify("both")
    if not check.passed:  # not our bug: the other providers of the case are still measured
        differs = f"differs from the float64 reference by {check.error:.1e}, its bound is {check.bound:.1e}"
        return Way(other.library, unavailable=differs)
    return Way(other.library, runner, _counted(runner) if other.draws else None)


def _counted(runner: Runner) -> Moved | None:
    try:
        return runner.count_bytes()
    except Exception:  # its check reports the error
        return None


def _available(
    make: Callable[[], Compute], sets: Sets, ours: bool = False, draws: bool = False
) -> tuple[Runner | None, str | None]:
    """Returns a runner of `make()`, or why it can't run. Other libraries may fail here, and our compiled library
    supports fewer settings on GPUs."""
    try:
        runner = Runner(make(), sets, ours, draws)
        runner.run("both", 0)
    except Exception as error:
        return None, told(error)
    return runner, None


def why_no_triton(device: torch.device, interpreted: bool = False) -> str | None:
    if device.type == "cpu" and not interpreted:
        return INTERPRETED
    return rdp.available_backends()["triton"]


def why_no_native(device: torch.device) -> str | None:
    reason = rdp.available_backends()["native"]
    if reason is None and device.type == "cuda" and not has_cuda():
        return "the compiled library was built without CUDA"
    return reason


def on_backend(name: str, compute: Compute) -> Compute:
    def run(*inputs: Tensor) -> Tensors:
        with rdp.use_backend(name):
            return compute(*inputs)

    return run
