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
    """How one kernel cuts up its work.

    Args:
        tile: the number of elements of a tile, rows times columns.
        max_columns: the most columns of a tile.
        num_warps, num_stages: Triton's options.
        tiles: where a program sums over rows, the least number of tiles that it works through.
    """

    tile: int
    max_columns: int
    num_warps: int
    num_stages: int = 1
    tiles: int = 1


Widths = tuple[tuple[int, LaunchConfig], ...]
"""Pairs (largest width, config) in ascending order; the last one also serves wider rows."""

# Elements of a tile that a thread holds, at 32 threads a warp: 8 in adds and most backwards, whose operands share the
# registers (16 bytes of a 16-bit one); 16 in the wide backward; 16 to 32 in norms, which keep their row; 32 in gathers.
# A program that sums works through 8 tiles, so that partial sums are an eighth of what they sum.
_ADD: Widths = ((2**31, LaunchConfig(tile=1024, max_columns=1024, num_warps=4)),)
_ADD_BWD: Widths = ((2**31, LaunchConfig(tile=1024, max_columns=1024, num_warps=4, tiles=8)),)
_GATHER: Widths = ((2**31, LaunchConfig(tile=4096, max_columns=4096, num_warps=4)),)
_NORM: Widths = (
    (1024, LaunchConfig(tile=2048, max_columns=1024, num_warps=4)),
    (4096, LaunchConfig(tile=4096, max_columns=4096, num_warps=8)),
    (16384, LaunchConfig(tile=8192, max_columns=16384, num_warps=16)),
)
_NORM_BWD: Widths = (
    (512, LaunchConfig(tile=1024, max_columns=1024, num_warps=4, tiles=8)),
    (1024, LaunchConfig(tile=2048, max_columns=1024, num_warps=8, tiles=8)),
    (2048, LaunchConfig(tile=2048, max_columns=2048, num_warps=8, tiles=8)),
    (4096, LaunchConfig(tile=4096, max_columns=4096, num_warps=16, tiles=8)),
)
_NORM_BWD_WIDE: Widths = ((2**31, LaunchConfig(tile=4096, max_columns=4096, num_warps=8, tiles=8)),)
_REDUCE: Widths = ((2**31, LaunchConfig(tile=2048, max_columns=64, num_warps=4)),)
_INVERT: Widths = ((2**31, LaunchConfig(tile=1024, max_columns=1024, num_warps=4)),)

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
MAX_PARTIALS = 1024
"""The most rows of partial sums: enough programs to fill any GPU, few enough to be summed in microseconds."""


MAX_TILE_ROWS = 2**31 - 2**23
"""Row numbers are 32-bit. The last program may run up to 2²³ rows past the end, so the limit stays that far below
2³¹."""


@dataclass(frozen=True)
class Tiles:
    """How a `num_rows` × `width` matrix is cut for one kernel: into tiles of block_m × block_n, of which each program
    takes `tiles`, one below the other. With `whole_rows` a program spans the width, if possible in one tile."""

    config: LaunchConfig
    num_rows: int
    width: int
    block_m: int
    block_n: int
    whole_rows: bool = False
    tiles: int = 1

    @classmethod
    def of(
        cls, op: str, device: torch.device, num_rows: int, width: int, whole_rows: bool = False, sums: bool = False
    ) -> Tiles:
        reason = why_not_rows(num_rows)
        if reason is not None:  # a compiled graph doesn't call `why_not`
            raise RuntimeError(f"{op}: {reason}: split the batch, or take another backend (rdp.use_backend)")
        config = config_for(op, device, width)
        block_m, block_n = block_shape(config, num_rows, width, whole_rows)
        blocks = cdiv(num_rows, block_m)
        tiles = min(max(config.tiles, cdiv(blocks, MAX_PARTIALS)), max(blocks, 1)) if sums else 1
        return cls(config, num_rows, width, block_m, block_n, whole_rows, tiles)

    @property
    def row_blocks(self) -> int:
        return cdiv(self.num_rows, self.block_m * self.tiles)

    @property
    def column_blocks(self) -> int:
        return 1 if self.whole_rows else cdiv(self.width, self.block_n)

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
    """Triton's options. On CUDA they grant all the registers that the threads can have: left to itself, the assembler
    spills a few so that one more program can run at a time."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if architecture(device).startswith("sm_"):
        options["maxnreg"] = min(255, REGISTERS // (32 * config.num_warps))
    return options


def config_for(op: str, device: torch.device, width: int) -> LaunchConfig:
    """The numbers for kernel `op` on tensors of this width."""
    widths = CONFIGS[op].get(architecture(device)) or CONFIGS[op]["default"]
    return next((config for largest, config in widths if width <= largest), widths[-1][1])


@functools.cache
def architecture(device: torch.device) -> str:
    """`"sm_90"`, `"gfx942"`, or `"interpreter"`."""
    if device.type != "cuda" or interpreted():
        return "interpreter"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def block_shape(config: LaunchConfig, num_rows: int, width: int, whole_rows: bool) -> tuple[int, int]:
    """Rows and columns of a tile, powers of 2."""
    columns = min(next_power_of_2(width), config.max_columns) if whole_rows else _columns(width, config.max_columns)
    rows = min(max(config.tile // columns, 1), next_power_of_2(num_rows))
    return rows, columns


def _columns(width: int, largest: int) -> int:
    """The power of 2 up to `largest` that covers `width` with the fewest idle columns, the widest one among equals. It
    is at least 64 where rows are so wide, so that accesses take whole sectors of memory."""
    sizes = [1 << bits for bits in range(6, largest.bit_length()) if 1 << bits <= next_power_of_2(width)]
    return min(reversed(sizes), key=lambda size: cdiv(width, size) * size, default=next_power_of_2(width))


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
