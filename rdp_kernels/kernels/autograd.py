"""The autograd function over the kernels: the add of one path and the input of the next are one node of the graph.

Its backward adds the gradient of the next branch's rows into the residual's; as separate functions each would write a
`[B, ...]` of its own for autograd to add.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

from .._utils.checks import LARGEST_FLOAT32, is_transformed
from . import dispatch, eager, registered
from .buffers import joined_add, joined_next, parted_add, parted_next
from .dispatch import PLAIN
from .short import ShortAdd, ShortGather, rows_are_right
from .spec import ACTIVATION_CODES, ACTIVATIONS, Add, NextInput, Operands, Results, RowSet, compute_dtype, residual_of


def fused_add(op: str, operands: Operands, add: Add | None = None, next_input: NextInput | None = None) -> Results:
    """Runs one call on the backend that is chosen. Arguments must have been checked. `op` names it in errors and logs.

    Under `torch.compile` the dense add is plain aten, which inductor fuses with what surrounds it into one kernel each
    way; an op of ours would stand in its way. Rows and norms stay ours there, as registered ops.
    """
    if torch.compiler.is_compiling():
        return _in_graph(op, operands, add, next_input)
    preparing, row_scale = dispatch.preparing_kernels(), None if add is None else add.row_scale
    if preparing is not None and dispatch.short_kernels(residual_of(operands)) and _are_plain((*operands, row_scale)):
        results = _known_call(preparing, operands, add, next_input)
        if results is not None:
            return results
    served = dispatch.resolve(op, operands, add, next_input)
    if served.takes_norm and served.library is not None:
        results = FusedCall(served.kernels, add, next_input)(operands)
        preparing = dispatch.preparing_kernels()
        if preparing is not None and preparing is served.kernels:
            preparing.remember(dispatch.choice(), operands, add, next_input, _records(operands))
        return results
    rest = _without_norm(next_input)
    if served.library is None or (add is None and rest is None):
        return eager.fused_add(operands, add, next_input)
    results = FusedCall(served.kernels, add, rest)(operands._replace(weight=None, bias=None))
    return _norm_after(results, operands, next_input)


def _in_graph(op: str, operands: Operands, add: Add | None, next_input: NextInput | None) -> Results:
    if next_input is None and add is not None and add.rows is None:
        return eager.fused_add(operands, add, next_input)
    residual = residual_of(operands)
    normed = next_input is not None and next_input.norm is not None
    dtypes = tuple(None if t is None else t.dtype for t in operands)
    library = dispatch.resolve_in_graph(op, residual.device, dtypes, normed, is_transformed())
    if library is not None and not (normed and residual.shape[-1] > dispatch.WIDEST_NORM):
        return registered.fused_add(library, operands, _scaled_by_rows(operands, add), next_input)
    rest = _without_norm(next_input)
    if not normed or (add is None and rest is None):
        return eager.fused_add(operands, add, next_input)
    return _norm_after(_in_graph(op, operands._replace(weight=None, bias=None), add, rest), operands, next_input)


def _without_norm(next_input: NextInput | None) -> NextInput | None:
    """The gather that is left without the norm; None where the next branch gets all rows."""
    if next_input is None or next_input.rows is None:
        return None
    return NextInput(next_input.rows, detached=next_input.detached)


def _norm_after(results: Results, operands: Operands, next_input: NextInput | None) -> Results:
    """Applies torch's norm to the results of kernels."""
    assert next_input is not None
    if next_input.rows is None:
        results = results._replace(next=results.out)
    return eager.normalised(results, operands, next_input)


def _scaled_by_rows(operands: Operands, add: Add | None) -> Add | None:
    """Turns a scale other than 0 and 1 into a factor for each row."""
    if add is None or add.row_scale is not None or operands.frozen_update is not None or add.scale in (0.0, 1.0):
        return add
    return replace(add, scale=1.0, row_scale=scale_of_rows(operands, add.scale))


def scale_of_rows(operands: Operands, scale: Tensor | float) -> Tensor:
    """A factor for each row of the update. As a tensor it is data, so that any number has the same graph."""
    if isinstance(scale, Tensor):
        return scale
    update, dtype = operands.update, compute_dtype(operands.residual)
    return torch.ones(update.shape[0], dtype=dtype, device=update.device) * scale


