"""The kernels as autograd sees them."""

import contextlib
import gc
import weakref
from dataclasses import replace
from itertools import combinations

import pytest
import torch

import rdp_kernels as rdp

from . import ops
from .budget import check, gradients, same
from .cases import Case
from .tiles import cut
from .values import douts_of, operands_of

ROWS = Case((4, 2, 3), rows=(2, 0), row_scale="tensor", gamma=True)
NORMED = replace(ROWS, gives_next=True, next_rows=(1, 2, 3), norm="layer", weight=True, bias=True, eps=0.1)
MIXED = replace(NORMED, rows=(2, 0, 3), num_learning=1, row_scale=1 / 0.7, num_next_learning=2)
CALLS = {
    "residual_add": (ops.residual_add, replace(ROWS, rows=None)),
    "residual_add of rows": (ops.residual_add, ROWS),
    "residual_add without gamma": (ops.residual_add, Case((3, 4), row_scale=1 / 0.7)),
    "residual_add of images, relu": (
        ops.residual_add,
        Case((2, 3, 2, 2), gamma=True, channel_dim=1, activation="relu"),
    ),
    "gather_rows": (ops.gather_rows, Case((4, 3), adds=False, gives_next=True, next_rows=(3, 1), used=("next",))),
    "layer norm": (ops.residual_add_norm, NORMED),
    "rms norm": (ops.residual_add_norm, replace(NORMED, rows=None, next_rows=None, norm="rms", bias=False)),
    "norm without vectors": (ops.residual_add_norm, replace(NORMED, gamma=False, weight=False, bias=False)),
    "drop_path": (ops.drop_path, Case((5, 3), residual=False, drop_prob=0.3, seed=1)),
    "drop_path_add": (ops.drop_path_add, Case((5, 3), drop_prob=0.3, gamma=True, seed=1)),
    "joint, layer norm": (ops.joint, MIXED),
    "joint, rms norm": (ops.joint, replace(MIXED, norm="rms", bias=False, next_rows=None, num_next_learning=None)),
    "joint, no norm": (ops.joint, replace(MIXED, norm=None, weight=False, bias=False)),
    "joint, detached": (ops.joint, replace(MIXED, detached="frozen")),
    "joint, head": (ops.joint, replace(MIXED, adds=False, rows=None, num_learning=None, gamma=False)),
}
EACH = pytest.mark.parametrize(("op", "case"), CALLS.values(), ids=CALLS)


def run(op, case):
    """The results that have a gradient, and the operands."""
    operands = operands_of(case)
    results = op(operands, case)
    used = {name: r for name, r in results._asdict().items() if r is not None and r.requires_grad}
    return {name: r for name, r in used.items() if case.used is None or name in case.used}, operands


# Finite differences include a frozen row's effect on a vector; its gradient doesn't.
LEARNING = [call for call in CALLS if "joint" not in call]
FROZEN = ["joint, layer norm", "joint, no norm", "joint, detached", "joint, head"]
TENSORS = ("residual", "update", "frozen_update")


@pytest.mark.parametrize("call", [*LEARNING, *FROZEN, "layer norm, wide"])
def test_gradcheck(backend, call):
    """Against finite differences, with each incoming gradient missing in turn."""
    case = CALLS[call.removesuffix(", wide")][1].in_float64(tiles="wide" if "wide" in call else "tuned")
    case = replace(case, shape=(1, 2, 2, 1) if "images" in call else (4, 3), wanted=TENSORS if call in FROZEN else None)
    if "wide" in call:
        case = replace(case, wanted=("residual", "weight"))
    op = CALLS[call.removesuffix(", wide")][0]
    operands = operands_of(case)
    if case.activation == "relu":  # finite differences don't work at the bend
        operands.residual.data[operands.residual == 0] = 1.0

    def differentiable(*leaves):
        results = op(operands._replace(**dict(zip(case.operands, leaves, strict=True))), case)
        named = zip(results._fields, results, strict=True)
        return tuple(r for n, r in named if r is not None and r.requires_grad and (case.used is None or n in case.used))

    with cut(case.tiles):
        assert torch.autograd.gradcheck(differentiable, [getattr(operands, n) for n in case.operands], fast_mode=False)


