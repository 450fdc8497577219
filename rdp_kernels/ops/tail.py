"""The autograd function over the kernels: the tail of one path and the head of the next are one node of the graph.

Its backward adds the gradient of the next branch's rows into the stream's; as separate functions each would write a
`[B, ...]` of its own for autograd to add.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..tail import Add, Next, Operands, Results


class Tail:
    """One call: what is computed, and who owns the stream.

    Args:
        kernels: the library, with `tail_fwd` and `tail_bwd`.
        add: how the branch is added; None if there is none.
        following: what the next branch gets; None if there is none.
        in_place: the caller owns `residual` and nobody else ever sees it: the sum overwrites it.
    """

    def __init__(self, kernels: ModuleType, add: Add | None, following: Next | None = None, in_place: bool = False):
        self.kernels, self.add, self.following, self.in_place = kernels, add, following, in_place
        self.owns_gradient = False
        """The gradient of the sum is written by a tail that nobody else sees: this one's backward may overwrite it."""

    def __call__(self, operands: Operands) -> Results:
        """Without `x_hat` and `rstd`."""
        return Results(*_Tail.apply(self, *operands))


class _Tail(torch.autograd.Function):
    """Saves what the wanted gradients need: the branch's learning rows for dγ, γ and the norm's weight to pass through,
    x̂ and rstd of the next rows, the sum where there is an activation. Differentiable once."""

    @staticmethod
    def forward(ctx, tail, *tensors):
        operands, needed = Operands(*tensors), Operands(*ctx.needs_input_grad[1:])
        add, following = tail.add, tail.following
        num_saved = 0
        if following is not None and following.norm is not None and any(needed):
            num_saved = _rows_with_gradient(following, operands.residual)
        results, ctx.context = tail.kernels.tail_fwd(operands, add, following, num_saved, tail.in_place)
        ctx.tail = tail
        ctx.set_materialize_grads(False)
        passes = needed.branch or needed.frozen
        saved = (
            operands.branch if needed.gamma else None,
            operands.gamma if passes else None,
            operands.weight if num_saved else None,
            results.out if add is not None and add.activation is not None else None,
            results.x_hat,
            results.rstd,
        )
        ctx.save_for_backward(*saved)
        if tail.in_place:
            ctx.mark_dirty(operands.residual)
        if following is not None and following.frozen_constant and results.frozen_next is not None:
            ctx.mark_non_differentiable(results.frozen_next)
        out = operands.residual if add is None else results.out
        return out, results.next, results.frozen_next

    @staticmethod
    def backward(ctx, *douts):
        branch, gamma, weight, out, x_hat, rstd = ctx.saved_tensors
        tail = ctx.tail
        twice = torch.is_grad_enabled()
        with torch.no_grad():
            grads = tail.kernels.tail_bwd(
                ctx.context,
                Operands(branch=branch, gamma=gamma, weight=weight),
                Results(out, x_hat=x_hat, rstd=rstd),
                Results(*douts),
                tail.add,
                tail.following,
                Operands(*ctx.needs_input_grad[1:]),
                in_place=tail.owns_gradient and not twice,
            )
        if twice:
            grads = _DifferentiableOnce.apply(*grads, *douts, branch, gamma, weight, out)[: len(grads)]
        return None, *grads


class _DifferentiableOnce(torch.autograd.Function):
    """The identity on gradients that depend on further tensors; raises when these ask for theirs."""

    @staticmethod
    def forward(ctx, *tensors):
        return tensors

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the kernels of rdp_kernels are differentiable once: for second derivatives run the forward and its "
            'backwards within rdp.use_backend("eager")'
        )


def _rows_with_gradient(following: Next, residual: Tensor | None) -> int:
    if following.rows is not None:
        return following.rows.num_learning if following.frozen_constant else following.rows.num_rows
    assert residual is not None
    return residual.shape[0]
