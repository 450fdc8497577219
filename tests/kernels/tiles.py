"""Launch numbers chosen by tests: how kernels cut their work.

The package's launch numbers are made for large tensors: one tile holds most tensors of a test. Small numbers give
several programs and tiles, with a partial tile at every edge.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock


@contextlib.contextmanager
def cut(how: str) -> Iterator[None]:
    """Args:
    how: "tuned", by the table; "small", several tiles a program, rows and columns cut; "medium", fewer and larger ones
        for larger tensors; "wide", small, and the norm's backward goes through each row in pieces, as for thousands of
        channels.
    """
    if how == "tuned":
        yield
        return
    from rdp_kernels.kernels.triton import backward, launch, launchers

    widest = launch.CONFIGS["residual_add_norm_fwd"]["default"][-1][0]
    times = 4 if how == "medium" else 1
    cut_columns = launch.LaunchConfig(tile=512 * times, max_columns=256, num_warps=1, tiles=2)
    whole_rows = launch.LaunchConfig(tile=256 * times, max_columns=widest, num_warps=1, tiles=2)
    in_pieces = launch.LaunchConfig(tile=128, max_columns=64, num_warps=1, tiles=2)
    special = {
        "residual_add_norm_fwd": whole_rows,
        "residual_add_norm_bwd": whole_rows,
        "residual_add_norm_bwd_wide": in_pieces,
    }
    table = {op: {"default": ((2**31, special.get(op, cut_columns)),)} for op in launch.CONFIGS}
    in_registers = 0 if how == "wide" else backward.WIDEST_SUM_IN_REGISTERS
    with (
        launchers.nothing_prepared(),
        mock.patch.object(launch, "CONFIGS", table),
        mock.patch.object(backward, "WIDEST_SUM_IN_REGISTERS", in_registers),
    ):
        yield