ALONE = [
    (call, pair) for call, (_, case) in CALLS.items() for count in (1, 2) for pair in combinations(case.operands, count)
]


@pytest.mark.parametrize(
    ("call", "wanted"), ALONE, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_gradients_of_some_operands(backend, call, wanted):
    op, case = CALLS[call]
    check(replace(case, wanted=wanted), op)


@EACH
def test_sum_backward(backend, op, case):
    """Its gradient is one number, expanded; so is that of a mean over a dimension."""
    results, operands = run(op, case)
    leaves = [t for t in operands if t is not None]
    for name, result in results.items():
        whole = torch.autograd.grad(result.sum(), leaves, retain_graph=True, allow_unused=True)
        of_rows = torch.autograd.grad(result.mean(0).sum(), leaves, retain_graph=True, allow_unused=True)
        for part, dense in ((whole, torch.ones_like(result)), (of_rows, torch.full_like(result, 1 / len(result)))):
            expected = torch.autograd.grad(result, leaves, dense, retain_graph=True, allow_unused=True)
            assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(part, expected, strict=True)), (
                name
            )


@EACH
def test_a_graph_that_is_kept(backend, op, case):
    """Its second backward gives the same bits, and `.grad` then holds the sum."""
    results, operands = run(op, case)
    leaves = [t for t in operands if t is not None]
    loss = sum(result.square().sum() for result in results.values())
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(leaf.grad, 2 * grad) for leaf, grad in zip(leaves, once, strict=True))


