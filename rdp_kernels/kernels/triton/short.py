"""The residual add and the gather of rows for calls whose arguments haven't been checked (`kernels.short`).

They serve calls of a kind that was checked before. Then everything about the arguments is right that a key holds. The
rest is looked at here: numbers of rows, and lists of rows.

Keys (`keys.ForwardKey`) are spelled out here, because a function call for each tensor would cost as much as the
look-up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..buffers import context_from
from ..short import rows_are_right
from ..spec import ACTIVATION_CODES, Add, Operands, Results, RowSet
from .backward import Backward, backwards
from .forward import FusedAdd, Gather, forwards, inverse_of
from .keys import ALIGNMENT, NO_ADD, SPECIAL_SCALES, BackwardKey, Kind, named, named_add, of_rows
from .launchers import fused_add_bwd, fused_add_fwd

_ACTIVATIONS = {code: name for name, code in ACTIVATION_CODES.items()}
_GATHER = None, None, True, False, None, 0.0, False


def residual_add(
    residual: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    channel_dim: int = -1,
    activation: int = 0,
) -> Tensor | None:
    return residual_add_rows(residual, update, gamma, row_scale, rows, scale, channel_dim, activation)[0]


def residual_add_rows(
    residual: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    rows: Tensor | None,
    scale: float,
    channel_dim: int,
    activation: int,
    inverse: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    if residual.dim() == 0:
        return None, None
    batch_size = num_rows = residual.shape[0]
    x, u, g, r = residual, update, gamma, row_scale
    add = (
        (u.stride(), u.dtype, u.data_ptr() % ALIGNMENT, u.is_neg(), u.shape[1:], u.device),
        None,
        g if g is None else (g.stride(), g.dtype, g.data_ptr() % ALIGNMENT, g.is_neg(), g.shape, g.device),
        r if r is None else (r.stride(), r.dtype, r.data_ptr() % ALIGNMENT, r.is_neg(), r.shape[1:], r.device),
        rows is not None,
        scale if scale in SPECIAL_SCALES else None,
        channel_dim,
        _ACTIVATIONS[activation],
    )
    of_residual = x.stride(), x.dtype, x.data_ptr() % ALIGNMENT, x.is_neg(), x.shape[1:], x.device
    prepared = forwards.get((batch_size, of_residual, add, None, False))
    if not isinstance(prepared, FusedAdd) or not prepared.is_short:
        return None, None
    if rows is not None:
        if inverse is None and not rows_are_right(rows, residual):
            return None, None
        num_rows = rows.shape[0]
    if update.shape[0] != num_rows or (row_scale is not None and row_scale.shape[0] != num_rows):
        return None, None
    inverse = None if rows is None else inverse_of(RowSet(rows, num_rows, inverse), batch_size)
    return prepared.add(residual, update, gamma, row_scale, scale, num_rows, inverse), inverse


def residual_add_backward(
    dout: Tensor,
    update: Tensor | None,
    gamma: Tensor | None,
    row_scale: Tensor | None,
    wants_update: bool = True,
    out: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float = 1.0,
    channel_dim: int = -1,
    update_dtype: torch.dtype | None = None,
    activation: int = 0,
    inverse: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    d, u, g, r, o = dout, update, gamma, row_scale, out
    add = (
        u if u is None else (u.stride(), u.dtype, u.data_ptr() % ALIGNMENT, u.is_neg()),
        None,
        g if g is None else (g.stride(), g.dtype, g.data_ptr() % ALIGNMENT, g.is_neg()),
        r if r is None else (r.stride(), r.dtype, r.data_ptr() % ALIGNMENT, r.is_neg()),
        rows is not None,
        scale if scale in SPECIAL_SCALES else None,
        channel_dim,
        _ACTIVATIONS[activation],
    )
    of_dout = d.stride(), d.dtype, d.data_ptr() % ALIGNMENT, d.is_neg(), d.shape, d.device
    of_out = o if o is None else (o.stride(), o.dtype, o.data_ptr() % ALIGNMENT, o.is_neg())
    key = of_dout, add, of_out, wants_update, update_dtype
    prepared = backwards.get(key)
    if prepared is None:
        prepared = backwards.add(key, _prepare_backward(key))
    num_rows = dout.shape[0] if rows is None else rows.shape[0]
    if prepared.is_short:
        return prepared.add(dout, update, gamma, row_scale, scale, out, num_rows, inverse)
    row_set = None if rows is None else RowSet(rows, num_rows, inverse)
    grads = fused_add_bwd(
        prepared.context,
        Operands(update=update, gamma=gamma),
        Results(out),
        (dout, None, None),
        Add(row_set, scale, row_scale, channel_dim, _ACTIVATIONS[activation]),
        None,
        prepared.wanted,
    )
    return grads.residual, grads.update, grads.gamma


def gather_rows(residual: Tensor, rows: Tensor) -> Tensor | None:
    if residual.dim() == 0:
        return None
    prepared = forwards.get((residual.shape[0], of_rows(residual), None, _GATHER, False))
    if not isinstance(prepared, Gather) or prepared.copies or not rows_are_right(rows, residual):
        return None
    return prepared.gather(residual, RowSet(rows, rows.shape[0])).next


def gather_rows_backward(dout: Tensor, rows: Tensor, batch_size: int) -> Tensor:
    """The forward of an add to nothing."""
    row_set = RowSet(rows, rows.shape[0])
    prepared = forwards.get((batch_size, None, (of_rows(dout), None, None, None, True, 1.0, -1, None), None, False))
    if isinstance(prepared, FusedAdd) and prepared.is_short:
        return prepared.add(None, dout, None, None, 1.0, row_set.num_rows, inverse_of(row_set, batch_size))
    scattered: Tensor = fused_add_fwd(Operands(None, dout), Add(row_set), None, batch_size=batch_size)[0].out
    return scattered


def _prepare_backward(key: tuple) -> Backward:
    (strides, dtype, misaligned_by, is_negated, shape, device), add_key, out, wants_update, update_dtype = key
    add = named_add(add_key) or NO_ADD
    dtypes = dtype, update_dtype or dtype, None, None if add.gamma is None else add.gamma.dtype, None, None
    context = context_from(shape, strides, device, dtypes, False)
    gradients, results = (Kind(strides, dtype, misaligned_by, is_negated), None, None), (named(out), None, None, None)
    wanted = Operands(out is not None, wants_update, False, add.update is not None, False, False)
    return Backward(BackwardKey(context, gradients, results, None, add, None, wanted, False))
