"""Fused adds under the counter, and checks of their traffic."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from benchmarks.kernel_traffic import SECTOR, Accesses, Counted, count_traffic
from rdp_kernels.kernels.autograd import FusedCall
from rdp_kernels.kernels.spec import Add, NextInput, Operands, RowSet
from rdp_kernels.kernels.triton import kernels
from rdp_kernels.kernels.triton.launch import LaunchConfig

BATCH, TOKENS, CHANNELS = 6, 8, 64
FLOAT, INDEX = 4, 8  # bytes
ROW = TOKENS * CHANNELS * FLOAT

# Tiles are small beside a test's tensors: rows and columns are cut, and a program that sums gets two tiles.
SMALL_TILES = LaunchConfig(tile=512 * FLOAT, max_columns=64 * FLOAT, num_warps=4, tiles=2)

# The rows of a path and of the next one, by drop probability: out of order, and some in both.
ROWS = {0.0: [2, 0, 5, 1, 4, 3], 0.5: [4, 0, 3], 1.0: []}
NEXT_ROWS = {0.0: [5, 2, 1, 0, 3, 4], 0.5: [3, 1, 5], 1.0: []}
ALL = slice(None)


def row_set(rows: list[int], num_learning: int | None = None, inverted: bool = True) -> RowSet:
    """Rows of a batch of at most BATCH. `inverted`: the inverse is made before, as in a model; else a kernel makes
    it."""
    inverse = torch.full((BATCH,), len(rows))
    inverse[rows] = torch.arange(len(rows))
    index = torch.tensor(rows, dtype=torch.int64)
    return RowSet(index, len(rows) if num_learning is None else num_learning, inverse if inverted else None)


def row_scale(kept: list[int], num_rows: int = BATCH) -> Tensor:
    scale = torch.zeros(num_rows)
    scale[kept] = 1.25
    return scale


def samples(num_rows: int = BATCH, dtype: torch.dtype = torch.float32, learns: bool = True) -> Tensor:
    return torch.randn(num_rows, TOKENS, CHANNELS).to(dtype).requires_grad_(learns)


def vector(size: int = CHANNELS, learns: bool = True) -> Tensor:
    return torch.rand(size).requires_grad_(learns)


def run(
    add: Add | None, next_input: NextInput | None = None, in_place: bool = False, **tensors: Tensor | None
) -> tuple[Counted, Counted]:
    """The traffic of a forward and of the backward to all operands that learn.

    Args:
        in_place: the sum overwrites the residual, and the residual's gradient that of the sum.
    """
    operands = Operands(**tensors)
    learning = [t for t in operands if t is not None and t.requires_grad]
    if in_place:
        operands = operands._replace(residual=operands.residual.clone())
    fused = FusedCall(kernels(), add, next_input)
    fused.in_place = fused.owns_gradient = in_place  # as if there were a fused add before and one after it
    with count_traffic() as forward:
        results = fused(operands)
    outs = [result for result in results if result is not None and result.requires_grad]
    douts = [torch.randn_like(out) for out in outs]
    with count_traffic() as backward:
        if learning and outs:
            torch.autograd.grad(outs, learning, douts)
    return forward, backward


def check(
    counted: Counted,
    minimum: int,
    reads: dict[str, list[int] | slice] | None = None,
    writes: dict[str, list[int] | slice] | None = None,
    sectors: float = 1.0,
    twice: Collection[str] = (),
) -> None:
    """Of the big tensors, the rows in `reads` are read and those in `writes` written, each byte once, and no others.

    Args:
        minimum: the sum of both, in bytes.
        sectors: bytes of the sectors touched, at most, as a multiple of `minimum`.
        twice: tensors whose rows are read twice.
    """
    reads, writes = reads or {}, writes or {}
    launches = [launch for launch in counted.launches if launch.big]
    assert len(launches) <= 1, "one kernel does it all"
    big = launches[0].big if launches else {}
    assert {*reads, *writes} <= {*big}, "a tensor that should be there isn't"
    for traffic in {id(traffic): traffic for traffic in big.values()}.values():
        names = [name for name in big if big[name] is traffic]  # several if it is in place
        _check_rows(traffic.read, names, reads, 2 if names[0] in twice else 1)
        _check_rows(traffic.written, names, writes)
    check_total(counted, minimum, sectors, once=not twice)


def check_total(counted: Counted, minimum: int, sectors: float = 1.0, once: bool = True) -> None:
    """Over all launches: `minimum` bytes of the big tensors are touched, none twice, and torch touches nothing."""
    total = sum(accesses.bytes for accesses in counted.big)
    assert minimum <= total <= 1.01 * minimum, f"{total / max(minimum, 1):.3f} × the minimum"
    if once:
        assert total == sum(accesses.distinct_bytes for accesses in counted.big), "some bytes are touched twice"
    in_sectors = SECTOR * sum(accesses.sectors for accesses in counted.big)
    assert in_sectors <= sectors * minimum, f"sectors: {in_sectors / max(minimum, 1):.3f} × the minimum"
    assert counted.torch_ops == []


def _check_rows(accesses: Accesses, names: list[str], wanted: dict[str, list[int] | slice], times: int = 1) -> None:
    expected = np.zeros(len(accesses.tensor), np.int64)
    for name in names:
        if name in wanted:
            expected[wanted[name]] += times
    counts = [np.unique(row).tolist() for row in accesses.counts]
    what = f"{' = '.join(names)}: how often the elements of each row are touched"
    assert counts == [[count] for count in expected.tolist()], what
