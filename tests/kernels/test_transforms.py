"""Forward-mode AD, torch.func and vmap: kernels have no rules for them, and no derivative is silently lost."""

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import func
from torch.autograd import forward_ad
from torch.autograd.functional import jacobian

import rdp_kernels as rdp
from tests.conftest import DEVICE

from . import ops
from .test_autograd import CALLS, LEARNING, run
from .values import operands_of, row_scale_of

PLAIN = ["eager", "auto"]
"""The backends that run in a transform."""
RULES = r'can\'t serve this call: within torch\.func transforms and forward-mode AD .*use_backend\("eager"\)'


def function_of(call):
    """An op as a function of its tensors, in float64, and the tensors."""
    op, case = CALLS[call]
    case = replace(case.in_float64(), shape=(2, 2, 2, 1) if "images" in call else (4, 3))
    operands, row_scale = operands_of(case), row_scale_of(case)
    if case.activation == "relu":  # finite differences don't work at the bend
        operands.residual.data[operands.residual == 0] = 1.0

    def function(*tensors):
        with patch.object(ops, "row_scale_of", lambda _: row_scale):  # a vmap draws nothing
            results = op(operands._replace(**dict(zip(case.operands, tensors, strict=True))), case)
        used = zip(results._fields, results, strict=True)
        return tuple(r for n, r in used if r is not None and (case.used is None or n in case.used))

    return function, [getattr(operands, name).detach() for name in case.operands]


def dual(function, tensors, tangents):
    with forward_ad.dual_level():
        outs = function(*map(forward_ad.make_dual, tensors, tangents))
        return [forward_ad.unpack_dual(out).tangent for out in outs]


