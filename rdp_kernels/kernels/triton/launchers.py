"""The launchers: `fused_add_fwd` and `fused_add_bwd` find the prepared call by its key, and run it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from ..buffers import Context
from ..spec import Add, Gradients, NextInput, Operands, Results, residual_of
from .backward import Backward, backwards
from .forward import Forward, forwards, inversion, prepare_forward
from .keys import backward_key, forward_key, named_backward, named_forward


@contextlib.contextmanager
def nothing_prepared() -> Iterator[None]:
    """Starts and ends with no prepared calls, for tests and tuning, which change launch numbers within the block."""
    _forget()
    try:
        yield
    finally:
        _forget()


def _forget() -> None:
    forwards.clear()
    backwards.clear()
    inversion.cache_clear()


def fused_add_fwd(
    operands: Operands,
    add: Add | None,
    next_input: NextInput | None,
    num_saved: int = 0,
    in_place: bool = False,
    batch_size: int | None = None,
) -> tuple[Results, Context]:
    """Adds an update to the residual, gathers the next branch's rows, or both.

    Args:
        operands: the tensors that the call computes with.
        add: how the update is added; None if nothing is added.
        next_input: what the next branch gets; None if there is none.
        num_saved: how many leading rows of the next branch keep what the norm's backward needs. Without a list of rows
            `norm_input` is no copy: it is `out`, or the residual where nothing is added.
        in_place: the sum overwrites `operands.residual`, which must be dense; not possible with an activation.
        batch_size: the result's, needed where there is no residual.

    Returns:
        The results, and the context that the backward needs.
    """
    if batch_size is None:
        batch_size = residual_of(operands).shape[0]
    key = forward_key(operands, add, next_input, num_saved > 0, in_place, batch_size)
    prepared = forwards.get(key)
    if prepared is None:
        prepared = forwards.add(key, prepare_forward(named_forward(key)))
    if prepared.copies:
        operands, add = _copied(prepared.context, operands, add)
        return fused_add_fwd(operands, add, next_input, num_saved, in_place, batch_size)
    return prepared.run(operands, add, next_input, num_saved), prepared.context


def known_call(
    choice: str, operands: Operands, add: Add | None, next_input: NextInput | None, records: bool
) -> Forward | None:
    """What was prepared for an earlier call of this kind that was checked and that went to Triton under the same choice
    of a backend. `records`: whether autograd records the call."""
    prepared = forwards.get(_key_of_call(operands, add, next_input, records))
    return prepared if prepared is not None and choice in prepared.choices else None


def remember(choice: str, operands: Operands, add: Add | None, next_input: NextInput | None, records: bool) -> None:
    """Makes a call, which was checked and has run, known."""
    prepared = forwards.get(_key_of_call(operands, add, next_input, records))
    if prepared is not None:
        prepared.choices.add(choice)


def _key_of_call(operands: Operands, add: Add | None, next_input: NextInput | None, records: bool) -> tuple:
    batch_size = residual_of(operands).shape[0]
    saves = False
    if records and next_input is not None and next_input.norm is not None:
        saves = next_input.num_with_gradient(batch_size) > 0
    return forward_key(operands, add, next_input, saves, False, batch_size)


def fused_add_bwd(
    context: Context,
    operands: Operands,
    results: Results,
    gradients: Gradients,
    add: Add | None,
    next_input: NextInput | None,
    wanted: Operands,
    in_place: bool = False,
) -> Operands:
    """Computes the gradients of the operands.

    Args:
        context: the forward's.
        operands: `update` where dγ is wanted, `gamma` and `weight` where a gradient passes through them; else None.
        results: `out` where there is an activation, `norm_input`, `mean` and `rstd` where there is a norm.
        gradients: the gradients of `out`, `next` and `frozen_next`; None stands for zero.
        add: as in the forward.
        next_input: as in the forward.
        wanted: for each operand, whether its gradient is wanted.
        in_place: the residual's gradient may overwrite the gradient of `out`, which must be dense.

    Returns:
        The wanted gradients. None stands for zero.
    """
    dout, dnext, dfrozen_next = gradients
    if dnext is None:
        if dout is None and dfrozen_next is None:
            return Operands()
        if wanted.weight or wanted.bias:
            wanted = wanted._replace(weight=False, bias=False)
    given = dout, _of_some_rows(dnext), _of_some_rows(dfrozen_next)
    in_place = in_place and dout is not None
    if add is None and (next_input is None or next_input.norm is None):
        return Operands(residual=_scattered(context, given, next_input, in_place))
    key = backward_key(context, operands, results, given, add, next_input, wanted, in_place)
    prepared = backwards.get(key)
    if prepared is None:
        prepared = backwards.add(key, Backward(named_backward(key)))
    if prepared.copies:
        dense = _conformed(context, given[0]), _conformed(context, given[1]), _conformed(context, given[2])
        saved, add = _copied(context, operands, add)
        results = Results(
            out=_conformed(context, results.out),
            norm_input=_conformed(context, results.norm_input),
            mean=_dense(results.mean),
            rstd=_dense(results.rstd),
        )
        in_place = in_place and dense[0] is dout
        return fused_add_bwd(context, saved, results, dense, add, next_input, wanted, in_place)
    return prepared.run(operands, results, given, add, next_input)


def _scattered(context: Context, given: tuple, next_input: NextInput | None, in_place: bool) -> Tensor | None:
    """The gradient of a residual from which rows were gathered: the forward of an add."""
    dout, dnext, dfrozen_next = given
    if next_input is None or (dnext is None and dfrozen_next is None):
        return dout
    dout = _conformed(context, dout)
    add, operands = Add(next_input.rows), Operands(dout, dnext, dfrozen_next)
    in_place = in_place and dout is given[0]
    return fused_add_fwd(operands, add, None, in_place=in_place, batch_size=context.shape[0])[0].out


def _of_some_rows(gradient: Tensor | None) -> Tensor | None:
    """None for a gradient of no rows."""
    return None if gradient is None or gradient.shape[0] == 0 else gradient


def _copied(context: Context, operands: Operands, add: Add | None) -> tuple[Operands, Add | None]:
    """The tensors of a call with dense samples and vectors, as kernels take them."""
    rows, vectors = operands[:3], operands[3:]
    operands = Operands(*(_conformed(context, t) for t in rows), *map(_dense, vectors))
    if add is not None and add.row_scale is not None:
        add = replace(add, row_scale=_dense(add.row_scale))
    return operands, add


def _conformed(context: Context, x: Tensor | None) -> Tensor | None:
    """As `Context.conform`, for empty tensors too: their strides are part of a key."""
    return None if x is None else context.layout.conform(x.resolve_neg())


def _dense(vector: Tensor | None) -> Tensor | None:
    if vector is None or (vector.stride() == (1,) and not vector.is_neg()):
        return vector
    return vector.new_empty(vector.shape).copy_(vector)