def plain_add(residual: Tensor, update: Tensor, scale: float) -> Tensor | None:
    """`residual + scale · update` by torch's own add, on any device: one kernel each way too, and no Python in its
    backward. None where a backend was asked for by name, and where that add would broadcast or promote.

    None for images as well: with a scale it rounds once where kernels, and other libraries' drop-path and add, round
    twice, and BatchNorm over few pixels magnifies the difference.
    """
    if update.dim() > 3 or update.shape != residual.shape or update.dtype != residual.dtype:
        return None
    return torch.add(residual, update, alpha=scale) if dispatch.is_free() else None


def unchecked_add(
    residual: Tensor,
    update: Tensor,
    gamma: Tensor | None,
    row_scale: Tensor | float | None,
    rows: Tensor | None = None,
    channel_dim: int = -1,
    activation: str | None = None,
    inverse: Tensor | None = None,
) -> Tensor | None:
    """The residual add by kernels that check the rest of their arguments themselves (`kernels.short`).

    Only types and flags are looked at here. Returns None where such kernels don't serve the call, where a tensor has to
    be copied first, and where an argument is wrong: the caller then checks all arguments and calls `fused_add`.
    `inverse` is that of `rows`, if it is known; it isn't checked.
    """
    libraries = dispatch.short_kernels(residual)
    if not libraries or type(update) not in PLAIN:
        return None
    scale, factors = 1.0, None
    if row_scale is not None:
        if type(row_scale) is Tensor and row_scale.dim() == 1 and not row_scale.requires_grad:
            factors = row_scale
        elif type(row_scale) is float and -LARGEST_FLOAT32 <= row_scale <= LARGEST_FLOAT32:
            scale = row_scale
        else:
            return None
    if gamma is not None and (type(gamma) not in PLAIN or type(channel_dim) is not int):
        return None
    options: tuple = ()
    if rows is not None or scale != 1.0 or channel_dim != -1 or activation is not None:
        if not (rows is None or type(rows) is Tensor):
            return None
        if activation is not None and (type(activation) is not str or activation not in ACTIVATIONS):
            return None
        options = rows, scale, channel_dim, ACTIVATION_CODES[activation]
        if inverse is not None:
            options = *options, inverse
    learns = residual.requires_grad or update.requires_grad or (gamma is not None and gamma.requires_grad)
    records = learns and is_grad_enabled()
    for kernels in libraries:
        if records:
            out = _run(ShortAdd, (kernels, factors, options), residual, update, gamma)
        else:
            out = (
                kernels.residual_add(residual, update, gamma, factors, *options)
                if rows is None
                else kernels.residual_add_rows(residual, update, gamma, factors, *options)[0]
            )
        if out is not None:
            return out
    return None


def unchecked_gather(residual: Tensor, rows: Tensor) -> Tensor | None:
    """The gather of rows, as `unchecked_add`."""
    libraries = dispatch.short_kernels(residual)
    if not libraries or type(rows) is not Tensor:
        return None
    records = residual.requires_grad and is_grad_enabled()
    for kernels in libraries:
        out = _run(ShortGather, (kernels, rows), residual) if records else kernels.gather_rows(residual, rows)
        if out is not None:
            return out
    return None


def unchecked_add_norm(
    operands: Operands,
    rows: Tensor | None,
    row_scale: Tensor | float | None,
    next_rows: Tensor | None,
    norm: str,
    eps: float,
) -> Results | None:
    """The add with a norm, by kernels that a checked call of the same kind had prepared; as `unchecked_add`."""
    residual, update = operands[:2]
    if not dispatch.short_kernels(residual):
        return None
    preparing = dispatch.preparing_kernels()
    if preparing is None:
        return None
    if type(update) not in PLAIN or not _are_plain(operands) or type(eps) is not float or type(norm) is not str:
        return None
    if residual.dim() == 0 or update.dim() == 0:
        return None
    scale, factors = 1.0, None
    if row_scale is not None:
        if type(row_scale) is Tensor and row_scale.dim() == 1 and not row_scale.requires_grad:
            factors = row_scale
        elif type(row_scale) is float and -LARGEST_FLOAT32 <= row_scale <= LARGEST_FLOAT32:
            scale = row_scale
        else:
            return None
    for some in (rows, next_rows):
        if some is not None and not rows_are_right(some, residual):
            return None
    num_rows = residual.shape[0] if rows is None else rows.shape[0]
    if update.shape[0] != num_rows or (factors is not None and factors.shape[0] != num_rows):
        return None
    add = Add(None if rows is None else RowSet(rows, num_rows), scale, factors)
    next_set = None if next_rows is None else RowSet(next_rows, next_rows.shape[0])
    return _known_call(preparing, operands, add, NextInput(next_set, norm, eps))


