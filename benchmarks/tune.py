"""`python -m benchmarks tune`: the launch numbers of the Triton kernels, searched anew on this machine's GPU.

Tries a grid of block sizes, warps and tiles for each kernel and width, checks that results stay what they are, and
prints the table for this architecture: paste it into `CONFIGS` of `rdp_kernels/_triton/launch.py`. Takes minutes; most
of them compile kernels.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch

import rdp_kernels as rdp
from rdp_kernels._triton.launch import CONFIGS, Launch

from . import command
from .machine import Device, facts
from .tuning import Time, Tuned, WrongResult, table_source, tune
from .tuning_works import works_of

REPEATS = 25
FLUSH = 256 << 20  # bytes: writing them takes a GPU longer than the host takes to launch what is timed


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune", help="launch numbers for this GPU", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="default: all")
    parser.add_argument("--device", choices=("cuda",), default="cuda", help="there is no other")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Searches, and prints the table of what was found; after an interrupt, of the ops that are done."""
    reason = command.NO_GPU if not torch.cuda.is_available() else rdp.available_backends()["triton"]
    if reason is not None:
        print(f"tune needs a GPU, and Triton for it: {reason}", file=sys.stderr)
        return 2
    device = Device.of(options.device)
    tuned, code = search(options.op, device.device, flushed_time(device))
    what = facts(device)
    comment = ", ".join(str(what[name]) for name in ("device", "date", "commit"))
    print(table_source(tuned, device.device, f"{comment}, torch {what['torch']}, triton {what['triton']}"))
    return code


def search(ops: list[str], device: torch.device, time: Time) -> tuple[list[Tuned], int]:
    """What was found, and an exit code."""
    tuned: list[Tuned] = []
    code = 0
    try:
        for op in ops:
            try:
                found = tune(op, works_of(op, device), device, time, _tell)
            except WrongResult as error:
                _tell(f"not tuned: {error}")
                code = 1
                continue
            for each in found:
                _tell(f"{op} up to {each.largest}: {each.ratio:.3f} × the present time, of {each.tried}: {each.config}")
            tuned += found
    except KeyboardInterrupt:
        _tell("Interrupted.")
        code = 130
    return tuned, code


def flushed_time(device: Device) -> Time:
    """Milliseconds that launches take one after the other, out of a cache that holds something else."""
    other = torch.empty(max(4 * device.cache_bytes, FLUSH), dtype=torch.uint8, device=device.device)

    def time(launches: list[Launch]) -> float:
        assert launches, "nothing to time"
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()
            start.record()
            for launch in launches:
                launch.run(device.device)
            end.record()
            times.append((start, end))
        torch.cuda.synchronize(device.device)
        return statistics.median(start.elapsed_time(end) for start, end in times)

    return time


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
