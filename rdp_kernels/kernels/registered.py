"""The kernels as registered ops, `rdp::fused_add` and its backward: what `torch.compile` and export put into a graph.

Schemas have no dataclasses, so a call is passed as the fields of `SpecTensors` and `SpecNumbers`. An absent result is
an empty tensor. Dtypes are passed by name: torch 2.11 passes a `ScalarType[]` as numbers where an op runs on fake
tensors.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .._utils.checks import is_transformed
from .buffers import (
    Context,
    empty_gradients,
    empty_results,
    joined_add,
    joined_next,
    known_context,
    make_context,
    parted_add,
    parted_next,
    symbolic_context_of,
)
from .dispatch import kernels_named
from .spec import Add, NextInput, Operands, Results, residual_of

_NAMES_BY_TYPE = {
    "str": ("library",),
    "bool": ("adds", "gives_next", "saves"),
    "int": ("channel_dim",),
    "SymInt": ("num_learning", "num_next_learning"),
    "float": ("scale", "eps"),
    "str?": ("activation", "norm", "detached"),
    "SymInt[]": ("shape",),
    "int[]": ("order",),
    "str[]": ("dtypes",),
    "bool[]": ("wanted",),
}
SpecTensors = namedtuple("SpecTensors", ("rows", "inverse", "row_scale", "next_rows", "next_inverse"))
"""The tensors in an `Add` and a `NextInput`."""
SpecNumbers = namedtuple(
    "SpecNumbers",
    "adds num_learning scale channel_dim activation gives_next num_next_learning norm eps detached",
)
"""All else in an `Add` and a `NextInput`, and whether the two are given."""
_TYPES = {name: kind for kind, names in _NAMES_BY_TYPE.items() for name in names}  # all others are "Tensor?"
_GRADIENTS = tuple(f"d{name}" for name in Results._fields[:3])
_SPEC = (*SpecTensors._fields, *SpecNumbers._fields)
_SAVED = ("update", "gamma", "weight", "bias", "out", "norm_input", "mean", "rstd")
_GEOMETRY = ("shape", "order", "dtypes")
# The arguments of the two ops, in order.
_FORWARD = ("library", *Operands._fields, *_SPEC, "saves")
_BACKWARD = ("library", *_GRADIENTS, *_SAVED, *_SPEC, *_GEOMETRY, "wanted")
_NAMES = {getattr(torch, name): name for name in ("float32", "float64", "bfloat16", "float16")}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
DIFFERENTIABLE_ONCE = (
    "the kernels of rdp_kernels are differentiable once: for second derivatives run the forward and its backwards, or "
    'export them, within rdp.use_backend("eager")'
)


def fused_add(library: str, operands: Operands, add: Add | None, next_input: NextInput | None) -> Results:
    """As `autograd.fused_add`, on the kernels of a library."""
    saves = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in operands)
    results = torch.ops.rdp.fused_add(library, *operands, *spell(add, next_input), saves)
    next_rows = None if next_input is None else next_input.rows
    return Results(
        out=operands.residual if add is None else results[0],
        next=None if next_input is None else results[1],
        frozen_next=None if next_rows is None or next_rows.num_frozen == 0 else results[2],
    )


def spell(add: Add | None, next_input: NextInput | None) -> tuple[Any, ...]:
    """A call as arguments of the ops."""
    (add_tensors, add_numbers), (next_tensors, next_numbers) = (
        parted_add(add or Add()),
        parted_next(next_input or NextInput()),
    )
    return *add_tensors, *next_tensors, add is not None, *add_numbers, next_input is not None, *next_numbers


def joined(tensors: Sequence[Any], numbers: Sequence[Any]) -> tuple[Add | None, NextInput | None]:
    """The inverse of `spell`."""
    n = SpecNumbers(*numbers)
    add = joined_add(tensors[:3], numbers[1:5]) if n.adds else None
    return add, joined_next(tensors[3:], numbers[6:]) if n.gives_next else None


def _schema(name: str, arguments: tuple[str, ...]) -> str:
    typed = ", ".join(f"{_TYPES.get(argument, 'Tensor?')} {argument}" for argument in arguments)
    return f"{name}({typed}) -> ({', '.join(['Tensor'] * len(Operands._fields))})"


class _Arguments(SimpleNamespace):
    """The arguments of an op by name."""

    def __init__(self, names: tuple[str, ...], values: tuple[Any, ...]):
        super().__init__(**dict(zip(names, values, strict=True)))

    def several(self, names: tuple[str, ...]) -> list[Any]:
        return [getattr(self, name, None) for name in names]

    @property
    def operands(self) -> Operands:
        return Operands(*self.several(Operands._fields))

    @property
    def spec(self) -> tuple[Add | None, NextInput | None]:
        return joined(self.several(SpecTensors._fields), self.several(SpecNumbers._fields))


def _fill(results: tuple[Any, ...], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if t is None else t for t in results)


def _num_saved(given: _Arguments) -> int:
    _, next_input = given.spec
    if not given.saves or next_input is None or next_input.norm is None:
        return 0
    return next_input.num_with_gradient(residual_of(given.operands).shape[0])


def _check_untransformed() -> None:
    if is_transformed():
        raise RuntimeError(
            "an exported or compiled graph with kernels of rdp_kernels in it has no forward-mode derivatives: export "
            'within rdp.use_backend("eager")'
        )


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    _check_untransformed()
    given = _Arguments(_FORWARD, arguments)
    operands, (add, next_input) = given.operands, given.spec
    results, _ = kernels_named(given.library).fused_add_fwd(operands, add, next_input, _num_saved(given))
    if next_input is not None and next_input.rows is None:
        results = results._replace(norm_input=None)  # it is the sum, and an op may not return a tensor twice
    return _fill(results, residual_of(operands))


def _forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = _Arguments(_FORWARD, arguments)
    operands, (add, next_input) = given.operands, given.spec
    context = symbolic_context_of(operands, given.norm)
    return _fill(empty_results(context, add, next_input, _num_saved(given)), residual_of(operands))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    given, results = _Arguments(_FORWARD, inputs), Results(*output)
    operands, residual = given.operands, residual_of(given.operands)
    context = symbolic_context_of(operands, given.norm)
    if given.gives_next and given.next_rows is None:
        results = results._replace(norm_input=results.out if given.adds else residual)
    ctx.library, ctx.numbers = given.library, given.several(SpecNumbers._fields)
    ctx.geometry = (
        list(context.shape),
        list(context.layout.order),
        [_NAMES[(residual if t is None else t).dtype] for t in operands],
    )
    ctx.save_for_backward(
        given.update if given.gamma is not None and given.gamma.requires_grad else None,
        given.gamma,
        given.weight,
        given.bias,
        results.out if given.activation is not None else None,
        *(results[3:] if _num_saved(given) else (None, None, None)),
        *given.several(SpecTensors._fields),
    )


def _backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors, numbers = ctx.saved_tensors, SpecNumbers(*ctx.numbers)
    saved, spec_tensors = dict(zip(_SAVED, tensors, strict=False)), tensors[len(_SAVED) :]
    _, next_input = joined(spec_tensors, numbers)
    wanted = Operands(*ctx.needs_input_grad[1 : len(Operands._fields) + 1])
    dout, dnext, dfrozen_next = gradients[:3]
    if next_input is None or next_input.detached == "all":
        dnext = dfrozen_next = None
    elif next_input.detached == "frozen" or next_input.rows is None or next_input.rows.num_frozen == 0:
        dfrozen_next = None
    if not numbers.adds:
        dout = None  # the residual isn't a result of the op
    passes = wanted.residual and saved["out"] is None and dnext is None and dfrozen_next is None
    grads = torch.ops.rdp.fused_add_backward(
        ctx.library, dout, dnext, dfrozen_next, *saved.values(), *spec_tensors, *numbers, *ctx.geometry,
        list(wanted._replace(residual=wanted.residual and not passes)),
    )  # fmt: skip
    found = [grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)]
    if passes:
        found[0] = dout  # an op may not return its argument
    return None, *found, *[None] * (len(_FORWARD) - 1 - len(found))


def _context_of_backward(given: _Arguments, make: Any) -> tuple[Context, Tensor]:
    """The forward's context, and any tensor of the call."""
    dtypes = [_DTYPES[name] for name in given.dtypes]
    like = next(t for t in given.several((*_GRADIENTS, *_SAVED)) if t is not None)
    compute = torch.float64 if torch.float64 in dtypes else torch.float32
    return make(tuple(given.shape), tuple(given.order), like.device, Operands(*dtypes), compute), like


