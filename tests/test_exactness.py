"""Skipping is exact: outputs and every gradient equal the textbook computation in float64, for any plan."""

import copy
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rdp_kernels as rdp

from .conftest import DEVICE
from .nets import INPUTS, NETS, Iteration, textbook, took_part

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def check_iteration(net, x, iteration, weights):
    """One forward and backward of the package's net under the open iteration, against the textbook on a copy."""
    expected_net, expected_x = copy.deepcopy(net), x.detach().clone().requires_grad_()
    before = {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}
    flags = {name: m.training for name, m in net.named_modules()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}

    x = x.detach().clone().requires_grad_()
    out = net(x)
    (out * weights).sum().backward()
    expected = textbook(expected_net, expected_x, iteration)
    (expected * weights).sum().backward()

    torch.testing.assert_close(out, expected, **TOLERANCE)
    torch.testing.assert_close(x.grad, expected_x.grad, **TOLERANCE)
    part = took_part(net, iteration)
    for (name, p), q in zip(net.named_parameters(), expected_net.parameters(), strict=True):
        assert (p.grad is not None) == (name in part), name
        assert p.requires_grad == before[name][0]
        if name in part:
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE)
    assert {name: m.training for name, m in net.named_modules()} == flags
    frozen_rest = iteration.freeze_bn and not iteration.rest_learns
    for name, buffer in net.named_buffers():
        if frozen_rest and not name.startswith("paths"):
            assert torch.equal(buffer, buffers[name]), f"{name} moved"


CASE = given(  # Hypothesis begins with the first of each: one that drops a part
    seed=st.integers(0, 2**31), batch=st.sampled_from([5, *range(1, 14)]), p=st.sampled_from([0.5, 0.1, 0.9, 0.0, 1.0])
)


def examples(number):
    """In `make test`; `make test-all` runs four times as many."""
    return settings(max_examples=max(1, round(number * float(os.environ.get("RDP_EXAMPLES", "1")))))


@examples(4)
@CASE
@pytest.mark.parametrize("train_rest", [False, True], ids=["", "train_rest"])
@pytest.mark.parametrize("sampling", ["bernoulli", "fixed"])
@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("kind", NETS)
def test_equals_the_textbook(kind, mode, freeze, sampling, train_rest, seed, batch, p):
    with rdp.use_backend("eager"):
        check_pair(kind, mode, freeze, sampling, train_rest, seed, batch, p)


@examples(2)
@CASE
@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("backend", ["triton", "native"] if DEVICE == "cpu" else ["triton"])
def test_equals_the_textbook_on_kernels(backend, kind, mode, freeze, seed, batch, p):
    sampling, train_rest = ("bernoulli", "fixed")[seed // 2 % 2], bool(seed // 4 % 2)
    with rdp.use_backend(backend):
        check_pair(kind, mode, freeze, sampling, train_rest, seed, batch, p, device=DEVICE)


def check_pair(kind, mode, freeze, sampling, train_rest, seed, batch, p, device="cpu"):
    """A drop and a reuse iteration."""
    if kind == "batch_norm" and mode == "sample" and freeze != "none":
        return  # refused: tests/test_scheme.py
    torch.manual_seed(seed)
    net = NETS[kind]().to(device)
    scheme = rdp.ResidualDropPath(
        net,
        p,
        mode=mode,
        freeze=freeze,
        sampling=sampling,
        train_rest=train_rest,
        scale_by_keep=bool(seed % 2),
        seed=seed,
    )
    phases = []
    for phase in scheme.iterations(batch):
        keep = scheme.plan.keep if mode == "sample" else scheme.plan.keep[:, None].expand(-1, batch)
        keep = keep.to(device)
        iteration = Iteration(phase, keep, [p] * len(net.paths), freeze, train_rest, scale_by_keep=bool(seed % 2))
        x, weights = torch.randn(batch, *INPUTS[kind], dtype=torch.float64).to(device), None
        with torch.no_grad():
            weights = torch.randn_like(net.eval()(x))
        check_iteration(net.train(), x, iteration, weights)
        net.zero_grad(set_to_none=True)
        phases.append(phase)
    # A reuse iteration in which nothing can learn is not run: nothing was dropped, or only what has no parameters.
    reuse = Iteration("reuse", keep, [p] * len(net.paths), freeze, train_rest)
    assert phases == (["drop", "reuse"] if not keep.all() and took_part(net, reuse) else ["drop"])


@pytest.mark.parametrize("freeze_bn", [True, False])
def test_freeze_bn(freeze_bn):
    """Running statistics of frozen paths and of the frozen rest don't move by a bit; those that learn do."""
    torch.manual_seed(0)
    net = NETS["batch_norm"]()
    keep = torch.tensor([True, False, True])
    scheme = rdp.ResidualDropPath(net, 0.5, freeze_bn=freeze_bn)
    x = torch.randn(4, 2, 4, 4, dtype=torch.float64)
    with scheme.drop_iteration(plan=rdp.PathPlan(keep, [0.5] * 3, "block")):
        before = copy.deepcopy(dict(net.named_buffers()))
        net(x).sum().backward()
    moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {name for name in before if not name.startswith("paths.1")}
    with scheme.reuse_iteration():
        before = copy.deepcopy(dict(net.named_buffers()))
        net(x).sum().backward()
    moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == ({name for name in before if name.startswith("paths.1")} if freeze_bn else set(before))


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("mode", ["block", "sample"])
def test_parameters_frozen_by_the_user_stay_frozen(mode, freeze):
    torch.manual_seed(0)
    net = NETS["tied"]()
    frozen = ["paths.1.fn.weight", "paths.0.norm.bias", "head.bias"]
    for name in frozen:
        net.get_parameter(name).requires_grad_(False)
    scheme = rdp.ResidualDropPath(net, 0.5, mode=mode, freeze=freeze, seed=3)
    for _ in range(4):
        for _ in scheme.iterations(5):
            net(torch.randn(5, 3, 4, dtype=torch.float64)).sum().backward()
    for name, p in net.named_parameters():
        assert p.requires_grad == (name not in frozen)
        assert (p.grad is None) == (name in frozen)


@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
def test_nan_in_dropped_rows_reaches_nothing(mode, freeze):
    """Rows whose branch would yield NaN and Inf are dropped: output and gradients are those of finite rows."""
    torch.manual_seed(0)

    class Poison(torch.nn.Module):
        """NaN and Inf for samples whose first entry is above 50."""

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x):
            bad = (x[:, :1, :1] > 50) & torch.ones_like(x, dtype=torch.bool)
            return torch.where(bad, torch.tensor([torch.nan, torch.inf], dtype=x.dtype).repeat(2), self.linear(x))

    branch = rdp.ResidualBranch(Poison(), gamma=torch.ones(4))
    net = torch.nn.Sequential(branch).double()
    x = torch.randn(4, 3, 4, dtype=torch.float64)
    x[1, 0, 0] = 100.0
    keep = torch.tensor([[True, False, True, True]]) if mode == "sample" else torch.tensor([False])
    scheme = rdp.ResidualDropPath(net, 0.5, mode=mode, freeze=freeze)
    x.requires_grad_()
    with scheme.drop_iteration(plan=rdp.PathPlan(keep, [0.25], mode)):
        out = net(x)
        out.sum().backward()
    assert out.isfinite().all()
    assert x.grad.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
    assert torch.equal(out[1], x[1])
