"""Backwards, prepared as forwards are."""

from __future__ import annotations

from itertools import compress
from typing import Any

import torch
from torch import Tensor

from ..buffers import Context
from ..spec import NORMS, Add, NextInput, Operands, Results
from .forward import compute_of, inverse_of, is_plain, itemsize_of, makes_row_scale, row_scale_of, sizes_of, tiling_of
from .keys import NO_ADD, BackwardKey, Cache, row_stride
from .launch import Tiles, is_aligned
from .prepared import PreparedLaunch
from .reduce import _sum_partials_kernel
from .residual_add import _residual_add_bwd_kernel
from .residual_add_norm import _residual_add_norm_bwd_kernel
from .residual_add_norm_wide import _residual_add_norm_bwd_wide_kernel

WIDEST_SUM_IN_REGISTERS = 16384
"""Bytes of a row of sums. A program of the norm's backward keeps up to three of them in registers, beside the tile that
it works on. Half as many where each element takes an address as well."""
MANY_ROWS = 1 << 20
VECTORS = ("gamma", "weight", "bias")


class Sums:
    """The second stage for up to three vectors, in one launch. All have partial sums of one shape."""

    def __init__(self, context: Context, num_partials: int, width: int, num_vectors: int):
        self.context, self.shape = context, (num_vectors, num_partials, width)
        # The tiles are those of many rows, so that one kernel serves any number of them.
        tiles = Tiles.of("sum_partials", context.device, MANY_ROWS, width, context.compute.itemsize)
        self.launch = PreparedLaunch(_sum_partials_kernel, tiles.config, context.device)
        self.num_programs = tiles.column_blocks * num_vectors
        self.absent = (None,) * (3 - num_vectors)
        self.last = num_partials, width, tiles.block_m, tiles.block_n

    def empty_partials(self) -> Tensor:
        """Partial sums, one vector's after the other's: one allocation takes the host less time than three."""
        return torch.empty(self.shape, dtype=self.context.compute, device=self.context.device)

    def run(self, partials: Tensor, *vectors: Tensor | None) -> None:
        """Sums the partial sums of each vector."""
        self.launch(self.num_programs, *vectors, *self.absent, partials, *self.last)


