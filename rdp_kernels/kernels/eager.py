"""Every op in a few lines of plain torch: the specification that kernels are tested against, and the eager backend.

Arguments must have been checked. Arithmetic runs in float32 (float64 where an argument is float64) and is cast once, at
the end, to the residual's dtype. Double backward works.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._utils.checks import is_transformed
from .spec import NORMS, Add, NextInput, Operands, Results, activated, compute_dtype


def residual_add(
    residual: Tensor,
    branch: Tensor,
    *,
    rows: Tensor | None = None,
    row_scale: Tensor | float | None = None,
    gamma: Tensor | None = None,
    channel_dim: int = -1,
    activation: str | None = None,
    frozen: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`act(residual + row_scale · γ · branch)`, the sum over `rows` only where these are given.

    `frozen`: a second pair of rows and branch, for other rows, through which no gradient goes to γ. It goes with `rows`
    and with a number as `row_scale`. A row whose scale is 0 is never read.
    """
    dtype = compute_dtype(residual, branch, gamma)
    total, update = residual.to(dtype), branch.to(dtype)
    scale = 1.0 if row_scale is None else row_scale
    if isinstance(scale, Tensor) or scale == 0:
        factors = torch.as_tensor(scale, device=update.device)
        update, scale = drop_path(update, factors.expand(update.shape[0])), 1.0
        if frozen is not None:
            frozen = frozen[0], drop_path(frozen[1], factors.expand(frozen[1].shape[0]))
    elif frozen is None and torch.compiler.is_compiling() and scale != 1:
        update, scale = update * scale, 1.0  # a graph for any number, where `alpha` and `value` are part of the graph
    factor = None
    if gamma is not None:
        factor = gamma.to(dtype).view([-1 if d == channel_dim % branch.dim() else 1 for d in range(branch.dim())])
    if rows is not None:
        parts = [(rows, update if factor is None else update * factor)]
        if frozen is not None:
            frozen_update = frozen[1].to(dtype)
            parts.append((frozen[0], frozen_update if factor is None else frozen_update * factor.detach()))
        out = _add_rows(total, scale, parts)
    elif factor is not None:
        out = torch.addcmul(total, update, factor, value=scale)
    else:
        out = torch.add(total, update, alpha=scale)
    return activated(out, activation).to(residual.dtype)


