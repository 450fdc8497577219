"""A chain of paths runs one kernel between two branches, in place. Its results equal those of single paths."""

import contextlib

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.kernels import autograd, dispatch
from rdp_kernels.kernels.triton import prepared

from .conftest import DEVICE

DIM, DEPTH, BATCH, TOKENS = 8, 4, 6, 3


@pytest.fixture(autouse=True)
def _kernels():
    with rdp.use_backend("triton"):
        yield


class Mlp(nn.Module):
    """`w · tanh(v · x)`; `bias`, if given, has a row per sample."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(DIM, 2 * DIM), nn.Linear(2 * DIM, DIM)

    def forward(self, x, bias=None):
        x = self.inner(x).tanh()
        return self.outer(x) if bias is None else self.outer(x) + bias


def sequence(depth=DEPTH, norm=nn.LayerNorm, **options):
    branches = [
        rdp.ResidualBranch(Mlp(), norm=norm and norm(DIM), gamma=torch.rand(DIM) + 0.5, **options) for _ in range(depth)
    ]
    return rdp.ResidualSequence(*branches).to(DEVICE)


def samples(**options):
    return torch.randn(BATCH, TOKENS, DIM, device=DEVICE, **options)


@contextlib.contextmanager
def launched():
    """The names of the kernels that run inside the block."""
    names = []

    def record(launch):
        names.append(launch.kernel.fn.__name__)
        launch.run()

    with prepared.observed(record):
        yield names


def calls_of_kernels(monkeypatch):
    """A list that gets each `FusedCall` from now on."""
    seen, original = [], autograd.FusedCall.__call__
    monkeypatch.setattr(
        autograd.FusedCall, "__call__", lambda call, operands: seen.append(call) or original(call, operands)
    )
    return seen


def one_by_one(paths, x, **kwargs):
    for path in paths:
        x = path(x, **kwargs)
    return x


def gradients(run, x, paths):
    x = x.detach().clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    found = {name: p.grad for name, p in paths.named_parameters()}
    paths.zero_grad(set_to_none=True)
    return out.detach(), x.grad, found


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm, None])
@pytest.mark.parametrize("drop_prob", [0.0, 0.5])
def test_equals_its_branches_one_by_one(norm, drop_prob):
    """The draws are the same too: each path's decision is drawn when the path runs."""
    paths, x = sequence(norm=norm, drop_prob=drop_prob, per_sample=["bias"]).double(), samples(dtype=torch.float64)
    bias = torch.randn(BATCH, 1, DIM, dtype=torch.float64, device=DEVICE)
    torch.manual_seed(1)
    actual = gradients(lambda x: paths(x, bias=bias), x, paths)
    torch.manual_seed(1)
    with rdp.use_backend("eager"):
        expected = gradients(lambda x: one_by_one(paths, x, bias=bias), x, paths)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"drop_prob": 0.5}, {"drop_prob": 0.5, "mode": "block"}])
def test_sums_and_norms_of_two_libraries(monkeypatch, options):
    """As on a GPU, where the compiled library comes first and has no norms, and Triton serves what has one."""
    if DEVICE != "cpu" or rdp.available_backends()["native"] is not None:
        pytest.skip("on CPUs, with the compiled library")
    reason = dispatch._why_not_kind
    monkeypatch.setattr(dispatch, "_why_not_kind", lambda *call: reason(*call[:-1], True))
    paths, x = sequence(**options).double(), samples(dtype=torch.float64)
    torch.manual_seed(1)
    with rdp.use_backend("auto"), launched() as names:
        actual = gradients(paths, x, paths)
    torch.manual_seed(1)
    with rdp.use_backend("eager"):
        expected = gradients(lambda x: one_by_one(paths, x), x, paths)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert "_residual_add_norm_fwd_kernel" in names
    assert "_residual_add_fwd_kernel" not in names  # the library's own kernels aren't Triton's


class Subclass(torch.Tensor):
    """A subclass's values may lie elsewhere."""


def test_no_kernel_takes_a_subclass_of_tensor_after_a_tensor_of_the_same_kind():
    paths = sequence(3)
    paths[1].fn.register_forward_hook(lambda fn, args, out: out.as_subclass(Subclass))
    with pytest.raises(RuntimeError, match="Subclass, a subclass of Tensor"):
        paths(samples())


