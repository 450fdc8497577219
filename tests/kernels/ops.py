"""The public ops on the operands of a case."""

from __future__ import annotations

from dataclasses import replace

import torch

import rdp_kernels as rdp
from rdp_kernels.kernels import eager
from rdp_kernels.kernels.autograd import FusedCall, fused_add
from rdp_kernels.kernels.dispatch import resolve
from rdp_kernels.kernels.spec import Add, NextInput, Operands, Results, RowSet

from .cases import Case
from .values import index, laid_out, row_scale_of


def residual_add(t: Operands, case: Case) -> Results:
    out = rdp.residual_add(
        t.residual,
        t.update,
        rows=index(case.rows, case),
        row_scale=row_scale_of(case),
        gamma=t.gamma,
        channel_dim=case.channel_dim,
        activation=case.activation,
    )
    return Results(out)


def gather_rows(t: Operands, case: Case) -> Results:
    """With the residual itself as first result."""
    return Results(t.residual, rdp.gather_rows(t.residual, index(case.next_rows, case)))


def residual_add_norm(t: Operands, case: Case) -> Results:
    out, normed = rdp.residual_add_norm(
        t.residual,
        t.update,
        t.weight,
        t.bias,
        rows=index(case.rows, case),
        row_scale=row_scale_of(case),
        gamma=t.gamma,
        next_rows=index(case.next_rows, case),
        norm=case.norm,
        eps=case.eps,
    )
    return Results(out, normed)


def drop_path(t: Operands, case: Case) -> Results:
    torch.manual_seed(case.seed)
    return Results(rdp.drop_path(t.update, case.drop_prob, True, case.scale_by_keep))


def drop_path_add(t: Operands, case: Case) -> Results:
    torch.manual_seed(case.seed)
    out = rdp.drop_path_add(t.residual, t.update, case.drop_prob, True, gamma=t.gamma, scale_by_keep=case.scale_by_keep)
    return Results(out)


def joint(t: Operands, case: Case) -> Results:
    """The fused add with one path's update and the next path's input, as a chain of paths runs it."""
    return fused_add("path", t, *_parts(case))


def in_place(t: Operands, case: Case) -> Results:
    """The same as an inner call of `ResidualSequence`, which owns the residual and the sum's gradient: the sum
    overwrites the residual, and the residual's gradient overwrites the sum's."""
    add, next_input = _parts(case)
    residual = t.residual.clone()
    operands, fused = t._replace(residual=residual), next_input
    served = resolve("path", operands, add, next_input)
    if not served.takes_norm:  # torch's norm runs after the kernels
        operands, fused = operands._replace(weight=None, bias=None), replace(next_input, norm=None)
    call = FusedCall(served.kernels, add, fused)
    call.in_place = call.owns_gradient = True
    results = call(operands)
    assert results.out.data_ptr() == residual.data_ptr(), "the sum isn't in place"
    return results if fused is next_input else eager.normalised(results, t, next_input)


def _parts(case: Case) -> tuple[Add | None, NextInput | None]:
    add = next_input = None
    if case.adds:
        rows = None if case.rows is None else _row_set(case.rows, len(case.learning), case)
        scale = row_scale_of(case)
        of_rows = isinstance(scale, torch.Tensor)
        number = 1.0 if of_rows or scale is None else scale
        add = Add(rows, number, scale if of_rows else None, case.channel_dim, case.activation)
    if case.gives_next:
        rows = None if case.next_rows is None else _row_set(case.next_rows, len(case.next_parts[0]), case)
        next_input = NextInput(rows, case.norm, case.eps if case.norm else 0.0, case.detached)
    return add, next_input


def _row_set(rows: tuple[int, ...], num_learning: int, case: Case) -> RowSet:
    """A row set as a plan makes it, with its inverse or without."""
    if case.seed % 2:
        return RowSet(index(rows, case), num_learning)
    others = [row for row in range(case.shape[0]) if row not in rows]
    order = torch.tensor([*rows, *others], dtype=torch.int64)
    return RowSet(index(rows, case), num_learning, laid_out(order.argsort(), case.layouts[3]))
