"""What stands between a kernel and a copy's speed, in its compiled code: barriers, registers, and loads on their way.

The calls are those of real models: tokens of 384 to 4096 channels. About a minute and a half for what is slow.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.compiled_code import CUDA, caught_launches
from benchmarks.compiled_shares import GPUS, expectation, small_of

from .cases import Case
from .conftest import Read
from .test_compiled_code import SMALL, SMALL_OF

H200 = GPUS["sm_90"]
WIDTHS = (384, 768, 1024, 1536, 4096)
DTYPES = (torch.bfloat16, torch.float32)
ADD = Case("add", (64, 197, 0), row_scale=True)
ADD_ROWS = Case("add rows", (64, 197, 0), rows="some", next_rows="some")
ADD_MIXED = Case("add, frozen rows", (64, 197, 0), rows="mixed", next_rows="mixed", row_scale=True)
NORM = Case("norm", (64, 197, 0), norm="layer", next_rows="all", row_scale=True)
NORM_ROWS = Case("norm rows", (64, 197, 0), norm="layer", rows="some", next_rows="some")
GATHER = Case("gather", (64, 197, 0), rows=None, next_rows="some")
WIDE_VECTORS = replace(NORM, why="norm, fp32 weights", vectors=torch.float32)
CALLS = [
    pytest.param(
        replace(case, shape=(*case.shape[:2], width), residual=dtype),
        architecture,
        id=f"{architecture}-{case.why}-{width}-{str(dtype).removeprefix('torch.')}",
        marks=[] if (architecture, width) == ("sm_90", 768) else pytest.mark.slow,
    )
    for architecture in CUDA
    for width in WIDTHS
    for dtype in DTYPES
    for case in (ADD, ADD_ROWS, ADD_MIXED, NORM, NORM_ROWS, GATHER, WIDE_VECTORS)
]
WARPS_OF_FOUR_PROGRAMS = 16
ENOUGH = {
    "_residual_add_fwd_kernel": 0.85,
    "_residual_add_bwd_kernel": 0.85,
    "_gather_rows_kernel": 0.85,
    "_residual_add_norm_fwd_kernel": 0.75,
    "_residual_add_norm_bwd_kernel": 0.75,
}
"""The share of a copy's bandwidth for which enough bytes are to be on their way."""


@pytest.mark.parametrize(("case", "architecture"), CALLS)
def test_nothing_waits_without_need(case: Case, architecture: str, read: Read):
    launches = caught_launches(case.run, architecture)
    small = set().union(*(small_of(launch) for launch in launches))
    for launch, code in zip(launches, read(launches, architecture, small), strict=True):
        kernel = launch.kernel.__name__
        what = f"{kernel}: {code}"
        assert code.local_bytes == 0, what
        widths = code.widths(but=SMALL_OF.get(kernel, SMALL))
        assert set().union(*widths.values()) == {16}, what
        fitting = H200.fitting(launch.config.num_warps, code.registers, code.shared_bytes)
        if case.shape[-1] <= 1024:
            assert fitting * launch.config.num_warps >= WARPS_OF_FOUR_PROGRAMS, what

        if kernel == "_sum_partials_kernel":
            assert code.loads_in_flight >= 8, what
        elif kernel in ("_residual_add_fwd_kernel", "_gather_rows_kernel"):
            assert (code.barriers, code.shared_bytes) == (0, 0), what
        elif kernel == "_residual_add_bwd_kernel":
            row_of_sums = launch.arguments["BLOCK_N"] * 4 * launch.config.num_warps
            assert code.barriers_in_loop == 0, what
            assert code.shared_bytes <= row_of_sums, f"more than the sum over a tile's rows needs: {what}"
        elif kernel == "_residual_add_norm_bwd_kernel":
            assert code.barriers_in_loop <= 3, what
            assert code.async_copies[16] >= 4, f"dout, dnext, the norm's input and the update: {what}"
            assert code.bytes_ahead >= 4 * 16, f"copies wait for each other: {what}"
        if kernel in ENOUGH:
            # Asynchronous loads of the next tiles stand behind the stores, and wait for nothing.
            assert code.loads_before_store or "norm_bwd" in kernel, what
        if kernel in ENOUGH and architecture == "sm_90":
            in_flight = expectation(launch, code, H200)["in_flight"]
            assert H200.speed(in_flight) >= ENOUGH[kernel], f"{in_flight / 1024:.1f} KiB in flight: {what}"
