"""The ops as a user would write them in plain torch, and the magnitudes of the values that they round.

In float64 they are the truth; in the tensors' own dtypes they show torch's error. They share only the names of operands
and results with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from rdp_kernels.kernels.spec import Operands, Results
from tests.conftest import DEVICE

from .cases import Case

Scale = Tensor | float | None


def fused_add(t: Operands, case: Case, row_scale: Scale, stored: Tensor | None = None) -> Results:
    """`stored`: the norm reads these values of the residual in place of the formula's."""
    out = add(t, case, row_scale) if case.adds else t.residual
    if not case.gives_next:
        return Results(out)
    residual = out if stored is None else out + (stored - out).detach()
    parts = []
    for number, rows in enumerate(case.next_parts):
        frozen = number == 1
        x = residual.index_select(0, _index(rows))
        if case.detached == "all" or (case.detached == "frozen" and frozen):
            x = x.detach()
        if case.norm is not None:
            weight, bias = (v.detach() if frozen and v is not None else v for v in (t.weight, t.bias))
            x = normalise(x, weight, bias, case)
        parts.append(x)
    return Results(out, *parts)


def add(t: Operands, case: Case, row_scale: Scale) -> Tensor:
    out = t.residual
    num_learning = len(t.update)
    for branch, rows, gamma, scale in (
        (t.update, case.learning, t.gamma, _part(row_scale, slice(None, num_learning))),
        (t.frozen_update, case.frozen, None if t.gamma is None else t.gamma.detach(), _part(row_scale, slice(num_learning, None))),
    ):  # fmt: skip
        if branch is None:
            continue
        update = scaled(branch, scale)
        if gamma is not None:
            channel = case.channel_dim % branch.dim()
            update = gamma.view([-1 if d == channel else 1 for d in range(branch.dim())]) * update
        if out is None:
            out = update
        elif rows is None:
            out = (out + update).to(out.dtype)
        else:
            out = out.index_add(0, _index(rows), update.to(out.dtype))
    return out.relu() if case.activation == "relu" else out


def scaled(branch: Tensor, scale: Scale) -> Tensor:
    """A row whose scale is 0 counts as 0 even if it holds NaN."""
    if scale is None:
        return branch
    if not isinstance(scale, Tensor):
        return branch * scale if scale != 0 else torch.zeros_like(branch)
    scale = scale.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))
    return torch.where(scale != 0, branch, 0.0) * scale


def _part(row_scale: Scale, rows: slice) -> Scale:
    return row_scale[rows] if isinstance(row_scale, Tensor) else row_scale


def normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, case: Case) -> Tensor:
    """With a weight that is wider than the residual, as under autocast: in the weight's dtype."""
    wide = x.dtype
    for vector in (weight, bias):
        wide = wide if vector is None else torch.promote_types(wide, vector.dtype)
    weight, bias = (None if v is None else v.to(wide) for v in (weight, bias))
    if case.norm == "layer":
        return F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, case.eps).to(x.dtype)
    return F.rms_norm(x.to(wide), x.shape[-1:], weight, case.eps).to(x.dtype)


def magnitudes(t: Operands, case: Case, row_scale: Scale, douts: Results) -> tuple[Results, Operands]:
    """For each element of a result and of a gradient: how large its error may be if every rounded value has an error of
    1.

    For sums of products that is the sum of the absolute values, hence the same formula on absolute values. A norm
    amplifies its input's error: x̂ moves by rstd · (|x| + mean|x|), and its gradient by as much relatively.
    Args: in float64.
    """
    positive = Operands(*(None if v is None else v.detach().abs().requires_grad_(v.requires_grad) for v in t))
    scale = row_scale.abs() if isinstance(row_scale, Tensor) else row_scale
    with torch.enable_grad():
        out = add(positive, case, scale) if case.adds else positive.residual
    with torch.no_grad():
        residual = add(t, case, row_scale) if case.adds else t.residual
        dresidual = torch.zeros_like(residual) if douts.out is None else douts.out.abs()
        parts, dvectors = [], []
        for number, (rows, dy) in enumerate(zip(case.next_parts if case.gives_next else [], douts[1:3], strict=False)):
            rows = _index(rows)
            part, dx = out[rows].detach(), None if dy is None else dy.abs()
            if case.norm is not None:
                part, dx, dvector = _norm_magnitudes(residual[rows], part, positive, case, dx)
                dvectors += [] if dvector is None or number == 1 else [dvector]
            parts.append(part)
            if dx is not None:
                dresidual = dresidual.index_add(0, rows, dx)
    leaves = [v for v in positive[:4] if v is not None and v.requires_grad]
    grads = iter(torch.autograd.grad(out, leaves, dresidual, allow_unused=True) if leaves and out.requires_grad else [])
    of_leaves = [next(grads, None) if v is not None and v.requires_grad else None for v in positive[:4]]
    return Results(out.detach(), *parts), Operands(*of_leaves, *(dvectors[0] if dvectors else ()))


def _norm_magnitudes(
    x: Tensor, size: Tensor, positive: Operands, case: Case, dy: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor] | None]:
    """Of the normed rows, of the gradient with respect to the norm's input, and of those of weight and bias.

    `size`: the magnitude of x, for its error. `dy`: the absolute value of the incoming gradient.
    """
    centred = x - x.mean(-1, keepdim=True) if case.norm == "layer" else x
    rstd = (centred.square().mean(-1, keepdim=True) + case.eps).rsqrt()
    x_hat = (centred * rstd).abs()
    moves = rstd * (size + size.mean(-1, keepdim=True))
    weight = 1.0 if positive.weight is None else positive.weight
    y = moves * weight + (0.0 if positive.bias is None else positive.bias)
    if dy is None:
        return y, None, None
    g = dy * weight
    dx = rstd * (g + g.mean(-1, keepdim=True) + 2 * x_hat * (g * x_hat).mean(-1, keepdim=True))
    dx = dx + rstd * x_hat * g.mean(-1, keepdim=True)
    dx = dx * (1 + moves.amax(-1, keepdim=True))
    over_rows = tuple(range(x.dim() - 1))
    return y, dx, ((dy * moves).sum(over_rows), dy.sum(over_rows))


def _index(rows: tuple[int, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=DEVICE)
