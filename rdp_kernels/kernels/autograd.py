"""The autograd function over the kernels: the tail of one path and the head of the next are one node of the graph.

Its backward adds the gradient of the next branch's rows into the stream's; as separate functions each would write a
`[B, ...]` of its own for autograd to add.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from .._utils.checks import is_transformed
from . import dispatch, eager, registered
from .buffers import context_of
from .spec import Add, NextInput, Operands, Results


def fused_add(op: str, operands: Operands, add: Add | None = None, next_input: NextInput | None = None) -> Results:
    """One call on the backend of the moment; arguments are taken as checked. `op` is what errors and the log call it.

    Under `torch.compile` the dense add is plain aten, which inductor fuses with what surrounds it into one kernel each
    way; an op of ours would stand in its way. Rows and norms stay ours there, as registered ops.
    """
    kernels = None
    if not torch.compiler.is_compiling():
        kernels = library_for(op, operands, add, next_input)
        if kernels is not None:
            return FusedCall(kernels, add, next_input)(operands)
    elif next_input is not None or add is None or add.rows is not None:
        stream = operands.update if operands.residual is None else operands.residual
        dtypes = tuple(t.dtype for t in operands if t is not None)
        width = _norm_width(stream, next_input)
        too_wide = width is not None and width > dispatch.WIDEST_NORM
        library = dispatch.compiled_kernels(op, stream.device, dtypes, width is not None, is_transformed())
        if library is not None and not too_wide:
            return registered.fused_add(library, operands, _scaled_by_rows(operands, add), next_input)
    if next_input is None or next_input.norm is None or (add is None and next_input.rows is None):
        return eager.fused_add(operands, add, next_input)
    # No kernel has this norm: torch's, after what kernels there are for the rest.
    rest = None if next_input.rows is None else NextInput(next_input.rows, detached=next_input.detached)
    results = fused_add(op, operands._replace(weight=None, bias=None), add, rest)
    if rest is None:
        results = results._replace(next=results.out)
    return eager.normalised(results, operands, next_input)


def _scaled_by_rows(operands: Operands, add: Add | None) -> Add | None:
    """With a number other than 0 and 1 as a factor a row."""
    if add is None or add.row_scale is not None or operands.frozen_update is not None or add.scale in (0.0, 1.0):
        return add
    return replace(add, scale=1.0, row_scale=scale_of_rows(operands, add.scale))


def scale_of_rows(operands: Operands, scale: Tensor | float) -> Tensor:
    """A number as a factor for each row of the branch: data, for which any number has the same graph."""
    if isinstance(scale, Tensor):
        return scale
    branch, dtype = operands.update, eager.compute_dtype(operands.residual)
    return torch.ones(branch.shape[0], dtype=dtype, device=branch.device) * scale


def _norm_width(stream: Tensor, next_input: NextInput | None) -> int | None:
    return None if next_input is None or next_input.norm is None else stream.shape[-1]


def library_for(
    op: str, operands: Operands, add: Add | None, next_input: NextInput | None, required: bool = True
) -> ModuleType | None:
    """The kernels that serve a call; None for the eager reference. Not `required`: None also where the backend that was
    asked for by name can't serve it."""
    stream = operands.update if operands.residual is None else operands.residual
    row_scale = None if add is None else add.row_scale

    def tile_rows() -> int:
        context = context_of(operands, None if next_input is None else next_input.norm, None)
        return context.shape[0] * context.tiling(add, next_input, operands.gamma is not None).positions

    return dispatch.kernels_for(
        op,
        stream,
        *operands,
        row_scale,
        norm_width=_norm_width(stream, next_input),
        tile_rows=tile_rows,
        required=required,
    )


