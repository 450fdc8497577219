"""How large the error of an op may be.

1. Against the formula in float64 on the same (rounded) arguments: the largest error of a tensor
   is at most twice torch's in the same dtypes, plus a floor for tensors on which torch happens to be right.
2. By the contract, "arithmetic in float32 (float64 for float64), one cast at the end": the error of each element is at
most half a unit in its last place plus the error of float32 arithmetic. The norm reads the residual as it is
stored, so here the formula reads the residual that the op returned. Without this rule a kernel could compute in
float16 where torch does. Torch's own norm, if it runs after the kernels, rounds the gradient that it gives them.

Both floors are multiples of a rounding error and of `formula.magnitudes`. In float32 and float64 any other error is
larger by orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rdp_kernels.kernels.dispatch import resolve
from rdp_kernels.kernels.spec import NextInput, Operands, Results

from . import formula
from .cases import Case
from .tiles import cut
from .values import douts_of, operands_of, row_scale_of

ROUNDINGS = 8
"""Error of the arithmetic before the last rounding: a few products, and sums in any order."""

Op = Callable[[Operands, Case], Results]


class Used(NamedTuple):
    """The largest share of an error budget that a tensor used, and its name; None where no tensor has elements."""

    share: float = 0.0
    tensor: str | None = None


def check(case: Case, op: Op, twice: bool = False) -> Used:
    """Checks `op` on the current backend, forward and backward, against both budgets.

    Args:
        twice: a second run on the same tensors must give the same bits.
    """
    operands, row_scale = operands_of(case), row_scale_of(case)
    given = [None if t is None else t.detach().clone() for t in operands]
    results, douts, grads = _run(case, op, operands)
    if twice:
        again, _, grads_again = _run(case, op, operands, douts)
        names = (*Results._fields, *(f"d{name}" for name in Operands._fields))
        for name, first, second in zip(names, (*results, *grads), (*again, *grads_again), strict=True):
            assert same_bits(first, second), f"{name}: other bits in a second run"
    assert all(before is None or same(before, t) for before, t in zip(given, operands, strict=True)), "written to"
    assert all(t is None or t.dtype == case.residual_dtype for t in results)

    wide, wide_scale, wide_douts = Operands(*map(_double, operands)), _double(row_scale), Results(*map(_double, douts))
    truth = formula.fused_add(wide, case, wide_scale)
    exact = _named(truth, gradients(truth, wide, wide_douts))
    torchs = formula.fused_add(operands, case, row_scale)
    torchs = _named(torchs, gradients(torchs, operands, douts))
    on_stored = exact
    if case.norm is not None:
        truth = formula.fused_add(wide, case, wide_scale, _double(results.out).detach())
        on_stored = _named(truth, gradients(truth, wide, wide_douts))
    sizes = _named(*formula.magnitudes(wide, case, wide_scale, wide_douts))
    handed_on = {"dresidual", "dupdate", "dfrozen_update", "dgamma"} if _norm_is_torchs(case, operands) else set()
    used = Used()
    for name, ours in _named(results, grads).items():
        if ours is None and exact[name] is None:
            continue
        share = compare(name, case, ours, exact[name], torchs[name], on_stored[name], sizes[name], name in handed_on)
        if share is not None and (used.tensor is None or share > used.share):
            used = Used(share, name)
    return used


def _run(case: Case, op: Op, operands: Operands, douts: Results | None = None) -> tuple[Results, Results, Operands]:
    """Results, incoming gradients, and the op's gradients. Copies, as in place the latter overwrite the former."""
    with cut(case.tiles):
        results = op(operands, case)
        douts = douts_of(case, results) if douts is None else douts
        incoming = Results(*(None if d is None else d.clone() for d in douts)) if case.in_place else douts
        grads = gradients(results, operands, incoming)
    if case.in_place and grads.residual is not None and incoming.out is not None:
        assert grads.residual.data_ptr() == incoming.out.data_ptr(), "the gradient isn't in place"
    return results, douts, grads


def compare(
    name: str,
    case: Case,
    ours: Tensor | None,
    exact: Tensor | None,
    torchs: Tensor | None,
    on_stored: Tensor | None,
    size: Tensor | None,
    handed_on: bool,
) -> float | None:
    """The used share of the first budget; of the second one half a unit in the last place is nearly all. An absent
    gradient counts as zero.

    Args:
        handed_on: it includes a gradient of the norm's input that was rounded to the residual's dtype.
    """
    like = exact if ours is None else ours
    dtype = like.dtype if ours is not None else case.dtype_of(name[1:])
    ours, exact, torchs, on_stored, size = (
        torch.zeros_like(like, dtype=torch.float64) if t is None else t.detach().double()
        for t in (ours, exact, torchs, on_stored, size)
    )
    if like.numel() == 0:
        return None
    arithmetic = ROUNDINGS * torch.finfo(case.compute_dtype).eps * size
    rounded = torch.finfo(case.residual_dtype).eps / 2 * size
    # The sum that a norm reads is stored in the residual's dtype. Tensors that are only read are exact.
    stored = rounded if case.norm is not None and case.adds else 0.0 * size
    error, torch_error = (ours - exact).abs().max(), (torchs - exact).abs().max()
    floor = (half_ulp(size, dtype) + stored + arithmetic).max()
    assert error <= 2 * torch_error + floor, (
        f"{name}: off by {error:.3g}, torch by {torch_error:.3g}, floor {floor:.3g}"
    )

    once_more = rounded if handed_on else 0.0
    of_one = _share((ours - on_stored).abs(), half_ulp(on_stored, dtype) + once_more + arithmetic)
    worst = of_one.argmax()
    assert (of_one <= 1).all(), (
        f"{name}: {ours.flatten()[worst]} for {on_stored.flatten()[worst]} at {worst}: more than one rounding"
    )
    return float(_share(error, 2 * torch_error + floor))


def _share(error: Tensor, allowed: Tensor) -> Tensor:
    """Where the budget is zero no error is allowed, and none is a share of 0."""
    return torch.where(error == 0, 0.0, error / allowed)


def _norm_is_torchs(case: Case, operands: Operands) -> bool:
    if case.norm is None:
        return False
    served = resolve("path", operands, None, NextInput(norm=case.norm), required=False)
    return served.library is None or not served.takes_norm


def gradients(results: Results, operands: Operands, douts: Results) -> Operands:
    """None for an operand that requires or gets no gradient."""
    pairs = [(r, d) for r, d in zip(results, douts, strict=True) if d is not None and r.requires_grad]
    leaves = [t for t in operands if t is not None and t.requires_grad]
    if not pairs or not leaves:
        return Operands()
    outs, incoming = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, leaves, incoming, allow_unused=True))
    return Operands(*(next(found) if t is not None and t.requires_grad else None for t in operands))


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The most that rounding x to `dtype` may change it by; from float64 to 16 bits the cast goes through float32."""
    info = torch.finfo(dtype)
    on_the_way = torch.finfo(torch.float32).eps if info.bits == 16 else 0.0
    return x.abs().clamp(min=info.smallest_normal) * (info.eps + on_the_way) / 2


def same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN being equal to NaN."""
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """NaN and the sign of zero included."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(_bits(a), _bits(b))


def _bits(x: Tensor) -> Tensor:
    return x.detach().contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _named(results: Results, grads: Operands) -> dict[str, Tensor | None]:
    return dict(zip(Results._fields[:3], results[:3], strict=True)) | {f"d{n}": g for n, g in grads._asdict().items()}


def _double(x: Tensor | float | None) -> Tensor | float | None:
    return x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x