def test_one_kernel_between_two_branches(monkeypatch):
    """The head, one kernel per hand-over, and the last add. In the backward a second kernel sums dγ, dweight and dbias."""
    paths, x = sequence(), samples(requires_grad=True)
    with launched() as names:
        out = paths(x)
    assert names == ["_residual_add_norm_fwd_kernel"] * DEPTH + ["_residual_add_fwd_kernel"]
    with launched() as names:
        out.sum().backward()
    norms = ["_residual_add_norm_bwd_kernel", "_sum_partials_kernel"]
    assert names == ["_residual_add_bwd_kernel", "_sum_partials_kernel", *norms * DEPTH]


def test_rows_are_touched_in_place_only(monkeypatch):
    """From the second add on the residual is one allocation, and so is its gradient up to the last path's."""
    seen = calls_of_kernels(monkeypatch)
    paths, x = sequence(drop_prob=0.5, mode="sample"), samples(requires_grad=True)
    before = x.detach().clone()
    out = paths(x)
    assert [call.in_place for call in seen] == [False, False, *[True] * (DEPTH - 1)]
    dout = torch.randn_like(out)
    dout_before = dout.clone()
    out.backward(dout)
    # The last call's incoming gradient is the caller's and passes through, so that the call before it has to allocate.
    assert [call.owns_gradient for call in seen] == [*[True] * (DEPTH - 1), False, False]
    assert torch.equal(dout, dout_before)
    assert torch.equal(x, before)


def test_a_sum_that_a_backward_reads_is_not_overwritten(monkeypatch):
    """Where all rows have a norm only the sum is saved; its gradient still is one allocation. Without a gradient
    nothing is saved. Where some rows have a norm, copies of these rows are saved."""
    seen = calls_of_kernels(monkeypatch)
    paths, x = sequence(), samples(requires_grad=True)
    paths(x).backward(torch.randn_like(x))
    assert [call.in_place for call in seen] == [False] * (DEPTH + 1)
    assert [call.owns_gradient for call in seen] == [*[True] * (DEPTH - 1), False, False]
    seen.clear()
    with torch.no_grad():
        paths(x)
    assert [call.in_place for call in seen] == [False, False, *[True] * (DEPTH - 1)]
    seen.clear()
    keep = torch.ones(DEPTH, BATCH, dtype=torch.bool)
    keep[[0, 1, 3], 2] = False
    with rdp.ResidualDropPath(paths, 0.5, mode="sample").drop_iteration(
        plan=rdp.PathPlan(keep, [0.5] * DEPTH, "sample")
    ):
        paths(x).sum().backward()
    assert [call.in_place for call in seen] == [False, False, True, False, True]


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
def test_where_nothing_is_fused_the_add_is_torchs_own(freeze, monkeypatch):
    """Whole branches without γ or a norm that kernels serve: torch's add has no backward of its own, where a kernel's
    would copy the gradient."""
    branches = (rdp.ResidualBranch(nn.Sequential(nn.LayerNorm(DIM), Mlp())) for _ in range(DEPTH))
    paths, x = rdp.ResidualSequence(*branches).to(DEVICE, torch.float64), samples(dtype=torch.float64)
    scheme = rdp.ResidualDropPath(paths, 0.5, freeze=freeze)
    plan = rdp.PathPlan(torch.tensor([True, False, True, False]), [0.5] * DEPTH, "block")
    with rdp.use_backend("eager"):
        expected = [gradients(lambda x: one_by_one(paths, x), x, paths) for _ in scheme.iterations(plan=plan)]
    called = autograd.FusedCall.__call__
    calls = []
    monkeypatch.setattr(
        autograd.FusedCall, "__call__", lambda call, operands: calls.append(call) or called(call, operands)
    )
    with rdp.use_backend("auto"):
        actual = [gradients(paths, x, paths) for _ in scheme.iterations(plan=plan)]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
    assert calls == []


