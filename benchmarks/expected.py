"""`python -m benchmarks expected`: the share of a copy's bandwidth to expect of each kernel on a GPU, from its compiled
code. Nothing is measured.

It needs no GPU: without one it compiles for an H200. `compiled_shares.py` says what is counted, and what is left out.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from . import command
from .harness import Row
from .machine import Device, facts
from .op_cases import DENSE, GATHER, NORM, OPS, ROWS, TINY, VIT_B, VIT_S
from .op_kinds import Setting

SHAPES = (VIT_S, VIT_B, (32, 256, 1024), (48, 257, 1536), (16, 257, 4096))
KEPT = {DENSE: 0.8, ROWS: 0.5, GATHER: 0.5, NORM: 0.8}
"""Op → share of the batch that has a branch."""
SETTINGS = tuple(
    Setting(op, shape, round(kept * shape[0]), dtype, gamma=op != GATHER)
    for op, kept in KEPT.items()
    for dtype in (torch.bfloat16, torch.float32)
    for shape in SHAPES
)
UNKNOWN = "nothing is known of this GPU that shares could be expected from"


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "expected",
        help="shares of a copy's bandwidth to expect on a GPU, from compiled code",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny setting, to see that it runs")
    command.add_files(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    rows = expected_rows(TINY[:1] if options.tiny else SETTINGS)
    print(*lines_of(rows) if rows else [UNKNOWN], sep="\n")
    return 0 if command.written(options, rows) else 1


def expected_rows(settings: Iterable[Setting]) -> list[Row]:
    """Returns a row for each launch of our forward and backward; none for a GPU without figures.

    It compiles in a new process, where Triton doesn't interpret, and where a stand-in may take the place of a driver.
    """
    process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, TRITON_INTERPRET="0"), process:
        return process.submit(_rows, list(settings)).result()


def _rows(settings: list[Setting]) -> list[Row]:
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        from .gpu import stand_in

        stand_in.set_up_launches()
    from rdp_kernels.kernels.triton.launch import architecture

    from . import compiled_code, compiled_shares

    device = torch.device("cuda" if has_gpu else "cpu")
    target = architecture(device)
    gpu = compiled_shares.GPUS.get(target)
    if gpu is None:
        return []
    versions = {name: facts(Device.of("cpu"))[name] for name in ("torch", "triton", "commit", "date")}
    calls = []
    for labels, launch in itertools.chain.from_iterable(_launches(setting, device) for setting in settings):
        kernel = compiled_code.compile_launch(launch, compiled_code.CUDA[target])
        sizes = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in launch.arguments.items()}
        calls.append((labels, replace(launch, arguments=sizes), kernel))  # keeps no memory
    distinct = {kernel.hash: (kernel, launch) for _, launch, kernel in calls}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor() as pool:

        def read(kernel: Any, launch: Any) -> compiled_code.CudaCode:
            return compiled_code.read_cuda_code(kernel, Path(folder), compiled_shares.small_of(launch))

        codes = dict(zip(distinct, pool.map(read, *zip(*distinct.values(), strict=True)), strict=True))
    return [
        versions | labels | compiled_shares.expectation(launch, codes[kernel.hash], gpu)
        for labels, launch, kernel in calls
    ]


def _launches(setting: Setting, device: torch.device) -> Iterator[tuple[Row, Any]]:
    """Yields the launches of one call and its backward, which don't run, with their labels."""
    import rdp_kernels as rdp
    from rdp_kernels.kernels.triton.prepared import observed

    op, launches = OPS[setting.op](setting, device), []
    inputs = op.inputs(0)
    with rdp.use_backend("triton"), observed(launches.append):
        outs = op.ours(*inputs)
        forward = len(launches)
        torch.autograd.grad(outs, inputs, [torch.empty_like(out) for out in outs])
    for number, launch in enumerate(launches):
        yield setting.labels | {"pass": "forward" if number < forward else "backward"}, launch


def lines_of(rows: list[Row]) -> Iterator[str]:
    yield f"expected on an {rows[0]['gpu']}, from compiled code; nothing is measured"
    yield f"{'':30}registers  shared  programs  KiB in flight  waves  expected share of a copy"
    for call, group in itertools.groupby(rows, lambda row: (row["op"], row["shape"], row["dtype"])):
        yield " ".join(call)
        for row in group:
            code = f"{row['registers']:11}{row['shared_bytes']:8}{row['programs_fit']:10}"
            in_flight = f"{row['in_flight'] / 1024:.1f} of {row['needed_in_flight'] / 1024:.1f}"
            yield f"  {row['kernel']:26}{code}{in_flight:>15}{row['waves']:7.2f}{row['expected_share']:8.0%}"