class FusedCall:
    """One call of kernels: what is computed, and who owns the stream.

    Args:
        kernels: the library, with `fused_add_fwd` and `fused_add_bwd`.
        add: how the branch is added; None if there is none.
        next_input: what the next branch gets; None if there is none.
        previous: the tail that the residual comes from, where nobody else ever sees it. If that tail allocated it and
            doesn't save it, the sum overwrites it; and if this one's backward allocates its gradient, that tail's
            overwrites it in turn.
    """

    def __init__(
        self,
        kernels: ModuleType,
        add: Add | None,
        next_input: NextInput | None = None,
        previous: FusedCall | None = None,
    ):
        self.kernels, self.add, self.next_input = kernels, add, next_input
        self.saves_stream = False
        """Whether the stream that comes out is saved: where all its rows are normed, and a gradient is wanted."""
        owned = previous is not None and previous.add is not None and not previous.saves_stream
        self.in_place = add is not None and owned
        self.is_recorded = torch.is_grad_enabled()  # within an autograd function it never is
        self.node: Node = Node(kernels, None if previous is None else previous.node)

    def __call__(self, operands: Operands) -> Results:
        """Without what is there for the norm's backward."""
        return Results(*_FusedAdd.apply(self, *operands)[:3])


class Node:
    """What a tail's backward has to know beside its tensors, which autograd keeps: where they are changed in place
    meanwhile it raises, and when the backward is done it lets them go."""

    def __init__(self, kernels: ModuleType, previous: Node | None):
        self.kernels, self.previous = kernels, previous
        self.owns_gradient = False


class _FusedAdd(torch.autograd.Function):
    """Saves what the wanted gradients need: the branch's learning rows for dγ, γ and the norm's weight to pass through,
    what the norm saw with its statistics, the sum where there is an activation. Differentiable once: what the norm saw
    is an operand or a result, so that autograd knows that what the norm's backward makes of it depends on the operands.
    """

    @staticmethod
    def forward(ctx, tail, *tensors):
        operands, needed = Operands(*tensors), Operands(*ctx.needs_input_grad[1:])
        add, next_input = tail.add, tail.next_input
        num_saved = 0
        if next_input is not None and next_input.norm is not None and tail.is_recorded and any(needed):
            num_saved = next_input.num_with_gradient(operands.residual.shape[0])
        results, ctx.context = tail.kernels.fused_add_fwd(operands, add, next_input, num_saved, tail.in_place)
        out = operands.residual if add is None else results.out
        norm_input = results.norm_input
        tail.saves_stream = norm_input is out
        ctx.node, (ctx.constants, data) = tail.node, registered.parted(add, next_input)
        if not tail.kernels.READS_INVERSES:
            data[1] = data[4] = None
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            operands.update if needed.gamma else None,
            operands.gamma if needed.update or needed.frozen_update else None,
            operands.weight if num_saved else None,
            results.out if add is not None and add.activation is not None else None,
            norm_input,
            results.mean,
            results.rstd,
            *data,
        )
        if tail.in_place:
            ctx.mark_dirty(operands.residual)
        if next_input is not None and next_input.detached is not None:
            detached = [results.frozen_next] if next_input.detached == "frozen" else [results.next, results.frozen_next]
            ctx.mark_non_differentiable(*(t for t in detached if t is not None))
        return out, results.next, results.frozen_next, None if norm_input is out else norm_input

    @staticmethod
    def backward(ctx, *douts):
        branch, gamma, weight, out, norm_input, mean, rstd, *data = ctx.saved_tensors
        node, (add, next_input) = ctx.node, registered.joined(ctx.constants, data)
        twice = torch.is_grad_enabled()
        check_untransformed(*douts)
        with torch.no_grad():
            grads = node.kernels.fused_add_bwd(
                ctx.context,
                Operands(update=branch, gamma=gamma, weight=weight),
                Results(out, norm_input=norm_input, mean=mean, rstd=rstd),
                Results(*douts[:3]),
                add,
                next_input,
                Operands(*ctx.needs_input_grad[1:]),
                in_place=node.owns_gradient and not twice,
            )
        if node.previous is not None:
            node.previous.owns_gradient = node.owns_gradient or grads.residual is not douts[0]
        if twice:
            grads = differentiable_once(grads, (*douts, branch, gamma, weight, out, norm_input))
        return None, *grads


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
