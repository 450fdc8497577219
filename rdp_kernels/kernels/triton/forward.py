"""Forwards, prepared: what a key decides is worked out once, so that a call only allocates and launches."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..buffers import Context, context_from
from ..layout import Tiling
from ..spec import NORMS, Add, NextInput, Operands, Results, RowSet
from .keys import NO_ADD, NO_NEXT_INPUT, AddKey, Cache, ForwardKey, Kind, row_stride
from .launch import Tiles
from .prepared import PreparedLaunch
from .residual_add import _residual_add_fwd_kernel
from .residual_add_norm import _residual_add_norm_fwd_kernel
from .rows import _gather_rows_kernel, _invert_rows_kernel


def prepare_forward(key: ForwardKey) -> Forward:
    """The forward of all calls with this key."""
    gathers = key.add is None and key.next is not None and key.next.norm is None
    return Gather(key) if gathers else FusedAdd(key)


class Forward:
    """What all forwards have in common."""

    def __init__(self, key: ForwardKey):
        add, next_input = key.add or NO_ADD, key.next or NO_NEXT_INPUT
        rows = key.residual, add.update, add.frozen_update
        vectors = add.gamma, next_input.weight, next_input.bias
        like = next(t for t in rows if t is not None)
        dtypes = like.dtype, *(None if t is None else t.dtype for t in (*rows[1:], *vectors))
        shape = key.batch_size, *like.shape
        # What the backward has to know.
        self.context = context_from(shape, like.strides, like.device, dtypes, next_input.norm is not None)
        # Whether a tensor of the call has to be copied first, because its layout isn't the context's.
        self.copies = not (
            all(t is None or is_plain(t, self.context) for t in rows)
            and all(t is None or t.is_plain_vector for t in (*vectors, add.row_scale))
        )
        self.batch_size, self.dtype = key.batch_size, self.context.dtypes.residual
        # The choices of a backend under which checked calls came here.
        self.choices: set[str] = set()

    def run(self, operands: Operands, add: Add | None, next_input: NextInput | None, num_saved: int) -> Results:
        """As `launchers.fused_add_fwd`, without copies."""
        raise NotImplementedError


forwards: Cache[Forward] = Cache()
"""By `ForwardKey`."""


class FusedAdd(Forward):
    """An add or a norm, or both, with the rows of the next branch."""

    def __init__(self, key: ForwardKey):
        super().__init__(key)
        add, next_input, context = key.add or NO_ADD, key.next or NO_NEXT_INPUT, self.context
        self.in_place = key.in_place
        self.is_like_residual = key.residual is not None and key.residual.strides == context.strides
        self.drops_all = add.scale == 0
        self.makes_row_scale = makes_row_scale(add, context)
        self.is_short = key.next is None and not (self.copies or self.drops_all or self.makes_row_scale)
        self.normed = next_input.norm is not None
        self.centers = next_input.norm is not None and NORMS[next_input.norm].centers
        self.copies_norm_input = next_input.has_rows
        self.norms_of_a_row = math.prod(context.shape[1:-1])

        reads_gamma = add.gamma is not None and not self.drops_all
        tiling = tiling_of(context, add.channel_dim if reads_gamma else None, self.normed)
        num_positions = key.batch_size * tiling.positions
        op = "residual_add_norm_fwd" if self.normed else "residual_add_fwd"
        tiles = Tiles.of(op, context.device, num_positions, tiling.width, itemsize_of(context), self.normed)
        self.num_programs = tiles.num_programs
        sizes = sizes_of(tiling, num_positions)
        strides = (
            row_stride(key.residual) if key.in_place else sizes[-1] if key.add is not None else 0,
            row_stride(key.residual),
            *(0 if self.drops_all else row_stride(t) for t in (add.update, add.frozen_update)),
        )
        last = key.in_place, compute_of(context), tiles.block_m, tiles.block_n
        # The arguments between a call's numbers and tensors, and those after them.
        self.sizes: tuple[int, ...]
        self.last: tuple[Any, ...]
        if self.normed:
            self.launch = PreparedLaunch(_residual_add_norm_fwd_kernel, tiles.config, context.device)
            self.sizes, self.last = sizes, (*strides, self.centers, float(next_input.eps), *last)
        else:
            self.launch = PreparedLaunch(_residual_add_fwd_kernel, tiles.config, context.device)
            self.sizes = (*sizes, tiling.channels)
            self.last = (*strides, tiling.gamma_per == "position", add.activation, *last)

    def run(self, operands: Operands, add: Add | None, next_input: NextInput | None, num_saved: int) -> Results:
        residual, update, frozen_update, gamma, weight, bias = operands
        out = next_rows = frozen_next = row_scale = inverse = next_inverse = None
        scale, num_rows, num_learning, num_next, num_next_learning = 1.0, 0, 0, 0, 0
        if add is not None:
            out = residual if self.in_place else self._empty_sum(residual)
            if self.drops_all:
                update = frozen_update = gamma = None
            else:
                row_scale, scale = add.row_scale, add.scale
                if add.rows is None:
                    num_rows = num_learning = self.batch_size
                else:
                    num_learning, inverse = add.rows.num_learning, inverse_of(add.rows, self.batch_size)
                    num_rows = num_learning if frozen_update is None else add.rows.num_rows
                if self.makes_row_scale:
                    row_scale = row_scale_of(scale, num_rows, self.context)
        if next_input is not None:
            if next_input.rows is None:
                num_next = num_next_learning = self.batch_size
            else:
                num_next, num_next_learning = next_input.rows.num_rows, next_input.rows.num_learning
                next_inverse = inverse_of(next_input.rows, self.batch_size)
                if num_next > num_next_learning:
                    frozen_next = self.context.empty(num_next - num_next_learning, self.dtype)
            next_rows = self.context.empty(num_next_learning, self.dtype)
        if not self.normed:
            self.launch(
                self.num_programs,
                out, next_rows, frozen_next, residual, update, frozen_update, gamma, row_scale, inverse, next_inverse,
                scale, *self.sizes, num_rows, num_learning, num_next, num_next_learning, *self.last,
            )  # fmt: skip
            return Results(out, next_rows, frozen_next)
        norm_input = mean = rstd = None
        if num_saved:
            rstd = self._statistics(num_saved)
            mean = self._statistics(num_saved) if self.centers else None
            norm_input = self.context.empty(num_saved, self.dtype) if self.copies_norm_input else None
        self.launch(
            self.num_programs,
            out, next_rows, frozen_next, norm_input, mean, rstd, residual, update, frozen_update, gamma, row_scale,
            weight, bias, inverse, next_inverse,
            scale, *self.sizes, num_rows, num_learning, num_next, num_next_learning, num_saved, *self.last,
        )  # fmt: skip
        if num_saved and norm_input is None:
            norm_input = residual if out is None else out
        return Results(out, next_rows, frozen_next, norm_input, mean, rstd)

    def add(
        self,
        residual: Tensor | None,
        update: Tensor,
        gamma: Tensor | None,
        row_scale: Tensor | None,
        scale: float,
        num_rows: int,
        inverse: Tensor | None,
    ) -> Tensor:
        """The sum, where the call `is_short`: nothing comes after the sum, and no row is frozen."""
        out = self._empty_sum(residual)
        self.launch(
            self.num_programs,
            out, None, None, residual, update, None, gamma, row_scale, inverse, None,
            scale, *self.sizes, num_rows, num_rows, 0, 0, *self.last,
        )  # fmt: skip
        return out

    def _empty_sum(self, residual: Tensor | None) -> Tensor:
        if residual is not None and self.is_like_residual:  # saves the time of allocating by strides
            return torch.empty_like(residual)
        return self.context.empty(self.batch_size, self.dtype)

    def _statistics(self, num_rows: int) -> Tensor:
        context = self.context
        return torch.empty(num_rows * self.norms_of_a_row, dtype=context.compute, device=context.device)


class Gather(Forward):
    """Rows of the residual."""

    def __init__(self, key: ForwardKey):
        super().__init__(key)
        context = self.context
        self.width = math.prod(context.shape[1:])
        self.tiles = Tiles.of("gather_rows", context.device, key.batch_size, self.width, self.dtype.itemsize)
        self.launch = PreparedLaunch(_gather_rows_kernel, self.tiles.config, context.device)
        self.last = self.width, row_stride(key.residual), self.tiles.block_m, self.tiles.block_n

    def run(self, operands: Operands, add: Add | None, next_input: NextInput | None, num_saved: int) -> Results:
        assert next_input is not None
        assert next_input.rows is not None
        return self.gather(operands.residual, next_input.rows)

    def gather(self, residual: Tensor, rows: RowSet) -> Results:
        num_rows, num_learning = rows.num_rows, rows.num_learning
        learning = self.context.empty(num_learning, self.dtype)
        frozen = self.context.empty(num_rows - num_learning, self.dtype) if num_rows > num_learning else None
        num_programs = -(-num_rows // self.tiles.block_m) * self.tiles.column_blocks
        self.launch(
            num_programs,
            learning,
            frozen,
            residual,
            rows.index.contiguous(),
            self.batch_size,
            num_rows,
            num_learning,
            *self.last,
        )
        return Results(next=learning, frozen_next=frozen)


# What forwards and backwards have in common.


def tiling_of(context: Context, channel_dim: int | None, normed: bool) -> Tiling:
    """A norm's tiles span the channels; other tiles run along γ, if it is read."""
    return context.layout.tiling(context.shape, -1 if normed else channel_dim)