@pytest.mark.parametrize(
    "call", ["residual_add of rows", "residual_add of images, relu", "layer norm", "joint, rms norm"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_sums_have_the_same_bits_every_time(backend, call, dtype):
    """Several programs add to each sum."""
    op, case = CALLS[call]
    case = replace(case, shape=(5, *case.shape[1:-1], 67), dtypes=(dtype,) * 4)
    found = []
    with cut("small"):
        for _ in range(2):
            operands = operands_of(case)
            results = op(operands, case)
            found.append([*results, *gradients(results, operands, douts_of(case, results))])
    assert all(a is b is None or same(a, b) for a, b in zip(*found, strict=True))


@EACH
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_without_grad(backend, op, case, without):
    operands = operands_of(case)
    with without():
        results = op(operands, case)
    expected = op(operands, case)
    for name, result, with_grad in zip(results._fields, results, expected, strict=True):
        if result is not None and result is not operands.residual:
            assert result.grad_fn is None
            torch.testing.assert_close(result, with_grad.detach(), msg=name)


HEAD = replace(CALLS["joint, head"][1], next_rows=None, num_next_learning=None)


@pytest.mark.parametrize("changed", ["residual", "out"])
@pytest.mark.parametrize("call", ["residual_add_norm", "head"])
def test_a_residual_that_a_norm_saw_may_not_change(backend, call, changed):
    """As with torch's norm the residual itself is saved, and autograd notices the change."""
    op, case = {"residual_add_norm": CALLS["rms norm"], "head": (ops.joint, HEAD)}[call]
    operands = operands_of(case)
    operands = operands._replace(residual=operands.residual * 1)
    results = op(operands, case)
    with torch.no_grad():
        getattr(results if changed == "out" else operands, changed).mul_(2)
    if call == "residual_add_norm" and changed == "residual":
        results.next.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            results.next.sum().backward()


def test_rows_that_a_norm_saw_are_a_copy(backend):
    """The residual may change."""
    op, case = CALLS["layer norm"]
    found = []
    for factor in (1, 2):
        operands = operands_of(case)
        results = op(operands, case)
        with torch.no_grad():
            results.out.mul_(factor)
        found.append(torch.autograd.grad(results.next.square().sum(), [t for t in operands if t is not None]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@EACH
def test_no_reference_cycle_keeps_results(backend, op, case):
    """Nor where a result is saved for the backward."""
    results = run(op, case)[0]
    graph = [weakref.ref(result) for result in results.values()]
    assert graph
    gc.disable()
    try:
        del results
        assert [alive() for alive in graph] == [None] * len(graph)
    finally:
        gc.enable()


def raises_or_is_right(second, eager_second, backend, case):
    """Calls `second`. Where torch's own norm runs after the kernels, second derivatives that need only that norm are
    right."""
    if backend == "native" and case.norm is not None:
        with contextlib.suppress(RuntimeError):
            torch.testing.assert_close(second(), eager_second())
            return
    with pytest.raises(RuntimeError, match=r'differentiable once.*use_backend\("eager"\)'):
        second()


@EACH
def test_double_backward_of_the_incoming_gradient(backend, op, case):
    runs = [run(op, case)]
    with rdp.use_backend("eager"):
        runs.append(run(op, case))
    for name, result in runs[0][0].items():
        dout = torch.randn_like(result).requires_grad_()
        grads = [
            torch.autograd.grad(
                results[name], [t for t in leaves if t is not None], dout, create_graph=True, allow_unused=True
            )
            for results, leaves in runs
        ]
        for grad, eager_grad in zip(*grads, strict=True):
            if grad is not None:
                seconds = [
                    lambda grad=of, dout=dout: torch.autograd.grad(grad.sum(), dout, retain_graph=True)
                    for of in (grad, eager_grad)
                ]
                raises_or_is_right(*seconds, backend, case)


# Each gradient with the operands that it depends on, where the incoming gradient is a constant.
DEPENDS = [
    ("residual_add of rows", "update", ["gamma"]),
    ("residual_add of rows", "gamma", ["update"]),
    ("residual_add of images, relu", "gamma", ["update"]),
    ("drop_path_add", "update", ["gamma"]),
    ("layer norm", "residual", ["residual", "update", "gamma", "weight"]),
    ("layer norm", "update", ["residual", "update", "gamma", "weight"]),
    ("layer norm", "gamma", ["residual", "update", "gamma", "weight"]),
    ("layer norm", "weight", ["residual", "update", "gamma"]),
    ("norm without vectors", "residual", ["residual", "update"]),
    ("joint, layer norm", "frozen_update", ["residual", "frozen_update", "gamma", "weight"]),
    ("joint, head", "residual", ["residual", "weight"]),
]
PAIRS = [(call, grad_of, by) for call, grad_of, operands in DEPENDS for by in operands]


@pytest.mark.parametrize(("call", "grad_of", "by"), PAIRS)
@pytest.mark.parametrize("alone", [False, True], ids=["", "nothing else learns"])
def test_double_backward_of_an_operand(backend, call, grad_of, by, alone):
    """It raises rather than silently lose a term."""
    op, case = CALLS[call]
    if alone:
        case = replace(case, wanted=(grad_of, by))

    def second(name):
        with rdp.use_backend(name):
            results, operands = run(op, case)
        outs = list(results.values())
        (grad,) = torch.autograd.grad(
            outs, getattr(operands, grad_of), [torch.ones_like(o) for o in outs], create_graph=True
        )
        loss = grad.square().sum() + getattr(operands, by).sum()
        return torch.autograd.grad(loss, getattr(operands, by))

    raises_or_is_right(lambda: second(backend), lambda: second("eager"), backend, case)


def test_create_graph_alone_is_no_error(backend):
    """The first derivative is right, and gradients that don't depend on it work."""
    op, case = CALLS["layer norm"]
    results, operands = run(op, case)
    douts = douts_of(case, op(operands, case))
    leaves = [t for t in operands if t is not None]
    grads = torch.autograd.grad(list(results.values()), leaves, [douts.out, douts.next], create_graph=True)
    expected = gradients(op(operands, case), operands, douts)
    assert all(torch.equal(a, b) for a, b in zip(grads, [g for g in expected if g is not None], strict=True))
    operands.residual.square().sum().backward()
