"""`python -m benchmarks tune`: searches the launch numbers of the Triton kernels on this machine's GPU.

It tries tiles, warps, stages and programs for each kernel and width, and checks that results stay the same. It prints
the table for this architecture: paste it into `CONFIGS` of `kernels/triton/launch.py`. It takes minutes. Most of them
compile kernels; with --processes several processes do so before any kernel is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

import rdp_kernels as rdp
from rdp_kernels.kernels.triton.launch import CONFIGS
from rdp_kernels.kernels.triton.prepared import Launch

from . import command
from .harness import told
from .machine import Device, facts
from .tuning import Time, Tuned, WrongResult, compile_candidates, table_source, tune
from .tuning_works import SETTINGS, Setting, works_of

REPEATS = 25
FLUSH = 256 << 20  # bytes: writing them takes a GPU longer than the host needs to launch the timed kernels


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "tune", help="launch numbers for this GPU", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--op", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="default: all")
    parser.add_argument(
        "--processes", type=command.count, default=1, help="number of processes that compile; default: 1"
    )
    parser.add_argument("--device", choices=("cuda",), default="cuda", help="the only choice")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Searches, and prints the table of the best numbers. An interrupt keeps the finished ops."""
    reason = command.NO_GPU if not torch.cuda.is_available() else rdp.available_backends()["triton"]
    if reason is not None:
        print(f"tune needs a GPU, and Triton for it: {reason}", file=sys.stderr)
        return 2
    device = Device.of(options.device)
    if options.processes > 1:
        compile_ahead(options.op, options.processes)
    tuned, code = search(options.op, device.device, flushed_time(device))
    what = facts(device)
    comment = ", ".join(str(what[name]) for name in ("device", "date", "commit"))
    print(table_source(tuned, device.device, f"{comment}, torch {what['torch']}, triton {what['triton']}"))
    if tuned:
        ratios = [each.ratio for each in tuned]
        print(f"# {len(tuned)} sets of numbers, {min(ratios):.2f} to {max(ratios):.2f} of the present ones' time")
    return code


def compile_ahead(ops: list[str], processes: int) -> None:
    """Compiles the candidates into Triton's cache in other processes. The search also works without, but takes
    longer."""
    jobs = [(op, setting) for op in ops for setting in SETTINGS[op]]
    context = multiprocessing.get_context("spawn")  # CUDA can't be used in a fork
    with ProcessPoolExecutor(min(processes, len(jobs)), context) as pool:
        for (op, (shape, dtype)), done in [(job, pool.submit(_compile, *job)) for job in jobs]:
            try:
                done.result()
            except Exception as error:
                _tell(f"not compiled ahead: {op} {list(shape)} {dtype}: {told(error)}")


def _compile(op: str, setting: Setting) -> None:
    device = torch.device("cuda")
    compile_candidates(op, works_of(op, device, (setting,)), device)


def search(ops: list[str], device: torch.device, time: Time) -> tuple[list[Tuned], int]:
    """Returns the best numbers, and an exit code."""
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
                ratio = f"{each.ratio:.3f} × the present time, of {each.tried}"
                _tell(f"{op} up to {each.largest} bytes: {ratio}: {each.config}")
            tuned += found
    except KeyboardInterrupt:
        _tell("Interrupted.")
        code = 130
    return tuned, code


def flushed_time(device: Device) -> Time:
    """Returns a function that times launches one after the other, in milliseconds. Their inputs aren't in the cache."""
    other = torch.empty(max(4 * device.cache_bytes, FLUSH), dtype=torch.uint8, device=device.device)

    def time(launches: list[Launch]) -> float:
        assert launches, "nothing to time"
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            other.zero_()
            start.record()
            for launch in launches:
                launch.run()
            end.record()
            times.append((start, end))
        torch.cuda.synchronize(device.device)
        return statistics.median(start.elapsed_time(end) for start, end in times)

    return time


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