class Backward:
    """The backward of an add or a norm, or of both, of all calls with one key."""

    def __init__(self, key: BackwardKey):
        context, add, wanted = key.context, key.add or NO_ADD, key.wanted
        dout, dnext, dfrozen_next = key.gradients
        out, norm_input, mean, rstd = key.results
        rows = (*key.gradients, out, norm_input, add.update)
        vectors = (mean, rstd, key.weight, add.gamma, add.row_scale)
        # Whether a tensor of the call has to be copied first.
        self.copies = not (
            all(t is None or is_plain(t, context) for t in rows)
            and all(t is None or t.is_plain_vector for t in vectors)
        )
        self.context, self.wanted, self.batch_size = context, wanted, context.shape[0]
        self.from_next = dnext is not None or dfrozen_next is not None
        norm = key.next.norm if key.next is not None and self.from_next else None
        self.normed, self.centers = norm is not None, norm is not None and NORMS[norm].centers
        drops_all = add.scale == 0
        passes = wanted.residual and add.activation is None and not self.from_next
        # What kernels store. Of the other wanted gradients, the residual's is that of the sum, and the rest are zero.
        self.stored = Operands(
            wanted.residual and not passes,
            *(t and not drops_all for t in (wanted.update, wanted.frozen_update, wanted.gamma)),
            *(t and dnext is not None for t in (wanted.weight, wanted.bias)),
        )
        self.zeros = [n for n in Operands._fields[1:] if getattr(wanted, n) and not getattr(self.stored, n)]
        self.in_place = key.in_place and add.activation is None and self.stored.residual
        self.reads_update, self.reads_gamma = bool(self.stored.gamma), not drops_all
        self.has_update = bool(self.stored.update or self.stored.frozen_update or self.reads_update)
        self.makes_row_scale = self.has_update and makes_row_scale(add, context)
        # Where only sums over the next branch's learning rows are wanted, nothing else is read.
        self.only_sums = not (wanted.residual or any(self.stored[:4]))
        self.is_short = not (self.copies or drops_all or self.makes_row_scale) and bool(wanted.update or wanted.gamma)
        # What has the kind of `dout` is allocated like it, which saves the host time.
        self.is_like_dout = dout is not None and dout.strides == context.strides
        same_dtype = context.dtypes.update == context.dtypes.residual
        self.update_is_like_dout = self.is_like_dout and same_dtype and context.is_standard
        self.channel_dim = add.channel_dim
        summed = [name for name in VECTORS if getattr(self.stored, name)]
        self.places_of_sums = [summed.index(name) if name in summed else None for name in VECTORS]
        self.is_summed = [name in summed for name in VECTORS]
        self.sums: Sums | None = None
        self.launch: PreparedLaunch | None = None
        if any(self.stored) and not self.copies:
            self._prepare(key, len(summed))

    def _prepare(self, key: BackwardKey, num_sums: int) -> None:
        """Decides what is launched."""
        context, add = key.context, key.add or NO_ADD
        out, norm_input, *_ = key.results
        reads_gamma = self.reads_update or (self.reads_gamma and add.gamma is not None)
        tiling = tiling_of(context, add.channel_dim if reads_gamma else None, self.normed)
        num_positions = self.batch_size * tiling.positions
        itemsize, widest = itemsize_of(context), WIDEST_SUM_IN_REGISTERS
        wide = tiling.width * context.compute.itemsize > (widest if is_aligned(tiling.width) else widest // 2)
        kernel, op = _residual_add_bwd_kernel, "residual_add_bwd"
        if self.normed:
            kernel = _residual_add_norm_bwd_wide_kernel if wide else _residual_add_norm_bwd_kernel
            op = "residual_add_norm_bwd_wide" if wide else "residual_add_norm_bwd"
        channels = tiling.channels if tiling.gamma_per == "position" else None
        tiles = Tiles.of(
            op,
            context.device,
            num_positions,
            tiling.width,
            itemsize,
            whole_rows=self.normed,
            sums=self.normed or num_sums > 0,
            channels=channels,
            positions=tiling.positions if self.normed and not wide else None,
        )
        self.launch, self.num_programs = PreparedLaunch(kernel, tiles.config, context.device), tiles.num_programs
        if num_sums:
            self.sums = Sums(context, tiles.row_blocks, tiling.width if channels is None else channels, num_sums)

        dout, dnext, dfrozen_next = map(row_stride, key.gradients)
        if self.only_sums:
            dout = dfrozen_next = 0
        update = row_stride(add.update) if self.reads_update else 0
        loop = (tiles.by_sample, tiles.num_stages) if self.normed and not wide else ()
        last = self.in_place, compute_of(context), *loop, tiles.block_m, tiles.block_n
        # The arguments between a call's numbers and tensors, and those after them.
        self.sizes: tuple[int, ...] = sizes_of(tiling, num_positions)
        self.last: tuple[Any, ...]
        if self.normed:
            strides = dout, dnext, dfrozen_next, update, row_stride(norm_input)
            self.last = (*strides, tiles.tiles, self.centers, *last)
        else:
            strides = dout, dnext, dfrozen_next, row_stride(out), update
            self.sizes = (*self.sizes, tiling.channels)
            self.last = (*strides, tiles.tiles, channels is not None, add.activation, *last)

    def add(
        self,
        dout: Tensor,
        update: Tensor | None,
        gamma: Tensor | None,
        row_scale: Tensor | None,
        scale: float,
        out: Tensor | None,
        num_rows: int,
        inverse: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of residual (where an activation changes it), update and γ, where the call `is_short`: there is
        nothing but a sum, and no row is frozen."""
        assert self.launch is not None
        context, wanted = self.context, self.wanted
        dresidual = dupdate = dgamma = sums = None
        if wanted.residual:
            like = self.is_like_dout
            dresidual = torch.empty_like(dout) if like else context.empty(self.batch_size, context.dtypes.residual)
        if wanted.update:
            dupdate = self._empty_update(dout, num_rows)
        if self.sums is not None and gamma is not None:
            dgamma = torch.empty_like(gamma)
            sums = self.sums.empty_partials()
        self.launch(
            self.num_programs,
            dresidual, dupdate, None, sums, dout, None, None, out, update, gamma, row_scale, inverse, None,
            scale, *self.sizes, num_rows, num_rows, 0, 0, *self.last,
        )  # fmt: skip
        if self.sums is not None and sums is not None:
            self.sums.run(sums, dgamma)
        return dresidual, dupdate, dgamma

    def run(
        self,
        operands: Operands,
        results: Results,
        gradients: tuple[Tensor | None, Tensor | None, Tensor | None],
        add: Add | None,
        next_input: NextInput | None,
    ) -> Operands:
        """As `launchers.fused_add_bwd`, without copies."""
        dout, dnext, dfrozen_next = gradients
        stored = self.stored
        rows = None if add is None else add.rows
        num_learning, num_frozen = (self.batch_size, 0) if rows is None else (rows.num_learning, rows.num_frozen)
        grads = self._gradients(operands, dout, num_learning, num_frozen)
        if self.zeros:
            for name in self.zeros:
                getattr(grads, name).zero_()
        if self.launch is None:
            return grads
        dresidual, dupdate, dfrozen_update, dgamma, dweight, dbias = grads
        if not stored.residual:
            dresidual = None

        scale, row_scale, inverse, num_rows = 1.0, None, None, 0
        if not self.has_update:
            dupdate = dfrozen_update = None
            num_learning = 0
        else:
            assert add is not None
            num_rows = num_learning + num_frozen if stored.frozen_update else num_learning
            inverse = None if rows is None else inverse_of(rows, self.batch_size)
            row_scale, scale = add.row_scale, add.scale
            if self.makes_row_scale:
                row_scale = row_scale_of(scale, num_learning + num_frozen, self.context)
        if self.only_sums:
            dout = dfrozen_next = None
        next_inverse, num_next, num_next_learning = None, 0, 0
        if self.from_next:
            assert next_input is not None
            next_rows = next_input.rows
            if next_rows is None:
                num_next = num_next_learning = self.batch_size
            else:
                num_next_learning, next_inverse = next_rows.num_learning, inverse_of(next_rows, self.batch_size)
                num_next = num_next_learning if dfrozen_next is None else next_rows.num_rows
        update = operands.update if self.reads_update else None
        gamma = operands.gamma if self.reads_gamma else None
        partials = None if self.sums is None else self.sums.empty_partials()
        sums = None if partials is None else partials.unbind()
        gamma_sums, weight_sums, bias_sums = (
            None if i is None or sums is None else sums[i] for i in self.places_of_sums
        )
        if self.normed:
            num_saved = num_next_learning if dfrozen_next is None else results.norm_input.shape[0]
            self.launch(
                self.num_programs,
                dresidual, dupdate, dfrozen_update, gamma_sums, weight_sums, bias_sums, dout, dnext, dfrozen_next,
                results.norm_input, results.mean if self.centers else None, results.rstd, update, gamma, row_scale,
                operands.weight, inverse, next_inverse,
                scale, *self.sizes, num_rows, num_learning, num_next_learning, num_saved, *self.last,
            )  # fmt: skip
        else:
            self.launch(
                self.num_programs,
                dresidual, dupdate, dfrozen_update, gamma_sums, dout, dnext, dfrozen_next, results.out, update, gamma,
                row_scale, inverse, next_inverse,
                scale, *self.sizes, num_rows, num_learning, num_next, num_next_learning, *self.last,
            )  # fmt: skip
        if self.sums is not None and partials is not None:
            self.sums.run(partials, *compress((dgamma, dweight, dbias), self.is_summed))
        return grads

    def _gradients(self, operands: Operands, dout: Tensor | None, num_learning: int, num_frozen: int) -> Operands:
        """All wanted gradients, allocated."""
        context, wanted, dtypes = self.context, self.wanted, self.context.dtypes
        dresidual = dout if wanted.residual else None
        dupdate = dfrozen_update = None
        if self.stored.residual and not self.in_place:
            like = dout if self.is_like_dout else None
            dresidual = context.empty(self.batch_size, dtypes.residual) if like is None else torch.empty_like(like)
        if wanted.update:
            dupdate = self._empty_update(dout, num_learning)
        if wanted.frozen_update:
            dfrozen_update = context.empty(num_frozen, dtypes.frozen_update)
        return Operands(
            dresidual,
            dupdate,
            dfrozen_update,
            self._vector(dtypes.gamma, self.channel_dim, operands.gamma) if wanted.gamma else None,
            self._vector(dtypes.weight, -1, operands.weight) if wanted.weight else None,
            self._vector(dtypes.bias, -1, operands.weight) if wanted.bias else None,
        )

    def _empty_update(self, dout: Tensor | None, num_rows: int) -> Tensor:
        context = self.context
        if dout is None or not self.update_is_like_dout:
            return context.empty(num_rows, context.dtypes.update)
        return torch.empty_like(dout) if num_rows == self.batch_size else dout.new_empty((num_rows, *context.shape[1:]))

    def _vector(self, dtype: torch.dtype, dim: int, like: Tensor | None) -> Tensor:
        if like is not None and like.dtype is dtype:  # saves the time of allocating by size
            return torch.empty_like(like)
        return torch.empty(self.context.shape[dim], dtype=dtype, device=self.context.device)


backwards: Cache[Backward] = Cache()
"""By the keys of `keys.backward_key`, and by those of `short.residual_add_backward`, which never equal one another."""
