"""`python -m benchmarks traffic`: the bytes that each op moves, relative to the bytes that it needs.

| provider | its bytes |
|---|---|
| eager | counted, for the ops that autograd and the formula dispatch |
| compiled | a model: the fewest kernels that the formula can be compiled to |
| ours eager | counted as for eager |
| ours triton | counted in Triton's interpreter: each element that our kernels load or store |

"needed" counts each needed byte of the big tensors once, without γ, weights, masks and indices. The counts of ours
leave these vectors out too; those of eager include them. "sectors" are the 32-byte pieces of memory that a tile's loads
and stores touch, the least that a GPU moves. Nothing is timed, and the numbers are the same in every run. Tensors are
small, because all numbers grow with them.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import torch
from rich.console import Console

from . import command
from .harness import CheckFailed, Row, quotient
from .machine import Device, facts
from .op_bytes import Moved
from .op_cases import CHAIN, DENSE, GATHER, NORM, NORM_ROWS, OPS, PATH, RELU, RMS, ROWS, TINY
from .op_goals import setting_of
from .op_kinds import Setting
from .op_providers import EAGER, OURS, OURS_EAGER, Runner, Sets, on_backend
from .pass_tables import Columns, pass_tables

PASSES = ("forward", "backward")
TOKENS, IMAGES, ODD = (8, 16, 384), (8, 64, 7, 7), (6, 7, 13)
BF16 = torch.bfloat16
FULL = (
    Setting(DENSE, TOKENS, None, gamma=False),
    *(Setting(DENSE, TOKENS, kept) for kept in (8, 6, 4)),
    Setting(DENSE, TOKENS, 4, BF16),
    Setting(DENSE, IMAGES, 4, channels_last=True),
    Setting(DENSE, ODD, 3),  # rows that end within a sector
    Setting(RELU, IMAGES, 4, gamma=False),
    Setting(ROWS, TOKENS, 4),
    Setting(GATHER, TOKENS, 4, gamma=False),
    Setting(PATH, TOKENS, 4),
    Setting(CHAIN, TOKENS, 4),
    Setting(NORM, TOKENS, 6),
    Setting(RMS, TOKENS, None, gamma=False),
    Setting(NORM_ROWS, TOKENS, 4),
)
COUNTED, MODEL = "counted", "model"
Count = tuple[int, int]
"""Bytes of the elements, and bytes of the sectors."""
KernelCount = Callable[[Setting], dict[str, Count] | str]
"""Returns the counts by pass, or why they can't be counted."""


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "traffic", help="bytes of each op", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"some of {', '.join(OPS)}"
    )
    command.add_sizes(parser, "half of the settings", "tiny tensors, where vectors are a large part of the bytes")
    command.add_files(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Counts, prints and writes. An interrupt keeps the rows so far."""
    console = Console(width=command.WIDTH)
    settings = {"tiny": TINY, "quick": FULL[::2], "full": FULL}[options.size]
    chosen = [setting for setting in settings if setting.op in options.op]
    with interpreting() as count_kernels:
        rows, code = command.measured(
            console,
            [lambda: chosen],
            len(chosen),
            lambda on_round: TrafficSession(count_kernels, on_round),
            one_threaded=True,
        )
    if rows:
        tables = pass_tables(rows, COLUMNS, ("provider", "how"))
        console.print(*tables, command.machine_line(rows[0]), *notes_of(rows), *verdicts_of(rows), sep="\n")
    return code if command.written(options, rows) else 1


# Counting


class TrafficSession:
    """Counts settings and collects their `rows`.

    Args:
        count_kernels: counts the bytes that our Triton kernels move.
        on_round: called after every setting.
    """

    def __init__(self, count_kernels: KernelCount, on_round: Callable[[], object] = lambda: None):
        self.count_kernels, self.on_round = count_kernels, on_round
        self.rows: list[Row] = []
        self._facts = facts(Device.of("cpu"))

    def measure(self, setting: Setting) -> None:
        """Counts a setting. Raises `CheckFailed` if a counted provider gives wrong results."""
        op = OPS[setting.op](setting)
        sets, needed = Sets(op, 1), op.needed.times(op.sample_bytes)
        kernels = self.count_kernels(setting)
        reason = kernels if isinstance(kernels, str) else ""
        eager, ours = (
            checked(Runner(compute, sets)).count_bytes() for compute in (op.eager, on_backend("eager", op.ours))
        )
        moved = {
            EAGER: (COUNTED, eager),
            op.compiled: (MODEL, op.compiled_moves.times(op.sample_bytes)),
            OURS_EAGER: (COUNTED, ours),
            OURS: (COUNTED, None if reason else Moved(*(kernels[direction][0] for direction in PASSES))),
        }
        for direction in PASSES:
            for name, (how, moves) in moved.items():
                size = None if moves is None else moves.by(direction)
                sectors = kernels[direction][1] if name == OURS and not reason else None
                self.rows.append(
                    self._facts
                    | {"unit": direction, **setting.labels, "pass": direction, "provider": name, "how": how}
                    | {"needed_bytes": needed.by(direction), "moved_bytes": size, "sector_bytes": sectors}
                    | {"bytes_ratio": quotient(size, needed.by(direction))}
                    | {"sectors_ratio": quotient(sectors, needed.by(direction))}
                    | {"unavailable": reason if name == OURS else ""}
                )
        self.on_round()


def checked(runner: Runner) -> Runner:
    """Returns `runner`. Raises `CheckFailed` if its results or gradients differ from the definition's."""
    check = runner.sets.check("both", runner.run("both", 0))
    if not check.passed:
        raise CheckFailed(
            f"{runner.sets.op.setting.labels}: differs by {check.error:.1e}, its bound is {check.bound:.1e}"
        )
    return runner


def count_kernels(setting: Setting) -> dict[str, Count] | str:
    """Counts the loads and stores of the big tensors by our kernels. Triton must be interpreting. Raises `CheckFailed`
    if torch's own ops, which aren't counted, move big tensors too."""
    from .kernel_traffic import SECTOR, count_traffic  # imports triton

    op = OPS[setting.op](setting)
    runner = checked(Runner(on_backend("triton", op.ours), Sets(op, 1)))
    runner.run("backward", 0)  # makes the graph
    counts = {}
    for direction in PASSES:
        with count_traffic() as counted:
            runner.run(direction, 0)
        if counted.torch_ops:
            raise CheckFailed(f"{setting.labels}, {direction}: besides the kernels torch runs {counted.torch_ops}")
        big = counted.big
        counts[direction] = (sum(each.bytes for each in big), SECTOR * sum(each.sectors for each in big))
    return counts


@contextlib.contextmanager
def interpreting() -> Iterator[KernelCount]:
    """Yields `count_kernels`. If Triton doesn't interpret in this process, the yielded function runs in another process
    that interprets: Triton reads TRITON_INTERPRET only when it is imported."""
    if importlib.util.find_spec("triton") is None:
        yield lambda setting: "triton is not installed"
    elif os.environ.get("TRITON_INTERPRET") == "1":
        yield count_kernels
    else:
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1"):
            process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            with process:
                yield lambda setting: process.submit(count_kernels, setting).result()


# Tables

COLUMNS: Columns = {
    "needed": ("needed_bytes", ",.0f"),
    "bytes": ("moved_bytes", ",.0f"),
    "/needed": ("bytes_ratio", ".3f"),
    "sectors/needed": ("sectors_ratio", ".3f"),
}


def notes_of(rows: list[Row]) -> Iterator[str]:
    """Yields why providers were not counted."""
    for name, reason in dict.fromkeys((row["provider"], row["unavailable"]) for row in rows if row["unavailable"]):
        yield f"– no {name}: {reason}"


def verdicts_of(rows: list[Row]) -> Iterator[str]:
    """Yields the number of passes in which our kernels move exactly the needed bytes, and the other passes."""
    ours = [row for row in rows if row["provider"] == OURS and not row["unavailable"]]
    if ours:
        more = [row for row in ours if row["moved_bytes"] != row["needed_bytes"]]
        yield f"{OURS}: exactly the needed bytes in {len(ours) - len(more)} of {len(ours)} passes"
        for row in more:
            yield f"  {row['moved_bytes']:,} of {row['needed_bytes']:,} needed: {setting_of(row)}, {row['pass']}"
