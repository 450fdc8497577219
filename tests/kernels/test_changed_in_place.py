"""Rows and factors that are overwritten between forward and backward, such as one buffer that all layers share."""

import contextlib
import gc
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import rdp_kernels as rdp
from rdp_kernels.kernels.autograd import fused_add
from rdp_kernels.kernels.spec import Add, NextInput, Operands, RowSet
from tests.conftest import DEVICE

from .cases import BACKENDS


class Leaves(list):
    """The leaves that were made so far."""

    def __call__(self, *shape):
        self.append(torch.randn(*shape, device=DEVICE, requires_grad=True))
        return self[-1]


def add(leaf, num_rows=4, **options):
    return rdp.residual_add(leaf(4, 3), leaf(num_rows, 3), gamma=leaf(3), **options)


def add_norm(leaf, num_rows=4, **options):
    out, normed = rdp.residual_add_norm(leaf(4, 3), leaf(num_rows, 3), leaf(3), **options)
    return out.sum() + normed.sin().sum()


def joint(leaf, changed, **by_name):
    """A path's add with the next one's input."""
    inverse = torch.tensor([2, 3, 0, 1], device=DEVICE)
    sets = {name: RowSet(torch.tensor([2, 3, 0], device=DEVICE), 2, inverse) for name in ("rows", "next_rows")}
    sets[changed] = replace(sets[changed], **by_name)
    operands = Operands(leaf(4, 3), leaf(2, 3), leaf(1, 3), leaf(3), leaf(3))
    return sum(
        r.sin().sum()
        for r in fused_add("path", operands, Add(sets["rows"], 1.5), NextInput(sets["next_rows"], "rms"))[:3]
    )


INPLACE = "modified by an inplace operation"
FACTORS, ROWS, INVERSE = [1.5, 0.0, 2.0, 1.0], [3, 1, 2], [2, 3, 0, 1]
CALLS = {
    "row_scale": (lambda leaf, data: rdp.residual_add(leaf(4, 3), leaf(4, 3), row_scale=data), FACTORS),
    "row_scale, gamma": (lambda leaf, data: add(leaf, row_scale=data), FACTORS),
    "row_scale, relu": (lambda leaf, data: add(leaf, row_scale=data, activation="relu"), FACTORS),
    "row_scale of rows": (
        lambda leaf, data: add(leaf, 3, rows=torch.tensor(ROWS, device=DEVICE), row_scale=data),
        FACTORS[:3],
    ),
    "rows": (lambda leaf, data: add(leaf, 3, rows=data), ROWS),
    "gathered rows": (lambda leaf, data: rdp.gather_rows(leaf(4, 3), data), ROWS),
    "row_scale before a norm": (lambda leaf, data: add_norm(leaf, row_scale=data), FACTORS),
    "rows before a norm": (lambda leaf, data: add_norm(leaf, 3, rows=data), ROWS),
    "next_rows": (lambda leaf, data: add_norm(leaf, next_rows=data), ROWS),
    "index of a path": (lambda leaf, data: joint(leaf, "rows", index=data), ROWS),
    "index of the next path": (lambda leaf, data: joint(leaf, "next_rows", index=data), ROWS),
    "inverse of a path": (lambda leaf, data: joint(leaf, "rows", inverse=data), INVERSE),
    "inverse of the next path": (lambda leaf, data: joint(leaf, "next_rows", inverse=data), INVERSE),
}
EACH = pytest.mark.parametrize("name", CALLS)
EACH_BACKEND = pytest.mark.parametrize("backend", ["auto", "eager", *BACKENDS])


def run(backend, name):
    """The result, the leaves, and the tensor that is to change."""
    torch.manual_seed(0)
    call, values = CALLS[name]
    leaves, data = Leaves(), torch.tensor(values, device=DEVICE)
    with rdp.use_backend(backend):
        return call(leaves, data).sum(), leaves, data


@EACH_BACKEND
@EACH
def test_the_backward_raises(backend, name):
    out, _, data = run(backend, name)
    data.zero_()
    is_eager = backend == "eager" or (backend == "auto" and DEVICE == "cpu" and rdp.available_backends()["native"])
    read = "inverse" not in name or not is_eager
    with pytest.raises(RuntimeError, match=INPLACE) if read else contextlib.nullcontext():
        out.backward()


@EACH_BACKEND
@EACH
def test_hooks_keep_it_elsewhere(backend, name):
    """With `save_on_cpu` and checkpointing the backward gets the values that they kept."""
    grads = []
    for pack in (lambda t: t, torch.clone):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out, leaves, data = run(backend, name)
        if pack is torch.clone:
            data.zero_()
        grads.append(torch.autograd.grad(out, leaves))
    assert all(map(torch.equal, *grads))


@EACH_BACKEND
@EACH
def test_is_let_go_with_the_graph(backend, name):
    """Even if the result is kept."""
    out, leaves, data = run(backend, name)
    storage = StorageWeakRef(data.untyped_storage())
    del data
    out.backward()
    gc.collect()  # Triton's interpreter makes cycles
    assert storage.expired()
    assert all(leaf.grad is not None for leaf in leaves)


@EACH_BACKEND
def test_a_buffer_that_nothing_reads_any_more(backend):
    """One buffer for all layers works as long as each backward runs before the next forward."""
    mask = torch.ones(4, device=DEVICE)
    with rdp.use_backend(backend):
        for values in (FACTORS, FACTORS[::-1]):
            mask.copy_(torch.tensor(values))
            branch = torch.ones(4, 3, device=DEVICE, requires_grad=True)
            rdp.residual_add(torch.ones(4, 3, device=DEVICE), branch, row_scale=mask).sum().backward()
            assert branch.grad[:, 0].tolist() == values


@pytest.mark.parametrize("compiled", [False, True])
@EACH_BACKEND
def test_results_that_are_changed_in_place(backend, compiled):
    """The residual and the next rows may change as in torch's own formula."""
    x, update, weight = (torch.randn(*shape, device=DEVICE, requires_grad=True) for shape in ((4, 3), (2, 3), (3,)))
    rows, next_rows = torch.tensor([3, 1], device=DEVICE), torch.tensor([0, 3, 2], device=DEVICE)

    def changed(x, update, weight):
        y = x * 2
        head = rdp.gather_rows(y, next_rows)
        y += 1
        head *= 3
        out, normed = rdp.residual_add_norm(y, update, weight, rows=rows, next_rows=next_rows)
        out *= 2
        normed += 1
        return out.sin().sum() + normed.square().sum() + head.sin().sum()

    def plain(x, update, weight):
        out = (x * 2 + 1).index_add(0, rows, update)
        normed = torch.nn.functional.layer_norm(out[next_rows], (3,), weight, None, 1e-6) + 1
        return (out * 2).sin().sum() + normed.square().sum() + (x[next_rows] * 6).sin().sum()

    leaves = x, update, weight
    if compiled:
        torch._dynamo.reset()
        changed = torch.compile(changed, backend="aot_eager", fullgraph=True)
    with rdp.use_backend(backend):
        loss = changed(*leaves)
        found = loss, *torch.autograd.grad(loss, leaves)
    loss = plain(*leaves)
    torch.testing.assert_close(found, (loss, *torch.autograd.grad(loss, leaves)))