def _known_call(
    preparing: ModuleType, operands: Operands, add: Add | None, next_input: NextInput | None
) -> Results | None:
    """The results by kernels that a checked call of the same kind had prepared, without asking again which library
    serves it. None if there was no such call. Kernels must be able to take the tensors."""
    prepared = preparing.known_call(dispatch.choice(), operands, add, next_input, _records(operands))
    return None if prepared is None else FusedCall(preparing, add, next_input, prepared=prepared)(operands)


_PLAIN_OR_ABSENT = {*PLAIN, type(None)}


def _are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the types of all tensors are."""
    return _PLAIN_OR_ABSENT.issuperset(map(type, tensors))


def _records(operands: Operands) -> bool:
    """Whether autograd records a call on these."""
    if is_grad_enabled():
        for t in operands:
            if t is not None and t.requires_grad:
                return True
    return False


class FusedCall:
    """One call of kernels: what is computed, and who owns the residual. Its autograd node keeps this object without
    the tensors. Autograd saves those, raises where one was changed in place since, and frees them after the backward.

    Args:
        kernels: the library's launchers.
        add: how the update is added; None if nothing is added.
        next_input: what the next branch gets; None if there is none.
        previous: the call that the residual comes from, where nothing else refers to that residual. If that call
            allocated it and doesn't save it, the sum overwrites it; and if this call's backward allocates its gradient,
            the previous call's backward overwrites that in turn.
        prepared: what the library prepared for an earlier call of this kind.
    """

    def __init__(
        self,
        kernels: ModuleType | None,
        add: Add | None,
        next_input: NextInput | None = None,
        previous: FusedCall | None = None,
        prepared: Any = None,
    ):
        assert kernels is not None
        self.kernels, self.add, self.next_input, self.previous = kernels, add, next_input, previous
        self.prepared: Any = prepared
        self.operands: Any = None
        self.add_numbers: tuple | None = None
        self.next_numbers: tuple | None = None
        self.in_place = add is not None and previous is not None and previous.owns_out
        self.owns_out: bool = False
        self.owns_gradient: bool = False

    def __call__(self, operands: Operands) -> Results:
        """The results, except for what the norm's backward needs."""
        if _records(operands):
            self.operands = operands
            outputs = _run(FusedCall, self, *operands)
            return Results(outputs) if type(outputs) is Tensor else Results(*outputs[:3])
        results = self._compute(operands, 0)
        self.owns_out = self.add is not None
        return results if self.owns_out else results._replace(out=operands.residual)

    def _compute(self, operands: Operands, num_saved: int) -> Results:
        prepared = self.prepared
        if prepared is None or prepared.copies:
            call = operands, self.add, self.next_input, num_saved, self.in_place
            results, self.context = self.kernels.fused_add_fwd(*call)
            return results
        self.context = prepared.context
        return prepared.run(operands, self.add, self.next_input, num_saved)

    def forward(self, ctx: Any, *_: Tensor | None) -> Any:
        """Saves what the wanted gradients need: the update's learning rows for dγ, γ and the norm's weight to pass
        through, what the norm saw with its statistics, and the sum where there is an activation."""
        add, next_input, operands, num_saved = self.add, self.next_input, self.operands, 0
        if next_input is not None and next_input.norm is not None:
            num_saved = next_input.num_with_gradient(operands.residual.shape[0])
        out, next_rows, frozen_next, norm_input, mean, rstd = self._compute(operands, num_saved)
        self.owns_out = add is not None and norm_input is not out
        saved: tuple[Tensor | None, ...] = ()
        if add is not None:
            _, _, _, needs_update, needs_frozen, needs_gamma, *_ = ctx.needs_input_grad
            tensors, self.add_numbers = parted_add(add)
            saved = (
                operands.update if needs_gamma else None,
                operands.gamma if needs_update or needs_frozen else None,
                None if add.activation is None else out,
                *tensors,
            )
        if next_input is not None:
            tensors, self.next_numbers = parted_next(next_input)
            saved = *saved, operands.weight if num_saved else None, norm_input, mean, rstd, *tensors
        self.add = self.next_input = self.operands = self.prepared = None
        ctx.call = self
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*saved)
        if self.in_place and out is operands.residual:  # not where the kernels took a copy, for its strides
            ctx.mark_dirty(operands.residual)
        if next_input is None:
            return out
        if next_input.detached is not None:
            detached = (frozen_next,) if next_input.detached == "frozen" else (next_rows, frozen_next)
            ctx.mark_non_differentiable(*(t for t in detached if t is not None))
        if add is None:
            out = operands.residual
        if norm_input is out:
            norm_input = None
        return (out, next_rows) if frozen_next is norm_input is None else (out, next_rows, frozen_next, norm_input)

    passed_on = None

    @staticmethod
    def backward(ctx: Any, saved: tuple, gradients: tuple, needs: tuple, twice: bool) -> Operands:
        self = ctx.call
        add = next_input = update = gamma = out = weight = norm_input = mean = rstd = None
        dout, dnext, dfrozen_next, *_ = *gradients, None, None
        if self.add_numbers is not None:
            update, gamma, out, *tensors = saved[:6]
            add, saved = joined_add(tensors, self.add_numbers), saved[6:]
        if self.next_numbers is not None:
            weight, norm_input, mean, rstd, *tensors = saved
            next_input = joined_next(tensors, self.next_numbers)
        grads = self.kernels.fused_add_bwd(
            self.context,
            Operands(None, update, None, gamma, weight),
            Results(out, None, None, norm_input, mean, rstd),
            (dout, dnext, dfrozen_next),
            add,
            next_input,
            Operands(*needs[2:]),
            in_place=self.owns_gradient and not twice,
        )
        if self.previous is not None:
            self.previous.owns_gradient = self.owns_gradient or grads.residual is not dout
        return grads


