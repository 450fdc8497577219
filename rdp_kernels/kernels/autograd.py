"""The autograd function over the kernels: the add of one path and the input of the next are one node of the graph.

Its backward adds the gradient of the next branch's rows into the residual's; as separate functions each would write a
`[B, ...]` of its own for autograd to add.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .._utils.checks import LARGEST_FLOAT32, is_transformed
from . import dispatch, eager, registered
from .dispatch import Kernels
from .spec import ACTIVATIONS, Add, NextInput, Operands, Results, RowSet, joined, parted, residual_of

_PLAIN = (Tensor, Parameter)


def fused_add(op: str, operands: Operands, add: Add | None = None, next_input: NextInput | None = None) -> Results:
    """One call on the backend of the moment. Arguments must have been checked. `op` is its name in errors and the log.

    Under `torch.compile` the dense add is plain aten, which inductor fuses with what surrounds it into one kernel each
    way; an op of ours would stand in its way. Rows and norms stay ours there, as registered ops.
    """
    if torch.compiler.is_compiling():
        return _in_graph(op, operands, add, next_input)
    served = dispatch.resolve(op, operands, add, next_input)
    if served.takes_norm and served.library is not None:
        return FusedCall(served.kernels, add, next_input)(operands)
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
    dtypes = tuple(t.dtype for t in operands if t is not None)
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
    """Torch's norm of what kernels gave."""
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
    update, dtype = operands.update, eager.compute_dtype(operands.residual)
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
) -> Tensor | None:
    """The residual add on CPU tensors by kernels that check their arguments themselves.

    Only types and flags are looked at here. Returns None where these kernels don't serve the call, where a tensor has
    to be copied first, and where an argument is wrong: the caller then checks all arguments and calls `fused_add`.
    """
    kernels = _checking_kernels(residual)
    if kernels is None or type(update) not in _PLAIN:
        return None
    scale, factors = 1.0, None
    if row_scale is not None:
        if type(row_scale) is float and -LARGEST_FLOAT32 <= row_scale <= LARGEST_FLOAT32:
            scale = row_scale
        elif type(row_scale) is Tensor and not row_scale.requires_grad:
            factors = row_scale
        else:
            return None
    if gamma is not None and (type(gamma) not in _PLAIN or type(channel_dim) is not int):
        return None
    usual = rows is None and scale == 1.0 and channel_dim == -1 and activation is None
    if not usual and not ((rows is None or type(rows) is Tensor) and (activation is None or activation in ACTIVATIONS)):
        return None
    learns = residual.requires_grad or update.requires_grad or (gamma is not None and gamma.requires_grad)
    if learns and torch.is_grad_enabled():
        add = Add(None if rows is None else RowSet(rows, ALL), scale, factors, channel_dim, activation)
        return _run(FusedCall(kernels, add), residual, update, None, gamma, None, None)
    if usual:
        return kernels.residual_add(residual, update, gamma, factors)
    code = 0 if activation is None else ACTIVATIONS[activation].code
    return kernels.residual_add(residual, update, gamma, factors, rows, scale, channel_dim, code)


def unchecked_gather(residual: Tensor, rows: Tensor) -> Tensor | None:
    """The gather of rows, as `unchecked_add`."""
    kernels = _checking_kernels(residual)
    if kernels is None or type(rows) is not Tensor:
        return None
    if residual.requires_grad and torch.is_grad_enabled():
        return _run(FusedCall(kernels, None, NextInput(RowSet(rows, ALL))), residual, None, None, None, None, None)
    return kernels.gather_rows(residual, rows)


ALL = -1
"""Stands for the number of unchecked rows, which may have no length: all of them learn."""


def _checking_kernels(residual: Tensor) -> Any:
    if (
        torch.compiler.is_compiling()
        or type(residual) not in _PLAIN
        or not residual.is_cpu
        or forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    ):
        return None
    return dispatch.checking_kernels()


class FusedCall:
    """One call of kernels: what is computed, and who owns the residual. Its node of the graph keeps it, without its
    tensors: those autograd saves, which raises where they are changed in place meanwhile, and frees them in the end.

    Args:
        kernels: the library's launchers.
        add: how the update is added; None if nothing is added.
        next_input: what the next branch gets; None if there is none.
        previous: the call that the residual comes from, where nobody else ever sees that residual. If that call
            allocated it and doesn't save it, the sum overwrites it; and if this call's backward allocates its gradient,
            the previous call's backward overwrites that in turn.
    """

    __slots__ = (
        "add", "context", "in_place", "is_recorded", "kernels", "next_input", "numbers", "owns_gradient", "owns_out",
        "previous",
    )  # fmt: skip

    def __init__(
        self,
        kernels: Kernels | None,
        add: Add | None,
        next_input: NextInput | None = None,
        previous: FusedCall | None = None,
    ):
        self.kernels: Any = kernels
        self.add, self.next_input, self.previous = add, next_input, previous
        self.in_place = add is not None and previous is not None and previous.owns_out
        self.is_recorded = torch.is_grad_enabled()  # within an autograd function it never is
        self.owns_gradient = False

    def __call__(self, operands: Operands) -> Results:
        """The results, except for what the norm's backward needs."""
        return Results(*_FusedAdd.apply(self, *operands)[:3])