def _run_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _check_untransformed()
    given = _Arguments(_BACKWARD, arguments)
    context, like = _context_of_backward(given, known_context)
    wanted = Operands(*given.wanted)
    dout, dnext, dfrozen_next = given.several(_GRADIENTS)
    results = Results(*given.several(Results._fields))
    grads = kernels_named(given.library).fused_add_bwd(
        context, given.operands, results, (dout, dnext, dfrozen_next), *given.spec, wanted
    )
    return _fill(tuple(g if w else None for g, w in zip(grads, wanted, strict=True)), like)


def _backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    given = _Arguments(_BACKWARD, arguments)
    context, like = _context_of_backward(given, make_context)
    wanted = Operands(*given.wanted)
    grads = empty_gradients(context, given.spec[0], wanted)
    if wanted.residual:
        grads = grads._replace(residual=context.empty(context.shape[0], context.dtypes.residual))
    return _fill(grads, like)


def _no_second_derivative(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    raise RuntimeError(DIFFERENTIABLE_ONCE)


_LIBRARY = torch.library.Library("rdp", "DEF")
_LIBRARY.define(_schema("fused_add", _FORWARD))
_LIBRARY.define(_schema("fused_add_backward", _BACKWARD))
_LIBRARY.impl("fused_add", _forward, "CompositeExplicitAutograd")
_LIBRARY.impl("fused_add_backward", _run_backward, "CompositeExplicitAutograd")
torch.library.register_fake("rdp::fused_add", _forward_fake)
torch.library.register_fake("rdp::fused_add_backward", _backward_fake)
torch.library.register_autograd("rdp::fused_add", _backward, setup_context=_setup_context)
torch.library.register_autograd("rdp::fused_add_backward", _no_second_derivative)
