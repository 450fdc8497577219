"""Backwards, prepared as forwards are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..spec import NORMS, Add, NextInput, Operands, Results
from .forward import compute_of, makes_row_scale, row_scale_of, sizes_of, tiling_of
from .keys import BackwardKey
from .launch import Tiles
from .prepared import PreparedLaunch
from .reduce import Sums
from .residual_add import _residual_add_bwd_kernel
from .residual_add_norm import _residual_add_norm_bwd_kernel
from .residual_add_norm_wide import _residual_add_norm_bwd_wide_kernel
from .rows import inverse_of

WIDEST_SUM_IN_REGISTERS = 4096
"""A program of the norm's backward keeps up to three rows of sums: at this width 24 of a thread's 128 registers, beside
the tile that it works on."""
VECTORS = ("gamma", "weight", "bias")


class Backward:
    """The backward of an add or a norm, or of both, of all calls with one key.

    Attributes:
        copies: whether a tensor of the call has to be copied first.
        stored: the gradients that a kernel stores. Of the other wanted ones, the residual's is the gradient of the sum
            itself, and the rest are zero.
    """

    def __init__(self, key: BackwardKey):
        context, add, wanted = key.context, key.add, key.wanted
        _, dnext, dfrozen_next = key.gradients
        from_next = dnext is not None or dfrozen_next is not None
        rows = (*key.gradients, key.norm_input, None if add is None else add.update)
        vectors = (key.weight, *((None, None) if add is None else (add.gamma, add.row_scale)))
        self.copies = not (
            all(t is None or context.layout.is_dense((1, *t.shape), t.strides) for t in rows)
            and all(t is None or t.is_plain_vector for t in vectors)
        )
        self.context, self.wanted = context, wanted
        self.batch_size = context.shape[0]
        norm = key.next.norm if key.next is not None and from_next else None
        self.normed, self.centers = norm is not None, norm is not None and NORMS[norm].centers
        activation = None if add is None else add.activation
        drops_all = add is not None and add.scale == 0

        passes = wanted.residual and activation is None and not from_next
        self.stored = Operands(
            wanted.residual and not passes,
            *(t and not drops_all for t in (wanted.update, wanted.frozen_update, wanted.gamma)),
            *(t and from_next for t in (wanted.weight, wanted.bias)),
        )
        self.in_place = key.in_place and activation is None and self.stored.residual
        self.reads_update, self.reads_gamma = bool(self.stored.gamma), not drops_all
        self.has_update = bool(self.stored.update or self.stored.frozen_update or self.reads_update)
        self.makes_row_scale = self.has_update and makes_row_scale(add, context)
        # Where only sums over the next branch's learning rows are wanted, nothing else is read.
        self.only_sums = not (wanted.residual or any(self.stored[:4]))
        self.launch: PreparedLaunch | None = None
        if any(self.stored) and not self.copies:
            self._prepare(key)

    def _prepare(self, key: BackwardKey) -> None:
        """Decides what is launched."""
        context, add = key.context, key.add
        gamma_is_read = add is not None and (self.reads_update or (self.reads_gamma and add.gamma is not None))
        tiling = tiling_of(context, add if gamma_is_read else None, self.normed)
        num_positions = self.batch_size * tiling.positions
        self.sizes = sizes_of(tiling, num_positions)
        names = [name for name in VECTORS if getattr(self.stored, name)]
        kernel, op = _residual_add_bwd_kernel, "residual_add_bwd"
        if self.normed:
            wide = tiling.width > WIDEST_SUM_IN_REGISTERS
            kernel = _residual_add_norm_bwd_wide_kernel if wide else _residual_add_norm_bwd_kernel
            op = "residual_add_norm_bwd_wide" if wide else "residual_add_norm_bwd"
        tiles = Tiles.of(
            op, context.device, num_positions, tiling.width, whole_rows=self.normed, sums=self.normed or bool(names)
        )
        self.launch, self.num_programs = PreparedLaunch(kernel, tiles.config, context.device), tiles.num_programs
        if names:
            num_partials, width = tiles.row_blocks, tiling.width
            if tiling.gamma_per == "position":
                width = tiling.channels
                num_partials = num_positions // max(width, 1) * tiles.column_blocks
            self.sums = Sums(context, num_partials, width, len(names))

        dout, dnext, dfrozen_next = (None if t is None else t.strides[0] for t in key.gradients)
        if self.only_sums:
            dout = dfrozen_next = None
        update = add.update.strides[0] if self.reads_update else 0
        others = (
            (update, key.norm_input.strides[0])
            if self.normed
            else (0 if key.out is None else key.out.strides[0], update)
        )
        self.strides = *(stride or 0 for stride in (dout, dnext, dfrozen_next)), *others, tiles.tiles
        if self.normed:
            flags: tuple = (self.centers,)
        else:
            self.sizes = (*self.sizes, tiling.channels)
            flags = tiling.gamma_per == "position", add.activation
        self.last = *self.strides, *flags, self.in_place, compute_of(context), tiles.block_m, tiles.block_n

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
        context, wanted, stored = self.context, self.wanted, self.stored
        rows = None if add is None else add.rows
        num_learning, num_frozen = (self.batch_size, 0) if rows is None else (rows.num_learning, rows.num_frozen)
        dtypes = context.dtypes
        dresidual = dout if wanted.residual else None
        if stored.residual and not self.in_place:
            dresidual = context.empty(self.batch_size, dtypes.residual)
        dupdate = context.empty(num_learning, dtypes.update) if wanted.update else None
        dfrozen_update = context.empty(num_frozen, dtypes.frozen_update) if wanted.frozen_update else None
        dgamma = self._vector(dtypes.gamma, -1 if add is None else add.channel_dim) if wanted.gamma else None
        dweight = self._vector(dtypes.weight, -1) if wanted.weight else None
        dbias = self._vector(dtypes.bias, -1) if wanted.bias else None
        grads = Operands(dresidual, dupdate, dfrozen_update, dgamma, dweight, dbias)
        for grad, is_stored in zip(grads[1:], stored[1:], strict=True):
            if grad is not None and not is_stored:
                grad.zero_()
        if self.launch is None:
            return grads

        scale, row_scale, inverse, num_rows = 1.0, None, None, 0
        if self.has_update:
            num_rows = num_learning + num_frozen if stored.frozen_update else num_learning
            inverse = None if rows is None else inverse_of(rows, self.batch_size)
            row_scale, scale = add.row_scale, add.scale
            if self.makes_row_scale:
                row_scale = row_scale_of(scale, num_learning + num_frozen, context)
        else:
            num_learning = 0
        if self.only_sums:
            dout = dfrozen_next = None
        next_inverse, num_next, num_next_learning = None, 0, 0
        if dnext is not None or dfrozen_next is not None:
            if next_input.rows is None:
                num_next = num_next_learning = self.batch_size
            else:
                num_next_learning, next_inverse = (
                    next_input.rows.num_learning,
                    inverse_of(next_input.rows, self.batch_size),
                )
                num_next = num_next_learning if dfrozen_next is None else next_input.rows.num_rows
        update = operands.update if self.reads_update else None
        gamma = operands.gamma if self.reads_gamma else None
        dresidual_stored, dupdate_stored, dfrozen_stored = (
            grad if is_stored else None for grad, is_stored in zip(grads[:3], stored[:3], strict=True)
        )
        gamma_sums = self.sums.empty_partials() if stored.gamma else None
        if not self.normed:
            self.launch(
                self.num_programs,
                dresidual_stored, dupdate_stored, dfrozen_stored, gamma_sums, dout, dnext, dfrozen_next, results.out,
                update, gamma, row_scale, inverse, next_inverse,
                scale, *self.sizes, num_rows, num_learning, num_next, num_next_learning, *self.last,
            )  # fmt: skip
            if stored.gamma:
                self.sums.run(dgamma, gamma_sums)
            return grads
        weight_sums = self.sums.empty_partials() if stored.weight else None
        bias_sums = self.sums.empty_partials() if stored.bias else None
        num_saved = num_next_learning if dfrozen_next is None else results.norm_input.shape[0]
        self.launch(
            self.num_programs,
            dresidual_stored, dupdate_stored, dfrozen_stored, gamma_sums, weight_sums, bias_sums, dout, dnext,
            dfrozen_next, results.norm_input, results.mean if self.centers else None, results.rstd, update, gamma,
            row_scale, operands.weight, inverse, next_inverse,
            scale, *self.sizes, num_rows, num_learning, num_next_learning, num_saved, *self.last,
        )  # fmt: skip
        pairs = [(dgamma, gamma_sums), (dweight, weight_sums), (dbias, bias_sums)]
        stored_pairs = [t for pair, is_stored in zip(pairs, stored[3:], strict=True) if is_stored for t in pair]
        if stored_pairs:
            self.sums.run(*stored_pairs)
        return grads

    def _vector(self, dtype: torch.dtype, dim: int) -> Tensor:
        return torch.empty(self.context.shape[dim], dtype=dtype, device=self.context.device)
