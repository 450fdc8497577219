"""The steps of a visit to a GPU, the most valuable first.

Each step is a command that also runs by itself. It writes results to disk at once, so that it can be stopped at any
time.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..harness import Row
from . import answers

MOST_PROCESSES = 14
FIXED, BEYOND, DRAWN = "tests/kernels/test_fixed.py", "tests/test_gpu.py", "tests/kernels"
BEYOND_ON_CPU = "tests/test_numbered.py"  # the inputs of the other tests, which only compare
TIMM = ("--model", "vit-s", "vit-b")
TUNED = ("residual_add_fwd", "residual_add_bwd", "residual_add_norm_fwd", "residual_add_norm_bwd", "gather_rows")
"""The kernels that take time. The others sum or invert small tensors."""


@dataclass(frozen=True)
class Workspace:
    """Where steps run, and where they write.

    Args:
        device: `"cuda"`, or `"cpu"` for a small rehearsal.
        machine: the end of the files' names.
        out: the folder for files that are kept.
        work: the folder for files that are needed until the visit ends.
    """

    device: str
    machine: str
    out: Path
    work: Path

    @property
    def in_small(self) -> bool:
        return self.device == "cpu"

    def file(self, name: str, kind: str = "csv") -> Path:
        return self.out / f"{name}-{self.machine}.{kind}"

    def rows_file(self, name: str) -> Path:
        """Returns the rows of `file(name)` with their types."""
        return self.work / f"{name}.json"

    @property
    def processes(self) -> int:
        return max(min((os.cpu_count() or 2) - 1, MOST_PROCESSES), 2)


Arguments = Callable[[Workspace], list[str]]
"""Arguments of the Python interpreter."""


@dataclass(frozen=True)
class Step:
    """One step.

    Args:
        share: its share of the time, as a weight relative to the steps still to come. The unit is seconds in a visit of
            nine minutes.
        arguments: the command.
        answer: the number that matters.
        rows: the name of the file with its rows, or None.
        in_small: environment variables in a rehearsal.
        fills: whether it uses all the time it gets, so that stopping it isn't a failure.
        by_default: whether it runs by default.
    """

    name: str
    what: str
    share: float
    arguments: Arguments
    answer: Callable[[list[Row]], str] | None = None
    rows: str | None = None
    in_small: tuple[tuple[str, str], ...] = ()
    fills: bool = False
    by_default: bool = True

    @property
    def is_tests(self) -> bool:
        return self.rows == TESTS


TESTS = "tests"
"""The file shared by the steps that run tests."""


def module(name: str, *options: str) -> Arguments:
    return lambda workspace: ["-m", name, *options]


def benchmark(name: str, on_gpu: tuple[str, ...], in_small: tuple[str, ...], file: str | None = None) -> Arguments:
    """Returns a step that runs a command of `python -m benchmarks`."""

    def arguments(workspace: Workspace) -> list[str]:
        options = ["--tiny", *in_small] if workspace.in_small else [*on_gpu]
        files = ["--csv", str(workspace.file(file or name)), "--json", str(workspace.rows_file(file or name))]
        return ["-m", "benchmarks", name, *options, "--device", workspace.device, *files]

    return arguments


def run_tests(step: str, on_gpu: tuple[str, ...], in_small: tuple[str, ...], parallel: bool = True) -> Arguments:
    """Returns a step that runs tests, with a row for each test."""

    def arguments(workspace: Workspace) -> list[str]:
        spread = parallel and importlib.util.find_spec("xdist") is not None
        workers = ["-n", str(workspace.processes), "--dist", "worksteal"] if spread else []
        record = ["-p", "benchmarks.gpu.recorder", "--record", str(workspace.file(TESTS)), "--record-step", step]
        # A new warning on a GPU must not hide whether numbers are right.
        return [
            "-m",
            "pytest",
            "--tb=line",
            "-W",
            "default",
            *workers,
            *record,
            *(in_small if workspace.in_small else on_gpu),
        ]

    return arguments


STEPS = (
    Step("library", "the compiled library, built if it is missing", 60, module("benchmarks.gpu.library")),
    Step("machine", "the machine and its versions", 20, module("rdp_kernels.info")),
    Step(
        "table",
        "the fixed table of correctness: every op, layout and dtype",
        100,
        run_tests("table", (FIXED,), (FIXED, "-k", "nchw")),
        answers.right_of_tests,
        TESTS,
    ),
    Step(
        "beyond",
        "tensors beyond 2³¹ elements, streams, no synchronisation",
        70,
        run_tests("beyond", (BEYOND,), (BEYOND_ON_CPU,), parallel=False),  # one takes a third of an H200's memory
        answers.right_of_tests,
        TESTS,
    ),
    Step(
        "host",
        "host time and launches of a call",
        40,
        benchmark("host", ("--quick",), ()),
        answers.host_time,
        "host",
    ),
    Step(
        "ops",
        "ops against a copy, eager and other libraries",
        80,
        benchmark("ops", ("--no-compiled", "--turns", "6"), ("--no-compiled",)),
        answers.op_speed,
        "ops",
    ),
    Step(
        "shares",
        "the expected share of a copy beside the measured one, in the rows of ops",
        20,
        lambda workspace: [
            *("-m", "benchmarks.gpu.shares", str(workspace.file("ops"))),
            *(["--tiny"] if workspace.in_small else []),
        ],
    ),
    Step(
        "step",
        "a pair of training steps on timm's ViTs, bf16",
        140,
        benchmark(
            "step",
            (*TIMM, "--mode", "block", "sample", "--prob", "0.3", "--drop-path", "eager", "--turns", "6"),
            ("--model", "vit-s", "--mode", "block", "--turns", "1", "--drop-path", "eager"),
        ),
        answers.step_time,
        "step",
    ),
    Step(
        "memory",
        "what iterations save, and their peak",
        35,
        benchmark(
            "memory", ("--quick", *TIMM, "--dtype", "bf16"), ("--model", "vit-s", "--mode", "block", "--turns", "1")
        ),
        answers.peak_memory,
        "memory",
    ),
    Step(
        "compiled",
        "ops against torch.compile's",
        40,
        benchmark("ops", ("--quick",), ("--op", "gather_rows", "--pass", "forward", "--turns", "1"), "ops-compiled"),
        answers.against_compiled,
        "ops-compiled",
    ),
    Step(
        "drawn",
        "the drawn tests of the kernels, for the time that is left",
        60,
        run_tests("drawn", (DRAWN, f"--ignore={FIXED}"), (DRAWN, f"--ignore={FIXED}", "-k", "against_float64")),
        answers.right_of_tests,
        TESTS,
        in_small=(("RDP_EXAMPLES", "0.02"),),
        fills=True,
    ),
    Step(
        "tune",
        "launch numbers for this GPU",
        300,
        lambda workspace: ["-m", "benchmarks", "tune", "--op", *TUNED, "--processes", str(workspace.processes)],
        by_default=False,
    ),
    Step(
        "sanitize",
        "the fixed table under compute-sanitizer",
        300,
        module("benchmarks", "sanitize", "--tool", "memcheck", "racecheck"),
        by_default=False,
    ),
)
"""Ordered by value. The drawn tests end a visit; `tune` and `sanitize` are for a second visit."""