class _FusedAdd(torch.autograd.Function):
    """The one autograd function over all kernels. `kind`, which is `FusedCall` or a class of `kernels.short`, runs them
    for a `call` and saves what its backward needs.

    Differentiable once: what a call saves is an operand or a result, so that autograd knows that the gradients depend
    on the operands.
    """

    @staticmethod
    def forward(ctx, kind, call, *operands):
        ctx.kind = kind
        return kind.forward(call, ctx, *operands)

    @staticmethod
    def backward(ctx, *gradients):
        kind, saved, needs = ctx.kind, ctx.saved_tensors, ctx.needs_input_grad
        if kind.passed_on is not None:
            grads = kind.passed_on(ctx, saved, gradients, needs)
            if grads is not None:
                return None, None, *grads
        check_untransformed(*gradients)
        if not is_grad_enabled():
            return None, None, *kind.backward(ctx, saved, gradients, needs, False)
        with torch.no_grad():
            grads = kind.backward(ctx, saved, gradients, needs, True)
        return None, None, *differentiable_once(grads, (*gradients, *saved))


# `Function.apply` without its look for functorch, which isn't active here: a quarter of what it costs.
_run = super(torch.autograd.Function, _FusedAdd).apply

_is_batched = torch._C._functorch.is_legacy_batchedtensor


def check_untransformed(*gradients: Tensor | None) -> None:
    """Raises where vmap, torch.func or forward-mode AD wants the backward of kernels for more than plain gradients."""
    if not is_transformed():
        for gradient in gradients:
            if gradient is not None and _is_batched(gradient):
                break
        else:
            return
    raise RuntimeError(
        "the backward of the kernels of rdp_kernels takes plain gradients only, not those of vmap (which "
        "is_grads_batched and vectorize=True use), of other torch.func transforms or of forward-mode AD: run the "
        'forward within rdp.use_backend("eager")'
    )


def differentiable_once(grads: tuple, sources: tuple) -> tuple:
    """Gradients that depend on `sources`, which raise when these ask for their own."""
    return _DifferentiableOnce.apply(*grads, *sources)[: len(grads)]


class _DifferentiableOnce(torch.autograd.Function):
    """The identity on gradients that depend on further tensors; raises when these ask for theirs."""

    @staticmethod
    def forward(ctx, *tensors):
        return tensors

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(registered.DIFFERENTIABLE_ONCE)