class _FusedAdd(torch.autograd.Function):
    """Saves what the wanted gradients need: the update's learning rows for dγ, γ and the norm's weight to pass through,
    what the norm saw with its statistics, the sum where there is an activation. Differentiable once: what the norm saw
    is an operand or a result, so that autograd knows that what the norm's backward makes of it depends on the operands.
    """

    @staticmethod
    def forward(ctx, call, residual, update, frozen_update, gamma, weight, bias):
        add, next_input, kernels, num_saved = call.add, call.next_input, call.kernels, 0
        _, _, wants_update, wants_frozen_update, wants_gamma, _, _ = wanted = ctx.needs_input_grad
        if next_input is not None and next_input.norm is not None and call.is_recorded and any(wanted):
            num_saved = next_input.num_with_gradient(residual.shape[0])
        operands = Operands(residual, update, frozen_update, gamma, weight, bias)
        results, call.context = kernels.fused_add_fwd(operands, add, next_input, num_saved, call.in_place)
        if results is None:
            return None
        out, next_rows, frozen_next, norm_input, mean, rstd = results
        tensors, call.numbers = parted(add, next_input, kernels.READS_INVERSES)
        ctx.call, call.add, call.next_input = call, None, None
        ctx.save_for_backward(
            update if wants_gamma else None,
            gamma if wants_update or wants_frozen_update else None,
            weight if num_saved else None,
            out if add is not None and add.activation is not None else None,
            norm_input,
            mean,
            rstd,
            *tensors,
        )
        if kernels.ONE_RESULT:
            return next_rows if add is None else out
        ctx.set_materialize_grads(False)
        if add is None:
            out = residual
        call.owns_out = add is not None and norm_input is not out
        if call.in_place:
            ctx.mark_dirty(residual)
        if next_input is not None and next_input.detached is not None:
            detached = [frozen_next] if next_input.detached == "frozen" else [next_rows, frozen_next]
            ctx.mark_non_differentiable(*(t for t in detached if t is not None))
        return out, next_rows, frozen_next, None if norm_input is out else norm_input

    @staticmethod
    def backward(ctx, *douts):
        update, gamma, weight, out, norm_input, mean, rstd, *tensors = ctx.saved_tensors
        call, wanted = ctx.call, Operands(*ctx.needs_input_grad[1:])
        dout, previous, numbers = douts[0], call.previous, call.numbers
        if not numbers.gives_next and out is None:
            rows, _, row_scale, _, _ = tensors
            scaled = gamma is not None or row_scale is not None or numbers.scale != 1.0
            if not (wanted.gamma or (wanted.update and (scaled or rows is not None)) or wanted.frozen_update):
                if previous is not None:
                    previous.owns_gradient = call.owns_gradient and not wanted.update
                passed = (dout if is_wanted else None for is_wanted in wanted)
                return None, *passed
        add, next_input = joined(tensors, numbers)
        check_untransformed(*douts)
        gradients = Results(*douts[:3]) if add is not None or not call.kernels.ONE_RESULT else Results(next=dout)
        arguments = (
            call.context,
            Operands(update=update, gamma=gamma, weight=weight),
            Results(out, norm_input=norm_input, mean=mean, rstd=rstd),
            gradients,
            add,
            next_input,
            wanted,
        )
        if torch.is_grad_enabled():
            with torch.no_grad():
                grads = call.kernels.fused_add_bwd(*arguments)
        else:
            grads = call.kernels.fused_add_bwd(*arguments, call.owns_gradient)
        if previous is not None:
            previous.owns_gradient = call.owns_gradient or grads.residual is not dout
        if torch.is_grad_enabled():
            grads = differentiable_once(grads, (*douts, update, gamma, weight, out, norm_input))
        return None, *grads


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
        "the backward of the kernels of rdp_kernels takes plain gradients only, none of vmap (is_grads_batched and "
        "vectorize=True are one), of another torch.func transform or of forward-mode AD: run the forward within "
        'rdp.use_backend("eager")'
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
