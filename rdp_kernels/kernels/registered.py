"""The kernels as registered ops, `rdp::fused_add` and its backward: what `torch.compile` and export put into a graph.

Schemas know no dataclasses: `_spell` and `_read` turn a call into a flat list of arguments and back. A tensor that
there isn't is an empty one among the results. Dtypes go by name: torch 2.11 hands a `ScalarType[]` over as numbers,
where an op runs on fake tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import is_transformed
from .buffers import Context, context_of, empty_gradients, empty_results
from .dispatch import kernels_named
from .layout import Layout
from .spec import Add, NextInput, Operands, Results, RowSet

_OPERANDS = "Tensor? residual, Tensor? branch, Tensor? frozen, Tensor? gamma, Tensor? weight, Tensor? bias"
_SPEC = (
    "bool adds, Tensor? rows, Tensor? inverse, SymInt num_learning, Tensor? row_scale, float scale, int channel_dim, "
    "str? activation, bool follows, Tensor? next_rows, Tensor? next_inverse, SymInt num_next_learning, str? norm, "
    "float eps, str? detached"
)
_FORWARD = (
    f"fused_add(str library, {_OPERANDS}, {_SPEC}, bool saves) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_BACKWARD = (
    "fused_add_backward(str library, Tensor? dout, Tensor? dnext, Tensor? dfrozen_next, Tensor? branch, Tensor? gamma, "
    f"Tensor? weight, Tensor? bias, Tensor? out, Tensor? norm_input, Tensor? mean, Tensor? rstd, {_SPEC}, "
    "SymInt[] shape, int[] order, str[] dtypes, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_NUM_OPERANDS, _NUM_SPEC = 6, 15
_TENSORS = (1, 2, 4, 9, 10)  # of a call, in its list of arguments
_DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DIFFERENTIABLE_ONCE = (
    "the kernels of rdp_kernels are differentiable once: for second derivatives run the forward and its backwards, or "
    'export them, within rdp.use_backend("eager")'
)
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def fused_add(library: str, operands: Operands, add: Add | None, next_input: NextInput | None) -> Results:
    """As `fused_add`, on the kernels of a library."""
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    results = torch.ops.rdp.fused_add(library, *operands, *_spell(add, next_input), saves)
    next_rows = None if next_input is None else next_input.rows
    return Results(
        out=operands.residual if add is None else results[0],
        next=None if next_input is None else results[1],
        frozen_next=None if next_rows is None or next_rows.num_frozen == 0 else results[2],
    )


def _spell(add: Add | None, next_input: NextInput | None) -> tuple[Any, ...]:
    given_add, given_next = add or Add(), next_input or NextInput()
    return (
        add is not None,
        *_spell_rows(given_add.rows),
        given_add.row_scale,
        given_add.scale,
        given_add.channel_dim,
        given_add.activation,
        next_input is not None,
        *_spell_rows(given_next.rows),
        given_next.norm,
        given_next.eps,
        given_next.detached,
    )


def _spell_rows(rows: RowSet | None) -> tuple[Tensor | None, Tensor | None, int]:
    return (None, None, 0) if rows is None else (rows.index, rows.inverse, rows.num_learning)


def _read(spec: Sequence[Any]) -> tuple[Add | None, NextInput | None]:
    adds, rows, inverse, num_learning, row_scale, scale, channel_dim, activation = spec[:8]
    follows, next_rows, next_inverse, num_next_learning, norm, eps, detached = spec[8:]
    row_set = None if rows is None else RowSet(rows, num_learning, inverse)
    next_row_set = None if next_rows is None else RowSet(next_rows, num_next_learning, next_inverse)
    add = Add(row_set, scale, row_scale, channel_dim, activation) if adds else None
    return add, NextInput(next_row_set, norm, eps, detached) if follows else None


def parted(add: Add | None, next_input: NextInput | None) -> tuple[list[Any], list[Tensor | None]]:
    """The numbers of a call, and its tensors: rows, their inverse, row_scale; and of the next rows."""
    spec = list(_spell(add, next_input))
    tensors = [spec[place] for place in _TENSORS]
    for place in _TENSORS:
        spec[place] = None
    return spec, tensors


def joined(constants: list[Any], tensors: Sequence[Tensor | None]) -> tuple[Add | None, NextInput | None]:
    """The call that was `parted`."""
    spec = list(constants)
    for place, tensor in zip(_TENSORS, tensors, strict=True):
        spec[place] = tensor
    return _read(spec)


def _fill(results: tuple[Any, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if t is None else t for t in results)


def _forward_arguments(arguments: tuple[Any, ...]) -> tuple[Operands, Add | None, NextInput | None, int, Tensor]:
    operands = Operands(*arguments[:_NUM_OPERANDS])
    add, next_input = _read(arguments[_NUM_OPERANDS:-1])
    stream = operands.update if operands.residual is None else operands.residual
    saves = arguments[-1] and next_input is not None and next_input.norm is not None
    num_saved = next_input.num_with_gradient(stream.shape[0]) if saves and next_input is not None else 0
    return operands, add, next_input, num_saved, stream


def _check_untransformed() -> None:
    if is_transformed():
        raise RuntimeError(
            "an exported or compiled graph with kernels of rdp_kernels in it has no forward-mode derivatives: export "
            'within rdp.use_backend("eager")'
        )


def _forward(library: str, *arguments: Any) -> tuple[Tensor, ...]:
    _check_untransformed()
    operands, add, next_input, num_saved, stream = _forward_arguments(arguments)
    results, _ = kernels_named(library).fused_add_fwd(operands, add, next_input, num_saved)
    if next_input is not None and next_input.rows is None:
        results = results._replace(norm_input=None)  # it is the stream, and an op may not return a tensor twice
    return _fill(results, stream)


def _forward_fake(library: str, *arguments: Any) -> tuple[Tensor, ...]:
    operands, add, next_input, num_saved, stream = _forward_arguments(arguments)
    context = context_of(operands, None if next_input is None else next_input.norm, None)
    return _fill(empty_results(context, add, next_input, num_saved), stream)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.library, *arguments = inputs
    operands, add, next_input, num_saved, stream = _forward_arguments(tuple(arguments))
    context = context_of(operands, None if next_input is None else next_input.norm, None)
    ctx.geometry = (
        list(context.shape),
        list(context.layout.order),
        [_NAMES[(stream if t is None else t).dtype] for t in operands],
    )
    norm_input, mean, rstd = output[3:]
    if next_input is not None and next_input.rows is None:
        norm_input = stream if add is None else output[0]
    spec = arguments[_NUM_OPERANDS:-1]
    ctx.spec = [None if isinstance(value, Tensor) else value for value in spec]
    ctx.save_for_backward(
        operands.update if operands.gamma is not None and operands.gamma.requires_grad else None,
        *operands[3:],
        output[0] if add is not None and add.activation is not None else None,
        *((norm_input, mean, rstd) if num_saved else (None, None, None)),
        *(value if isinstance(value, Tensor) else None for value in spec),
    )


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    branch, gamma, weight, bias, out, norm_input, mean, rstd, *spec_tensors = ctx.saved_tensors
    spec = tuple(value if t is None else t for value, t in zip(ctx.spec, spec_tensors, strict=True))
    add, next_input = _read(spec)
    wanted = list(ctx.needs_input_grad[1 : _NUM_OPERANDS + 1])
    dout, dnext, dfrozen_next = gradients[:3]
    if next_input is None or next_input.detached == "all":
        dnext = dfrozen_next = None
    elif next_input.detached == "frozen" or next_input.rows is None or next_input.rows.num_frozen == 0:
        dfrozen_next = None
    if add is None:
        dout = None  # the stream went past the op
    passes = wanted[0] and out is None and dnext is None and dfrozen_next is None
    grads = torch.ops.rdp.fused_add_backward(
        ctx.library, dout, dnext, dfrozen_next, branch, gamma, weight, bias, out, norm_input, mean, rstd,
        *spec, *ctx.geometry, [False, *wanted[1:]] if passes else wanted,
    )  # fmt: skip
    found = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)]
    if passes:
        found[0] = dout  # an op may not return its argument
    return None, *found, *[None] * (_NUM_SPEC + 1)


def _backward_arguments(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    gradients, operands = Results(*arguments[:3]), Operands(None, arguments[3], None, *arguments[4:7])
    results = Results(out=arguments[7], norm_input=arguments[8], mean=arguments[9], rstd=arguments[10])
    add, next_input = _read(arguments[11:-4])
    shape, order, names, wanted = arguments[-4:]
    dtypes = [_DTYPES[name] for name in names]
    like = next(t for t in (*gradients, *operands) if t is not None)
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    context = Context(torch.Size(shape), like.device, Layout(tuple(order)), compute, Operands(*dtypes))
    return context, operands, results, gradients, add, next_input, Operands(*wanted), like


def _run_backward(library: str, *arguments: Any) -> tuple[Tensor, ...]:
    _check_untransformed()
    *call, like = _backward_arguments(arguments)
    grads = kernels_named(library).fused_add_bwd(*call)
    return _fill(tuple(g if w else None for g, w in zip(grads, call[-1], strict=True)), like)


def _backward_fake(library: str, *arguments: Any) -> tuple[Tensor, ...]:
    context, _, _, _, add, _, wanted, like = _backward_arguments(arguments)
    grads = empty_gradients(context, add, wanted)
    if wanted.residual:
        grads = grads._replace(residual=context.empty(context.shape[0], context.dtypes.residual))
    return _fill(grads, like)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(DIFFERENTIABLE_ONCE)


_LIBRARY = torch.library.Library("rdp", "DEF")
_LIBRARY.define(_FORWARD)
_LIBRARY.define(_BACKWARD)
_LIBRARY.impl("fused_add", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("fused_add_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rdp::fused_add", _forward_fake)
torch.library.register_fake("rdp::fused_add_backward", _backward_fake)
torch.library.register_autograd("rdp::fused_add", _backward, setup_context=_setup_context)
torch.library.register_autograd("rdp::fused_add_backward", _no_second_derivative)
