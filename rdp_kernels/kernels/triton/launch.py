"""The table of launch numbers, and how a call is cut into tiles by them.

The numbers were chosen by reasoning (bytes in flight, registers) and from compiled code, and haven't been tuned on a
GPU yet: `python -m benchmarks tune` does that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .support import interpreted


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel cuts up its work. Bytes are those of the widest dtype among a call's tensors with rows.

    Args:
        tile: the bytes of a tile, rows times columns.
        max_columns: the most bytes of a tile's row.
        num_warps: Triton's option.
        num_stages: where a program works through tiles of one sample, of how many tiles loads are in flight or in use.
        tiles: where a program sums over rows, the least number of tiles that it works through.
        programs: where a program sums over rows, the most programs for each multiprocessor. As many fit.
    """

    tile: int
    max_columns: int
    num_warps: int
    num_stages: int = 1
    tiles: int = 1
    programs: int = 1


Widths = tuple[tuple[int, LaunchConfig], ...]
"""Pairs (most bytes of a row, config) in ascending order; the last one also serves wider rows."""

# A thread holds 16 bytes of each tensor's tile, the widest access, or a multiple of that. Programs that sum are as many
# as registers let run at the same time, because each of them writes a row of partial sums. The add's backward hides the
# latency of memory by its number of threads: a pipeline would bring shared memory and barriers, of which it has none.
# The norm's backward has few threads and many registers, so that its loads are pipelined. Up to rows of 8192 bytes two
# tiles are loaded ahead; wider ones would need more shared memory than some GPUs have (99 KB).
_ADD: Widths = ((2**31, LaunchConfig(tile=4096, max_columns=2048, num_warps=4)),)
_ADD_BWD: Widths = ((2**31, LaunchConfig(tile=4096, max_columns=2048, num_warps=4, tiles=4, programs=5)),)
_GATHER: Widths = ((2**31, LaunchConfig(tile=8192, max_columns=8192, num_warps=4)),)
_NORM: Widths = (
    (2048, LaunchConfig(tile=2048, max_columns=2048, num_warps=2)),
    (4096, LaunchConfig(tile=4096, max_columns=4096, num_warps=4)),
    (8192, LaunchConfig(tile=8192, max_columns=8192, num_warps=8)),
    (16384, LaunchConfig(tile=16384, max_columns=16384, num_warps=16)),
    (65536, LaunchConfig(tile=16384, max_columns=65536, num_warps=32)),
)
_NORM_BWD: Widths = (
    (2048, LaunchConfig(tile=2048, max_columns=2048, num_warps=4, num_stages=3, tiles=4, programs=4)),
    (4096, LaunchConfig(tile=4096, max_columns=4096, num_warps=8, num_stages=3, tiles=4, programs=2)),
    (8192, LaunchConfig(tile=8192, max_columns=8192, num_warps=16, num_stages=3, tiles=4, programs=1)),
    (16384, LaunchConfig(tile=8192, max_columns=16384, num_warps=16, num_stages=2, tiles=4, programs=1)),
)
_NORM_BWD_WIDE: Widths = ((2**31, LaunchConfig(tile=8192, max_columns=4096, num_warps=16, tiles=4)),)
_REDUCE: Widths = ((2**31, LaunchConfig(tile=16384, max_columns=64, num_warps=4)),)
_INVERT: Widths = ((2**31, LaunchConfig(tile=8192, max_columns=8192, num_warps=4)),)

# By kernel, then by architecture. An architecture that isn't listed takes "default".
CONFIGS: dict[str, dict[str, Widths]] = {
    "residual_add_fwd": {"default": _ADD},
    "residual_add_bwd": {"default": _ADD_BWD},
    "residual_add_norm_fwd": {"default": _NORM},
    "residual_add_norm_bwd": {"default": _NORM_BWD},
    "residual_add_norm_bwd_wide": {"default": _NORM_BWD_WIDE},
    "gather_rows": {"default": _GATHER},
    "sum_partials": {"default": _REDUCE},
    "invert_rows": {"default": _INVERT},
}

REGISTERS = 65536
"""The 32-bit registers of a multiprocessor, on every CUDA architecture so far."""
REGISTER_UNIT = 8
"""A thread gets a multiple of so many registers."""
LONG_SAMPLE = 4
"""The least number of tiles of a sample for which tiles don't span samples."""
IDLE_COLUMNS = 0.03
"""The share of a tile's columns that may lie beyond a tensor's width, for tiles of wider rows."""
MAX_PROGRAM_ROWS = 2**23
"""The most rows of a program."""
MAX_TILE_ROWS = 2**31 - MAX_PROGRAM_ROWS
"""Row numbers are 32-bit. The last program may run past the end, so the limit stays a program's rows below 2³¹."""


