"""The tensors of a case."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from rdp_kernels.kernels.spec import Operands, Results
from rdp_kernels.plan import kept_scale
from tests.conftest import DEVICE

from . import formula
from .cases import VECTORS, Case


def operands_of(case: Case) -> Operands:
    """The leaves. Elements that a call mustn't read are NaN: dropped rows of the branch, and gaps between elements."""
    generator = torch.Generator().manual_seed(case.seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    of_residual, of_branch, _, of_vectors = case.layouts
    num_rows = case.shape[0] if case.rows is None else len(case.learning)
    inner = case.shape[1:]
    values = Operands(
        residual=case.spread * (draw(case.shape) + case.offset) if case.residual else None,
        update=case.spread * draw(num_rows, *inner) if case.adds else None,
        frozen_update=case.spread * draw(len(case.frozen), *inner) if case.adds and case.frozen else None,
        gamma=draw(case.shape[case.channel_dim]) if case.gamma else None,
        weight=draw(case.shape[-1]) if case.weight else None,
        bias=draw(case.shape[-1]) if case.bias else None,
    )
    values = values._replace(**{name: getattr(values, name).to(case.dtype_of(name)) for name in case.operands})
    if of_branch == "expanded" and values.update is not None:
        values = values._replace(update=values.update[:1].expand(values.update.shape))
    if case.activation == "relu":
        values = _away_from_zero(values, case, generator)
    values = values._replace(
        update=_dropped_rows_are_nan(values.update, case, slice(None, num_rows)),
        frozen_update=_dropped_rows_are_nan(values.frozen_update, case, slice(num_rows, None)),
    )

    wanted = case.operands if case.wanted is None else case.wanted
    leaves = {}
    for name in case.operands:
        layout = of_vectors if name in VECTORS else of_residual if name == "residual" else of_branch
        leaf = laid_out(getattr(values, name), layout)
        leaves[name] = leaf.requires_grad_(name in wanted)
    return Operands(**leaves)


def index(rows: tuple[int, ...] | None, case: Case) -> Tensor | None:
    return None if rows is None else laid_out(torch.tensor(rows, dtype=torch.int64), case.layouts[3])


def row_scale_of(case: Case) -> Tensor | float | None:
    """On the device. Factors other than 0 are no powers of 2."""
    if case.drop_prob is not None:
        torch.manual_seed(case.seed)  # the mask comes from the global generator
        keep = torch.rand(case.shape[0]) >= case.drop_prob
        dtype = torch.float64 if case.residual_dtype == torch.float64 else torch.float32
        return (keep.to(dtype) * kept_scale(case.drop_prob, case.scale_by_keep)).to(DEVICE)
    if case.row_scale != "tensor":
        return case.row_scale
    generator = torch.Generator().manual_seed(case.seed + 1)
    num_rows = case.shape[0] if case.rows is None else len(case.rows)
    scale = torch.rand(num_rows, generator=generator) + 0.7
    scale = scale * (torch.rand(num_rows, generator=generator) < 0.6)
    return laid_out(scale, case.layouts[3])


def douts_of(case: Case, results: Results) -> Results:
    """An incoming gradient for each result that is used and can have one."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    douts = {}
    for name, result in zip(Results._fields, results, strict=True):
        if result is None or not result.requires_grad or (case.used is not None and name not in case.used):
            continue
        dout = torch.randn(result.shape, generator=generator).to(result.dtype)
        if case.layouts[2] == "expanded":
            dout = dout[:1].expand(dout.shape)
        elif case.layouts[2] == "expanded scalar" and dout.numel() > 0:
            dout = dout.flatten()[0].expand(dout.shape)
        douts[name] = laid_out(dout, case.layouts[2])
    return Results(**douts)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` on the device in another memory layout, with NaN (0 for integers) in the gaps.

    "offset": misaligned; "padded": rows further apart than they are long; "strided": every other element;
    "transposed": the second dimension innermost (of a vector or a matrix: columns first); "expanded", "expanded
    scalar": one row or element in the place of many, where they are equal.
    """
    x = x.to(DEVICE)
    poison = torch.nan if x.is_floating_point() else 0
    gap = torch.full((2 * x.numel() + 4 * max(len(x), 1) + 1,), poison, dtype=x.dtype, device=DEVICE)
    if layout == "offset":
        view = gap[1 : 1 + x.numel()].view(x.shape)
    elif layout == "padded":
        strides = x.contiguous().stride()
        view = gap.as_strided(x.shape, (x[:1].numel() + 3, *strides[1:]))
    elif layout == "strided":
        view = gap[: 2 * x.numel()].view(*x.shape, 2)[..., 0]
    elif layout == "transposed":
        first = 0 if x.dim() < 3 else 1
        return x.transpose(first, -1).contiguous().transpose(first, -1)
    elif layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    elif layout.startswith("expanded") and x.numel() > 0:
        once = x.flatten()[0] if layout == "expanded scalar" else x[:1]
        return once.clone().expand(x.shape) if torch.equal(x, once.expand(x.shape)) else x.contiguous()
    else:
        return x.contiguous()
    return view.copy_(x)


def _dropped_rows_are_nan(branch: Tensor | None, case: Case, part: slice) -> Tensor | None:
    """`part`: the rows of `branch` among all rows."""
    scale = row_scale_of(case)
    if branch is None or scale is None:
        return branch
    if not isinstance(scale, Tensor):
        return torch.full_like(branch, torch.inf) if scale == 0 else branch
    dropped = (scale.cpu()[part] == 0).view(-1, *[1] * (branch.dim() - 1))
    return branch if not dropped.any() else branch.masked_fill(dropped, torch.nan if case.seed % 2 else torch.inf)


def _away_from_zero(values: Operands, case: Case, generator: torch.Generator) -> Operands:
    """Moves sums that rounding could carry across zero, where relu's gradient jumps; some are exactly zero."""
    zero = torch.rand(case.shape, generator=generator) < 0.1
    values = values._replace(residual=values.residual.masked_fill(zero, 0.0))
    for name, rows in (("update", case.learning), ("frozen_update", case.frozen)):
        part = getattr(values, name)
        if part is not None:
            of_part = zero if rows is None else zero[list(rows)]
            values = values._replace(**{name: part.masked_fill(of_part, 0.0)})
    on_device = Operands(*(None if t is None else t.to(DEVICE).double() for t in values))
    total = formula.add(on_device, case, row_scale_of(case)).cpu()
    shift = torch.where((total != 0) & (total.abs() < 0.25 * case.spread), total.sign() * 0.5 * case.spread, 0.0)
    return values._replace(residual=(values.residual.double() + shift).to(values.residual.dtype))