TRANSFORMS = {
    "forward mode": lambda function, tensors: dual(function, tensors, tensors),
    "forward mode, vectorized": lambda function, tensors: jacobian(
        lambda x: function(x, *tensors[1:])[0], tensors[0], strategy="forward-mode", vectorize=True
    ),
    "jvp": lambda function, tensors: func.jvp(function, tuple(tensors), tuple(tensors)),
    "grad": lambda function, tensors: func.grad(lambda *t: function(*t)[0].sum())(*tensors),
    "vmap": lambda function, tensors: func.vmap(lambda x: function(x, *tensors[1:]), randomness="same")(
        tensors[0][None]
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("learns", [False, True])
def test_a_backend_by_name_says_what_to_do(backend, call, transform, learns):
    function, tensors = function_of(call)
    tensors = [t.requires_grad_(learns) for t in tensors]
    if "vectorized" in transform and "drop_path" in call:
        pytest.skip("torch draws nothing within the vmap of forward mode, and says so")
    with pytest.raises(RuntimeError, match=RULES):
        TRANSFORMS[transform](function, tensors)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("call", LEARNING)
def test_tangents_against_differences(backend, call):
    """Also of a vmap over tangents."""
    function, tensors = function_of(call)
    tensors = [t.requires_grad_() for t in tensors]
    options = dict(
        check_backward_ad=False, check_undefined_grad=False, check_batched_forward_grad="drop_path" not in call
    )
    with rdp.use_backend(backend):
        assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, **options)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("call", CALLS)
def test_transforms_agree_with_the_backward(backend, call):
    """The backward treats frozen and detached rows as such."""
    function, tensors = function_of(call)

    def loss(*tensors):
        return sum(out.sin().sum() for out in function(*tensors))

    leaves = [t.clone().requires_grad_() for t in tensors]
    places = tuple(range(len(leaves)))
    with rdp.use_backend("eager"):
        grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        seconds = [torch.autograd.grad(g.sin().sum(), leaves, retain_graph=True, allow_unused=True) for g in grads]
    with rdp.use_backend(backend):
        torch.testing.assert_close(func.grad(loss, places)(*tensors), grads)
        torch.testing.assert_close(func.jacrev(loss, places)(*tensors), grads)
        torch.testing.assert_close(func.jacfwd(loss, places, randomness="same")(*tensors), grads)
        tangents = tuple(map(torch.randn_like, tensors))
        along = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
        torch.testing.assert_close(func.jvp(loss, tuple(tensors), tangents)[1], along)
        torch.testing.assert_close(sum(dual(lambda *t: [loss(*t)], tensors, tangents)), along)
        for i in places:
            nested = func.grad(lambda *t, i=i: func.grad(loss, i)(*t).sin().sum(), places)(*tensors)
            expected = [torch.zeros_like(t) if s is None else s for s, t in zip(seconds[i], tensors, strict=True)]
            torch.testing.assert_close(nested, tuple(expected))
        hessian = func.jacfwd(func.jacrev(loss), randomness="same")
        torch.testing.assert_close(hessian(*tensors), func.jacrev(func.jacrev(loss))(*tensors))


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("call", CALLS)
def test_vmap_is_a_loop(backend, call):
    """For the op and its gradients."""
    function, tensors = function_of(call)
    several = [torch.stack([t, 2 * t, t.cos()]) for t in tensors]
    places = tuple(range(len(tensors)))

    def grads(*tensors):
        return func.grad(lambda *t: sum(out.sin().sum() for out in function(*t)), places)(*tensors)

    with rdp.use_backend(backend):
        for each in (function, grads):
            expected = [torch.stack(t) for t in zip(*(each(*(t[i] for t in several)) for i in range(3)), strict=True)]
            torch.testing.assert_close(func.vmap(each, randomness="same")(*several), tuple(expected))


@pytest.mark.parametrize("backend", PLAIN)
def test_vmap_over_rows(backend):
    """Values of rows can't be checked in a vmap."""
    x, branch = torch.randn(4, 3, device=DEVICE), torch.randn(2, 3, device=DEVICE)
    rows = torch.tensor([[0, 1], [3, 0], [2, 3]], device=DEVICE)
    scale = torch.tensor([[0.0, 1.0], [1.5, 0.0], [2.0, 2.0]], device=DEVICE)

    def function(rows, scale):
        out = rdp.residual_add(x, branch, rows=rows, row_scale=scale)
        return (*rdp.residual_add_norm(out, branch, None, rows=rows, next_rows=rows), rdp.gather_rows(out, rows))

    with rdp.use_backend(backend):
        expected = [torch.stack(t) for t in zip(*map(function, rows, scale), strict=True)]
        torch.testing.assert_close(func.vmap(function)(rows, scale), tuple(expected))


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["is_grads_batched", "vmap", "forward mode", "func.grad"])
def test_transforms_of_a_backward_alone(backend, call, kind):
    """The backward of a graph that kernels recorded is right, or its error says what to do."""
    outs, incoming, leaves = [], [], []
    for name in ("eager", backend):
        with rdp.use_backend(name):
            results, operands = run(*CALLS[call])
        leaves.append([t for t in operands if t is not None])
        outs.append(list(results.values()))
    incoming = [torch.randn(3, *out.shape, device=DEVICE) for out in outs[0]]

    def backward(which, incoming, **options):
        found = torch.autograd.grad(
            outs[which], leaves[which], incoming, retain_graph=True, allow_unused=True, **options
        )
        return tuple(g for g in found if g is not None)

    def transformed(which):
        if kind == "is_grads_batched":
            return backward(which, incoming, is_grads_batched=True)
        if kind == "vmap":
            return func.vmap(lambda *d: backward(which, d))(*incoming)
        first = [d[0] for d in incoming]
        if kind == "forward mode":
            return tuple(dual(lambda *d: backward(which, d), first, first))
        return func.grad(lambda *d: sum(g.sum() for g in backward(which, d, create_graph=True)), (0,))(*first)

    expected = transformed(0)
    try:
        torch.testing.assert_close(transformed(1), expected)
    except RuntimeError as error:
        if 'use_backend("eager")' not in str(error):
            raise