def _add_rows(residual: Tensor, scale: float, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Adds updates to some rows. `parts` are pairs of rows and update."""
    if _wants_plain_ops():
        for rows, update in parts:
            residual = residual.index_add(0, rows, update, alpha=scale)
        return residual
    all_rows, updates = zip(*parts, strict=True)
    return _AddRows.apply(residual, scale, all_rows, *updates)


def _wants_plain_ops() -> bool:
    """Whether Python's autograd functions can't be used: within transforms, and where `torch.jit.trace` records."""
    return is_transformed() or (not torch.compiler.is_compiling() and torch._C._is_tracing())


class _AddRows(torch.autograd.Function):
    """`residual.index_add(0, rows, update, alpha=scale)` for each pair of rows and update. Saves only the rows.

    Torch's own index_add keeps `update` alive until the backward, for its shape. Double backward works.
    """

    @staticmethod
    def forward(ctx, residual, scale, rows, *updates):
        ctx.save_for_backward(*rows)
        ctx.scale = scale
        out = residual.index_add(0, rows[0], updates[0], alpha=scale)
        for more_rows, update in zip(rows[1:], updates[1:], strict=True):
            out.index_add_(0, more_rows, update, alpha=scale)
        return out

    @staticmethod
    def backward(ctx, dout):
        wanted = ctx.needs_input_grad[3:]
        dupdates = [
            dout.index_select(0, rows) if w else None for rows, w in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        if ctx.scale != 1:
            dupdates = [None if dupdate is None else dupdate * ctx.scale for dupdate in dupdates]
        return dout, None, None, *dupdates


def gather_rows(residual: Tensor, rows: Tensor) -> Tensor:
    """`residual[rows]`."""
    return residual.index_select(0, rows)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, next_input: NextInput, dtype: torch.dtype
) -> Tensor:
    """A norm of the last dimension, computed in `dtype`."""
    weight, bias = (None if t is None else t.to(dtype) for t in (weight, bias))
    assert next_input.norm is not None
    return NORMS[next_input.norm].formula(x.to(dtype), weight, bias, next_input.eps).to(x.dtype)


def fused_add(operands: Operands, add: Add | None, next_input: NextInput | None) -> Results:
    """Adds an update to the residual, gathers the next branch's rows, or both: the ops above, one after the other."""
    residual, update, frozen_update, gamma, *_ = operands
    if add is not None:
        scale = add.scale if add.row_scale is None else add.row_scale
        if residual is None:
            return Results(drop_path(update, torch.as_tensor(scale, device=update.device).expand(update.shape[0])))
        rows = add.rows
        residual = residual_add(
            residual,
            update,
            rows=None if rows is None else rows.learning,
            row_scale=scale,
            gamma=gamma,
            channel_dim=add.channel_dim,
            activation=add.activation,
            frozen=None if frozen_update is None or rows is None else (rows.frozen, frozen_update),
        )
    if next_input is None:
        return Results(residual)
    forked = (residual, residual) if next_input.rows is None else _fork_rows(residual, next_input, add is not None)
    return normalised(Results(*forked), operands, next_input)


def normalised(results: Results, operands: Operands, next_input: NextInput) -> Results:
    """Norms the next rows where `next_input` has a norm. No gradient goes from the frozen rows to its weights."""
    if next_input.norm is None:
        return results
    weight, bias, dtype = operands.weight, operands.bias, compute_dtype(*operands)
    rows, frozen_rows = results.next, results.frozen_next
    if next_input.detached == "all":
        rows, weight, bias = rows.detach(), _detached(weight), _detached(bias)
    rows = normalise(rows, weight, bias, next_input, dtype)
    if frozen_rows is not None:
        frozen_rows = normalise(frozen_rows, _detached(weight), _detached(bias), next_input, dtype)
    return results._replace(next=rows, frozen_next=frozen_rows)


def _detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()


def _fork_rows(x: Tensor, next_input: NextInput, owned: bool) -> tuple[Tensor, ...]:
    """The residual, and the next branch's rows. `owned`: nothing else refers to `x`."""
    rows = next_input.rows
    assert rows is not None
    parts = [rows.learning] if rows.num_frozen == 0 or next_input.detached else [rows.learning, rows.frozen]
    forked = (
        (x, *(x.index_select(0, part) for part in parts)) if _wants_plain_ops() else ForkRows.apply(x, owned, *parts)
    )
    if rows.num_frozen == 0 or next_input.detached is None:
        return forked
    return *forked, x.detach().index_select(0, rows.frozen)


class ForkRows(torch.autograd.Function):
    """`(x, x[parts[0]], x[parts[1]], ...)`: the residual, and the rows that branches run on. `parts` are disjoint.

    As one autograd function the backward copies the residual's gradient once and adds the rows' gradients into it;
    separate gathers would each write a zero-filled `[B, ...]` for autograd to add. Saves the row indices only. The
    backward is made of differentiable ops, so double backward works.

    The first result may be changed in place where `x` is `owned`; otherwise autograd takes it for a view of `x`.
    """

    @staticmethod
    def forward(ctx, x, owned, *parts):
        ctx.save_for_backward(*parts)
        ctx.set_materialize_grads(False)
        ctx.like = x.shape
        return x.detach() if owned else x, *(x.index_select(0, rows) for rows in parts)

    @staticmethod
    def backward(ctx, dresidual, *dparts):
        pairs = [(rows, dpart) for rows, dpart in zip(ctx.saved_tensors, dparts, strict=True) if dpart is not None]
        dx, owned = dresidual, False
        for rows, dpart in pairs:
            if dx is None:
                dx, owned = dpart.new_zeros(ctx.like), True
            dx = dx.index_add_(0, rows, dpart) if owned else dx.index_add(0, rows, dpart)
            owned = True
        return dx, None, *(None for _ in dparts)


def drop_path(x: Tensor, row_scale: Tensor) -> Tensor:
    """`row_scale[b] · x[b]`; a row whose scale is 0 is never read."""
    row_scale = row_scale.to(compute_dtype(x)).view(-1, *[1] * (x.dim() - 1))
    return (torch.where(row_scale != 0, x, 0.0) * row_scale).to(x.dtype)