def is_plain(kind: Kind, context: Context) -> bool:
    """Whether kernels take a tensor with rows as it is."""
    return context.layout.is_dense(context.shape, kind.strides) and not kind.is_negated


def sizes_of(tiling: Tiling, num_positions: int) -> tuple[int, int, int, int]:
    """The arguments num_positions, positions, width and sample_size."""
    return num_positions, tiling.positions, tiling.width, tiling.positions * tiling.width


def itemsize_of(context: Context) -> int:
    """The bytes of an element, of the widest tensor with rows."""
    dtypes = context.dtypes.residual, context.dtypes.update, context.dtypes.frozen_update
    return max(dtype.itemsize for dtype in dtypes if dtype is not None)


def compute_of(context: Context) -> tl.dtype:
    return tl.float64 if context.compute == torch.float64 else tl.float32


def makes_row_scale(add: AddKey, context: Context) -> bool:
    """Whether a number has to become a tensor: kernels take numbers of 32 bits."""
    return context.compute == torch.float64 and add.row_scale is None and add.scale is None


def row_scale_of(scale: float, num_rows: int, context: Context) -> Tensor:
    return torch.full((num_rows,), scale, dtype=torch.float64, device=context.device)


def inverse_of(rows: RowSet, batch_size: int) -> Tensor:
    """`rows.inverse`, computed where it is None. The row set keeps it, because the backward needs it as well."""
    if rows.inverse is None:
        index = rows.index.contiguous()
        rows.inverse = index.new_empty(batch_size)
        launch, tiles = inversion(batch_size, index.device)
        launch(1, rows.inverse, index, batch_size, index.shape[0], tiles.block_m, tiles.block_n)
    return rows.inverse.contiguous()


@functools.lru_cache(1024)  # more batch sizes than a program meets
def inversion(batch_size: int, device: torch.device) -> tuple[PreparedLaunch, Tiles]:
    tiles = Tiles.of("invert_rows", device, 1, batch_size, torch.int64.itemsize, whole_rows=True)
    return PreparedLaunch(_invert_rows_kernel, tiles.config, device), tiles
