"""`python -m benchmarks host`: what a call on a GPU costs the host, against the same formula in eager torch.

With `--device cuda` the calls run on the GPU, and a time ends when the host has issued all work. Without a GPU a
stand-in takes the place of the driver: the Python code of all calls runs, and all kernels are compiled for compute
capability 9.0, but launches only count. The compiled library is built from its CUDA sources, which takes a C++
compiler. Eager torch then computes on the CPU, on tensors so small that little of its time is computation. Results on
the stand-in are uninitialised memory. The values of each call are therefore checked on the eager backend, and on the
others only shapes and dtypes; the tests check values with kernels that run.

Providers take turns on one thread. "/eager" is the median of the turns' ratios, and "min/eager" the ratio of the
fastest turns. "launches" are kernels, and ops of torch that compute. "calls" are function calls in Python and from
Python to C, and "allocations" the blocks of memory that a call takes for tensors. The passes of an op are those of
`overhead`. Paths have branches that compute almost nothing. Their passes are a drop and a reuse iteration with a given
plan, forward and backward. Eager is there the same network written by hand for this plan.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rdp_kernels as rdp

from . import command, overhead
from .cases import MODES
from .harness import Case, Check, Provider, Row
from .launches import KERNELS, count_allocations, count_launches
from .machine import ROOT
from .op_dense import ResidualAdd, ResidualAddNorm, ResidualAddRMSNorm
from .op_kinds import EPS, Op, Setting, Tensors
from .op_providers import EAGER, OURS, OURS_NATIVE, why_no_native, why_no_triton
from .op_rows import GatherRows, ResidualAddRows
from .op_sets import Sets, relative_error, worst
from .overhead import BOTH, FORWARD, PASSES, DropPathAdd, HostDevice
from .pass_tables import Columns, pass_tables
from .textbook import state_after
from .tiny_paths import BATCH, BY_HAND, DROP_PROB, Ways, count_calls, tiny_paths
from .tiny_paths import OURS as OUR_PATHS

SHAPE, NUM_PATHS = (4, 3, 64), 12
TURNS = {"full": 30, "quick": 8, "tiny": 1}
CALLS_A_TURN = {"full": 100, "quick": 30, "tiny": 2}
ITERATIONS = ("drop", "reuse")
ROUNDINGS = 4
"""The most roundings to bfloat16 by which gradients of a network of paths may differ between two backends."""
NO_COMPILER = "without a GPU its CUDA sources are built for the host, which takes Linux and a C++ compiler (c++)"


@dataclass(frozen=True)
class Driver:
    """A GPU's driver, or the stand-in for one.

    Args:
        host: measures the host's time.
        missing: why Triton and the compiled library can't be measured, or None, by backend.
        launched: on a stand-in, returns the number of kernels launched so far.
    """

    host: HostDevice
    missing: dict[str, str | None]
    launched: Callable[[], int] | None = None

    @classmethod
    def real(cls) -> Driver:
        host = HostDevice.of("cuda")
        return cls(host, {"triton": why_no_triton(host.device), "native": why_no_native(host.device)})

    @classmethod
    def stand_in(cls) -> Driver:
        """Sets up the stand-in, in a process that `in_a_process` has started."""
        from tests.cuda_on_host.build import launches_of

        from .gpu.stand_in import Launches, set_up_launches

        missing: dict[str, str | None] = {"triton": "triton is not installed", "native": None}
        if importlib.util.find_spec("triton") is not None:
            set_up_launches()
            missing["triton"] = None
        library = Path(rdp.__file__).with_name("_C.abi3.so")
        if not library.exists():
            missing["native"] = NO_COMPILER
        host = dataclasses.replace(HostDevice.of("cpu"), clock=time.process_time)
        return cls(host, missing, lambda: Launches.count + (launches_of(library) if library.exists() else 0))

    @property
    def device(self) -> torch.device:
        return self.host.device

    @property
    def computes(self) -> bool:
        return self.launched is None

    def ours(self, make: Callable[[str, str], Provider]) -> Iterator[Provider]:
        """Yields `make(name, backend)` for each backend, or a missing provider."""
        for name, backend in ((OURS, "triton"), (OURS_NATIVE, "native")):
            reason = self.missing[backend]
            yield make(name, backend) if reason is None else Provider.missing(name, reason)

    def counts(self, provider: Provider) -> Row:
        """Returns what a call of `provider` does, with an equal share of what a turn does beside its calls."""
        run, calls = functools.partial(provider.run, 0), provider.columns["calls"]
        return {
            "launches": count_launches(run, self.device, self.launched) / calls,
            "launches_are": KERNELS,
            "function_calls": round(count_calls(run) / calls),
            "allocations": count_allocations(run, self.device) / calls,
        }


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "host", help="host time of calls on a GPU", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    blocks = {size: f"{TURNS[size]} blocks of {calls} calls" for size, calls in CALLS_A_TURN.items()}
    command.add_options(parser, f"turns of each provider; default: {blocks['full']}", blocks["quick"], blocks["tiny"])
    parser.add_argument("--stand-in", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes. An interrupt keeps the rows so far."""
    if not command.has_device(options.device):
        return 2
    if options.device == "cpu" and not options.stand_in:
        return in_a_process(options)
    driver, calls = Driver.stand_in() if options.stand_in else Driver.real(), CALLS_A_TURN[options.size]
    turns = options.turns or TURNS[options.size]
    makers: list[command.Makes] = [
        functools.partial(op_cases, op, calls, driver) for op in ops(driver.device, options.size)
    ]
    num_cases = len(makers) * len(PASSES)
    for network, mode, phase in paths(options.size):
        makers.append(command.one(path_case, network, mode, phase, max(calls // 10, 1), driver))
        num_cases += 1
    tables = functools.partial(pass_tables, columns=COLUMNS)
    return overhead.measure(options, driver.host, turns, makers, num_cases, driver.counts, tables, verdicts_of)


def in_a_process(options: argparse.Namespace) -> int:
    """Runs the command in a process with the stand-in, on a copy of the package whose library has the CUDA sources."""
    from tests.cuda_on_host.build import compile_library, copy_tree

    arguments = ["host", "--stand-in"] + ([] if options.size == "full" else [f"--{options.size}"])
    for name in ("turns", "csv", "json"):
        if (value := getattr(options, name)) is not None:
            arguments += [f"--{name}", str(value.absolute() if isinstance(value, Path) else value)]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree)
        if sys.platform == "linux" and shutil.which("c++") is not None:
            compile_library(tree, sanitize=False, optimize=options.size != "tiny")
        # `python -m` finds the copy's package in its folder, and the benchmarks by PYTHONPATH.
        settings = {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "RDP_NO_KERNELS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", *arguments], cwd=tree, env=os.environ | settings
        )
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches both
            return process.wait()


# Ops


class _Frozen(Op):
    """γ doesn't learn."""

    def inputs(self, number: int) -> Tensors:
        *learning, gamma = super().inputs(number)
        self.frozen = (gamma.detach(),)
        return tuple(learning)

    def eager(self, *inputs: Tensor) -> Tensors:
        return super().eager(*inputs, *self.frozen)

    def reference(self, *inputs: Tensor) -> Tensors:
        return super().reference(*inputs, *(gamma.double() for gamma in self.frozen))


class AddGammaFrozen(_Frozen, ResidualAdd):
    name = "residual_add, γ frozen"


class AddNormGammaFrozen(_Frozen, ResidualAddNorm):
    name = "residual_add_norm, γ frozen"


class AddWithoutGamma(ResidualAdd):
    name = "residual_add without γ"


def _formula(op: Op, residual: Tensor, branch: Tensor, gamma: Tensor | None) -> overhead.Call:
    row_scale = op.row_scale
    if gamma is None:
        return lambda: residual + branch * row_scale.view(-1, 1, 1).to(residual.dtype)
    return lambda: residual + (branch * gamma) * row_scale.view(-1, 1, 1).to(residual.dtype)


def _add(op: Op, residual: Tensor, branch: Tensor, gamma: Tensor | None = None) -> tuple[Callable, Callable]:
    row_scale = op.row_scale
    return (
        _formula(op, residual, branch, gamma),
        lambda: rdp.residual_add(residual, branch, row_scale=row_scale, gamma=gamma),
    )


def _add_norm(op: Op, residual: Tensor, branch: Tensor, weight: Tensor, *others: Tensor) -> tuple[Callable, Callable]:
    *bias, gamma = others
    add, shape = _formula(op, residual, branch, gamma), (SHAPE[-1],)
    options = {"row_scale": op.row_scale, "gamma": gamma, "norm": "layer" if bias else "rms", "eps": EPS}

    def eager() -> Tensors:
        out = add()
        return out, F.layer_norm(out, shape, weight, *bias, EPS) if bias else F.rms_norm(out, shape, weight, EPS)

    return eager, lambda: rdp.residual_add_norm(residual, branch, weight, *bias, **options)


CALLS: dict[type[Op], Callable[..., tuple[Callable, Callable]]] = {
    ResidualAdd: _add,
    AddGammaFrozen: _add,
    AddWithoutGamma: _add,
    ResidualAddRows: overhead.CALLS[ResidualAddRows],
    GatherRows: overhead.CALLS[GatherRows],
    DropPathAdd: overhead.CALLS[DropPathAdd],
    ResidualAddNorm: _add_norm,
    AddNormGammaFrozen: _add_norm,
    ResidualAddRMSNorm: _add_norm,
}
"""Op → function that returns the formula and our call."""
NOT_QUICK = (AddWithoutGamma, AddNormGammaFrozen, ResidualAddRMSNorm)
"""Left out by `--quick`, as a GPU machine that is rented for minutes would have to compile their kernels."""


def ops(device: torch.device, size: str = "full") -> Iterator[Op]:
    for kind in CALLS:
        if size == "quick" and kind in NOT_QUICK:
            continue
        gamma = kind not in (AddWithoutGamma, GatherRows)
        yield kind(Setting(kind.name, SHAPE, SHAPE[0] // 2, torch.bfloat16, gamma), device)


def op_cases(op: Op, calls: int, driver: Driver) -> Iterator[Case]:
    """Returns a case for each pass. A turn is `calls` calls."""
    sets = Sets(op, 1)
    eager, ours = CALLS[type(op)](op, *sets.inputs[0], *getattr(op, "frozen", ()))
    for direction in PASSES:
        make = functools.partial(overhead.provider, sets=sets, direction=direction, calls=calls)
        providers = [make(EAGER, eager)]
        providers += driver.ours(
            lambda name, backend, make=make: make(name, ours, backend=backend, computes=driver.computes)
        )
        yield Case(op.setting.labels | {"pass": direction}, "call", EAGER, _with_calls(providers, calls))


# Paths


NETWORKS: dict[str, Callable[[int], nn.Sequential]] = {
    f"{NUM_PATHS} paths": lambda count: nn.Sequential(*tiny_paths(count, SHAPE[-1])),
    f"sequence of {NUM_PATHS} with norms": lambda count: tiny_paths(count, SHAPE[-1], normed=True),
}


def paths(size: str = "full") -> Iterator[tuple[str, str, str]]:
    """Returns the network, mode and phase of each case."""
    networks = list(NETWORKS)[:1] if size == "quick" else NETWORKS
    return itertools.product(networks, MODES, ITERATIONS)


def path_case(name: str, mode: str, phase: str, calls: int, driver: Driver) -> Case:
    """A turn is `calls` drop or reuse iterations of one plan."""
    make = functools.partial(Ways, mode, NUM_PATHS, 1, driver.device, make=NETWORKS[name], sample=SHAPE[1:])
    ways = make(dtype=torch.bfloat16)

    def provider(name: str, way: str, iteration: Callable[[str], object], model: nn.Module, backend: str) -> Provider:
        parameters = list(model.parameters())

        def run(turn: int) -> None:
            with rdp.use_backend(backend):
                for _ in range(calls):
                    iteration(phase)
                    for parameter in parameters:
                        parameter.grad = None

        def gradients(backend: str) -> dict[str, Tensor]:
            with rdp.use_backend(backend):
                return state_after(model, iter([iteration(phase)]))[0]

        def verify() -> Check:
            with rdp.use_backend("eager"):
                check = make(dtype=torch.float64).verify(way)
            found, wanted = gradients(backend), gradients("eager")
            if not overhead.are_alike(found.values(), wanted.values()) or found.keys() != wanted.keys():
                return Check(math.inf, 0.0)
            if not driver.computes:
                return check
            error = max(relative_error(found[name], wanted[name]) for name in wanted)
            return worst([check, Check(error, ROUNDINGS * torch.finfo(torch.bfloat16).eps)])

        return Provider(name, run, verify)

    providers = [provider(EAGER, BY_HAND, ways.iteration_by_hand, ways.plain_paths, "eager")]
    providers += driver.ours(lambda name, backend: provider(name, OUR_PATHS, ways.iteration, ways.paths, backend))
    kept = BATCH - round(BATCH * DROP_PROB) if mode == "sample" else None
    setting = Setting(f"{name}, {mode} mode", (BATCH, *SHAPE[1:]), kept, torch.bfloat16, gamma=False)
    return Case(setting.labels | {"pass": phase}, "iteration", EAGER, _with_calls(providers, calls))


def _with_calls(providers: list[Provider], calls: int) -> list[Provider]:
    return [dataclasses.replace(provider, columns={"calls": calls}) for provider in providers]


# Evaluation

COLUMNS: Columns = {
    "p50 µs": ("p50_us", ".1f"),
    "/eager": ("ratio_rounds", ".2f"),
    "min/eager": ("ratio_min", ".2f"),
    "launches": ("launches", "g"),
    "calls": ("function_calls", ",d"),
    "allocations": ("allocations", "g"),
}
GOALS = {
    ResidualAdd.name: {FORWARD: (1.2, 1), BOTH: (1.2, 3)},
    AddGammaFrozen.name: {BOTH: (1.2, 2)},
    ResidualAddRows.name: {FORWARD: (1.2, 2), BOTH: (1.2, 4)},
    GatherRows.name: {FORWARD: (1.2, 1), BOTH: (1.2, 3)},
    ResidualAddNorm.name: {FORWARD: (1.0, 1), BOTH: (1.0, 3)},
}
"""Op, pass → the most time relative to eager's, and the most launches. One of them inverts a list of rows that comes
without its inverse."""


def verdicts_of(rows: list[Row]) -> Iterator[str]:
    """Yields the goals for each of our providers that was measured."""
    for row in rows:
        goal = GOALS.get(row["op"], {}).get(row["pass"])
        if goal is None or row["provider"] == EAGER or row["unavailable"]:
            continue
        ratio, launches = row["ratio_rounds"], row["launches"]
        measured = (f"{ratio:.2f} (min {row['ratio_min']:.2f}) of eager", ratio), (f"{launches:g} launches", launches)
        for (text, value), most in zip(measured, goal, strict=True):
            met = "met" if value <= most else "MISSED"
            yield f"{row['op']}, {row['pass']}, {row['provider']}: {text}, target {most:g}: {met}"