def test_branches_may_keep_what_they_get_and_return():
    kept = []

    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(DIM, DIM)

        def forward(self, x):
            out = self.linear(x)
            kept.extend((t, t.detach().clone()) for t in (x, out))
            return out

    for norm in (None, nn.LayerNorm):
        for drop_prob in (0.0, 0.5):
            branches = [rdp.ResidualBranch(Keeps(), norm=norm and norm(DIM), drop_prob=drop_prob) for _ in range(DEPTH)]
            rdp.ResidualSequence(*branches).to(DEVICE)(samples(requires_grad=True)).sum().backward()
    assert len(kept) >= 4 * DEPTH
    assert all(torch.equal(t, copy) for t, copy in kept)


def test_hooks_see_the_residual_and_keep_it():
    paths, x = sequence(drop_prob=0.5), samples(requires_grad=True)
    features, normed = [], []
    for branch in paths[1:3]:
        branch.register_forward_hook(lambda module, inputs, out: features.extend([*inputs, out]))
    paths[3].norm.register_forward_hook(lambda module, inputs, out: normed.append((*inputs, out)))
    torch.manual_seed(2)
    out = paths(x)
    copies = [f.detach().clone() for f in features]
    out.sum().backward()
    assert all(torch.equal(f, c) for f, c in zip(features, copies, strict=True))
    assert len(features) == 4
    assert torch.equal(features[1], features[2])
    assert len(normed) == 1
    torch.manual_seed(2)
    expected = []
    with rdp.use_backend("eager"), torch.no_grad():
        for branch in paths:
            x = branch(x)
            expected.append(x)
    torch.testing.assert_close(features[1:4:2], expected[1:3])


def test_own_forward_of_a_subclass_is_called():
    class Twice(rdp.ResidualBranch):
        def forward(self, x):
            return 2 * super().forward(x)

    paths, x = sequence(2), samples()
    paths = rdp.ResidualSequence(paths[0], Twice(Mlp(), norm=nn.LayerNorm(DIM)).to(DEVICE), paths[1])
    with rdp.use_backend("eager"):
        expected = one_by_one(paths, x)
    torch.testing.assert_close(paths(x), expected)


def test_backward_twice_and_partly():
    """retain_graph gives the same bits again; the gradient of a single parameter runs only a part of the chain."""
    paths, x = sequence(drop_prob=0.5), samples(requires_grad=True)
    loss = paths(x).square().sum()
    leaves = [x, *paths.parameters()]
    first, second = (torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    names = ["x", *(name for name, _ in paths.named_parameters())]
    wanted = f"{DEPTH - 2}.fn.outer.weight"
    (alone,) = torch.autograd.grad(loss, paths.get_parameter(wanted), retain_graph=True)
    assert torch.equal(alone, first[names.index(wanted)])


def test_a_detached_path_saves_nothing():
    """freeze="branch": beyond what the learning path needs, autograd keeps no byte."""
    paths = sequence(2)
    scheme = rdp.ResidualDropPath(paths, 0.5, freeze="branch", train_rest=True)
    saved = {}
    for phase in scheme.iterations(plan=rdp.PathPlan(torch.tensor([True, False]), [0.5, 0.5], "block")):
        sizes = []
        parameters = {p.untyped_storage().data_ptr() for p in paths.parameters()}

        def pack(t, sizes=sizes, parameters=parameters):
            if t.untyped_storage().data_ptr() not in parameters:
                sizes.append((t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = paths(samples(requires_grad=True))
        saved[phase] = sum(dict(sizes).values())
        out.sum().backward()
    tokens = BATCH * TOKENS
    # What the norm saw, its mean and rstd, its output, tanh's output, and the branch's output for dγ.
    learning = tokens * (DIM + 2 + DIM + 2 * DIM + DIM) * 4
    assert saved == {"drop": learning, "reuse": learning}


def test_in_eval_and_without_grad(monkeypatch):
    paths, x = sequence(drop_prob=0.5).eval(), samples()
    before = x.clone()
    with torch.no_grad(), launched() as names:
        out = paths(x)
    assert names == ["_residual_add_norm_fwd_kernel"] * DEPTH + ["_residual_add_fwd_kernel"]
    assert torch.equal(x, before)
    with rdp.use_backend("eager"), torch.no_grad():
        torch.testing.assert_close(out, one_by_one(paths, x))
    assert paths[:0](x) is x