@dataclass(frozen=True)
class Tiles:
    """How a `num_rows` × `width` matrix is cut for one kernel: into tiles of block_m × block_n, of which each program
    takes `tiles`. A program's tiles lie one below the other, so that it sums over rows.

    With `whole_rows` a program spans the width, if possible in one tile. With `channels` the rows repeat every
    `channels` rows, and a program that sums takes the same channels again and again: `tiles` counts these repetitions,
    and each of them takes all columns. With `positions`, the rows of a sample, no tile has rows of two samples where
    samples are long enough (`by_sample`).
    """

    config: LaunchConfig
    block_m: int
    block_n: int
    row_blocks: int
    column_blocks: int
    tiles: int = 1
    by_sample: bool = False

    @classmethod
    def of(
        cls,
        op: str,
        device: torch.device,
        num_rows: int,
        width: int,
        itemsize: int,
        whole_rows: bool = False,
        sums: bool = False,
        channels: int | None = None,
        positions: int | None = None,
    ) -> Tiles:
        reason = why_not_rows(num_rows)
        if reason is not None:  # a compiled graph doesn't call `why_not`
            raise RuntimeError(f"{op}: {reason}: split the batch, or take another backend (rdp.use_backend)")
        config = config_for(op, device, row_bytes(width, itemsize))
        block_m, block_n = block_shape(config, num_rows if channels is None else channels, width, itemsize, whole_rows)
        column_blocks = 1 if whole_rows else cdiv(width, block_n)
        by_sample = positions is not None and positions >= LONG_SAMPLE * block_m
        if positions is not None and by_sample:
            blocks, others, least = num_rows // positions * cdiv(positions, block_m), column_blocks, config.tiles
        elif channels is None:
            blocks, others, least = cdiv(num_rows, block_m), column_blocks, config.tiles
        else:
            blocks, others = num_rows // max(channels, 1), cdiv(channels, block_m)
            least = cdiv(config.tiles, max(column_blocks, 1))
        tiles = 1
        if sums:
            most = max(config.programs * multiprocessors(device) // max(others, 1), 1)
            tiles = min(max(least, cdiv(blocks, most)), max(blocks, 1), MAX_PROGRAM_ROWS // block_m - 1)
        return cls(config, block_m, block_n, cdiv(blocks, tiles), others, tiles, by_sample)

    @property
    def num_stages(self) -> int:
        """Those of a loop. Triton pipelines lookups of samples badly: with them in the loop nothing is pipelined."""
        return self.config.num_stages if self.by_sample else 1

    @property
    def num_programs(self) -> int:
        """One for each pair of a row block and a column block."""
        return self.row_blocks * self.column_blocks


def why_not_rows(num_rows: int) -> str | None:
    """Why a call can't have this many tile rows (see `layout.Tiling`); None if it can."""
    if num_rows <= MAX_TILE_ROWS:
        return None
    return f"the Triton kernels number up to {MAX_TILE_ROWS} rows of tiles, and this call has {num_rows}"


def options_of(config: LaunchConfig, device: torch.device) -> dict[str, int]:
    """Triton's options. On CUDA they grant all the registers that the threads of `programs` programs can have: left to
    itself, the assembler spills a few so that one more program can run at a time."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if architecture(device).startswith("gfx"):  # a warp has 64 threads there, and a program at most 1024
        options["num_warps"] = min(config.num_warps, 16)
    if architecture(device).startswith("sm_"):
        of_a_thread = REGISTERS // (32 * config.num_warps * config.programs)
        options["maxnreg"] = min(255, of_a_thread - of_a_thread % REGISTER_UNIT)
    return options


def config_for(op: str, device: torch.device, size: int) -> LaunchConfig:
    """The numbers for kernel `op` on rows of so many bytes."""
    widths = CONFIGS[op].get(architecture(device)) or CONFIGS[op]["default"]
    return next((config for largest, config in widths if size <= largest), widths[-1][1])


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; an H200's without one."""
    if device.type != "cuda" or interpreted():
        return 132
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def architecture(device: torch.device) -> str:
    """`"sm_90"`, `"gfx942"`, or `"interpreter"`."""
    if device.type != "cuda" or interpreted():
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def block_shape(config: LaunchConfig, num_rows: int, width: int, itemsize: int, whole_rows: bool) -> tuple[int, int]:
    """Rows and columns of a tile, powers of 2."""
    largest = max(config.max_columns // itemsize, 1)
    columns = min(next_power_of_2(width), largest) if whole_rows else _columns(width, largest)
    # Other rows are accessed element by element. A thread needs registers for the addresses, so that it gets fewer.
    tile = config.tile if is_aligned(width) else config.tile // 4
    rows = min(max(tile // (columns * itemsize), 1), next_power_of_2(num_rows))
    return rows, columns


def row_bytes(width: int, itemsize: int) -> int:
    """The bytes of a row, by which numbers are looked up. They count twice where elements are accessed one by one."""
    return width * itemsize * (1 if is_aligned(width) else 2)


def is_aligned(width: int) -> bool:
    """Whether Triton accesses rows in 16 bytes: it marks the widths that 16 divides."""
    return width % 16 == 0


def _columns(width: int, largest: int) -> int:
    """The largest power of 2 up to `largest` that covers `width` with few idle columns, or the one with the fewest. It
    is at least 64 where rows are so wide, so that accesses take whole sectors of memory."""
    sizes = [1 << bits for bits in range(6, largest.bit_length()) if 1 << bits <= next_power_of_2(width)]
    covered = {size: cdiv(width, size) * size for size in reversed(sizes)}
    few = next((size for size in covered if covered[size] - width <= IDLE_COLUMNS * covered[size]), None)
    return few or min(covered, key=covered.__getitem__, default=min(next_power_of_2(width), largest))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
