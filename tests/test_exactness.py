"""Skipping is exact: outputs and every gradient equal the textbook computation in float64, for any plan."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed

from .conftest import DEVICE
from .kernels.cases import examples
from .nets import INPUTS, NETS, Iteration, batch_norm_net, moving_statistics, textbook, took_part

pytestmark = pytest.mark.filterwarnings("ignore:ResidualDropPath. every path's drop_prob is 0")  # p = 0 is drawn too
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
CHAIN = {"batch_norm_chain": lambda: batch_norm_net(chain=True)}


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
    moves = moving_statistics(net, iteration)
    for name, buffer in net.named_buffers():
        if name not in moves:
            assert torch.equal(buffer, buffers[name]), f"{name} moved"
        elif iteration.freeze_bn:  # else the textbook's copies move
            torch.testing.assert_close(buffer, expected_net.get_buffer(name), **TOLERANCE)


CASE = given(  # Hypothesis begins with the first of each: one that drops a part
    seed=st.integers(0, 2**31), batch=st.sampled_from([5, *range(1, 14)]), p=st.sampled_from([0.5, 0.1, 0.9, 0.0, 1.0])
)


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


@examples(3)
@CASE
@pytest.mark.parametrize("train_rest", [False, True], ids=["", "train_rest"])
@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("kind", ["conv", "batch_norm", "batch_norm_chain"])
@pytest.mark.parametrize("freeze_bn", ["running", False])
def test_frozen_batch_norm_equals_the_textbook(freeze_bn, kind, freeze, train_rest, seed, batch, p):
    """The options that aren't the default, in branches, in branches that hand over, in the stem and in shortcuts."""
    check_pair(kind, "block", freeze, "bernoulli", train_rest, seed, batch, p, freeze_bn=freeze_bn)


def check_pair(kind, mode, freeze, sampling, train_rest, seed, batch, p, device="cpu", freeze_bn=True):
    """A drop and a reuse iteration."""
    if kind == "batch_norm" and mode == "sample" and freeze != "none":
        return  # refused: tests/test_scheme.py
    torch.manual_seed(seed)
    net = (NETS | CHAIN)[kind]().to(device)
    scheme = rdp.ResidualDropPath(
        net,
        p,
        mode=mode,
        freeze=freeze,
        sampling=sampling,
        train_rest=train_rest,
        scale_by_keep=bool(seed % 2),
        freeze_bn=freeze_bn,
        seed=seed,
    )
    phases = []
    for phase in scheme.iterations(batch):
        keep = scheme.plan.keep if mode == "sample" else scheme.plan.keep[:, None].expand(-1, batch)
        keep = keep.to(device)
        iteration = Iteration(phase, keep, [p] * len(net.paths), freeze, train_rest, bool(seed % 2), freeze_bn)
        x, weights = torch.randn(batch, *INPUTS[kind.removesuffix("_chain")], dtype=torch.float64).to(device), None
        with torch.no_grad():
            weights = torch.randn_like(net.eval()(x))
        check_iteration(net.train(), x, iteration, weights)
        net.zero_grad(set_to_none=True)
        phases.append(phase)
    # A reuse iteration in which nothing can learn is not run: nothing was dropped, or only what has no parameters.
    reuse = Iteration("reuse", keep, [p] * len(net.paths), freeze, train_rest)
    assert phases == (["drop", "reuse"] if not keep.all() and took_part(net, reuse) else ["drop"])


def timm_norm_act():
    if not installed("timm"):
        pytest.skip("timm is not installed")
    import_torchvision()
    from timm.layers import BatchNormAct2d

    return BatchNormAct2d(4)


NORMS = {
    "BatchNorm": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "no weights": lambda: nn.BatchNorm2d(4, affine=False),
    "no running statistics": lambda: nn.BatchNorm2d(4, track_running_stats=False),
    "lazy": lambda: nn.LazyBatchNorm2d(),
    "synchronised": lambda: nn.SyncBatchNorm(4),  # without a process group it runs on CPUs
    "InstanceNorm": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "timm's, with an activation": timm_norm_act,
}


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("freeze_bn", [True, "running", False])
@pytest.mark.parametrize("kind", NORMS)
def test_norms_that_keep_running_statistics(kind, freeze_bn, freeze):
    """In a branch and in the stem. A frozen norm's output is that of training mode or, by "running", of eval mode, and
    its statistics don't move. With freeze_bn=False it stays in training mode and its statistics move."""
    torch.manual_seed(0)
    make = NORMS[kind]
    branches = [rdp.ResidualBranch(nn.Sequential(nn.Conv2d(4, 4, 1), make()), channel_dim=1) for _ in range(3)]
    net = nn.Sequential(nn.Conv2d(2, 4, 1), make(), *branches)
    x = torch.randn(6, 2, 3, 3)
    net(x)  # lazy ones are made
    net.double()
    x = x.double()
    scheme = rdp.ResidualDropPath(net, 0.5, freeze_bn=freeze_bn, freeze=freeze)
    plan = rdp.PathPlan(torch.tensor([True, False, True]), [0.5] * 3, "block")
    for phase in scheme.iterations(plan=plan):
        before, plain = copy.deepcopy(dict(net.named_buffers())), copy.deepcopy(net)
        if phase == "reuse" and freeze_bn == "running":
            [module.eval() for path in (1, 2, 4) for module in plain[path].modules()]
        out = net(x)
        out.square().sum().backward()
        moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
        learns = ("1", "2", "4") if phase == "drop" else ("3",)
        everything = phase == "reuse" and not freeze_bn
        wanted = {name for name in before if name.startswith(learns) or everything}
        assert moved == {name for name in wanted if kind != "InstanceNorm" or "tracked" not in name}, "it counts none"
        assert all(m.training and getattr(m, "track_running_stats", True) for m in net.modules()) or "no run" in kind
        assert net.state_dict().keys() == plain.state_dict().keys()
        if phase == "reuse":
            torch.testing.assert_close(out, plain(x), **TOLERANCE)


@pytest.mark.parametrize("freeze_bn", [True, "running"])
def test_from_scratch_the_loss_of_reuse_iterations_stays_with_that_of_drop_iterations(freeze_bn):
    """With SGD as ResNets are trained. Running statistics lag behind the weights: with them the loss explodes."""
    torch.manual_seed(0)

    def conv(*channels):
        return nn.Conv2d(*channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels[-1])

    branches = [nn.Sequential(*conv(16, 16), nn.ReLU(), *conv(16, 16)) for _ in range(8)]
    paths = [rdp.ResidualBranch(branch, activation="relu", channel_dim=1) for branch in branches]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))
    net = nn.Sequential(*conv(3, 16), nn.ReLU(), *paths, head)
    optimizer = torch.optim.SGD(net.parameters(), 0.3, momentum=0.9, weight_decay=5e-4)
    scheme, worst = rdp.ResidualDropPath(net, 0.2, freeze_bn=freeze_bn), {"drop": 0.0, "reuse": 0.0}
    prototypes = torch.randn(10, 3, 8, 8)
    for _ in range(20):
        labels = torch.randint(10, (32,))
        images = 0.5 * prototypes[labels] + torch.randn(32, 3, 8, 8)
        for phase in scheme.iterations():
            loss = nn.functional.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            worst[phase] = max(worst[phase], loss.item())
    assert worst["reuse"] > 100 if freeze_bn == "running" else worst["reuse"] < 2 * worst["drop"], worst


@pytest.mark.parametrize("freeze_bn", [True, "running"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputation_moves_no_statistics_of_what_is_frozen(use_reentrant, freeze_bn):
    """With batch or running statistics, gradients are those without checkpointing."""

    class Checkpointed(nn.Module):
        def __init__(self, part):
            super().__init__()
            self.part = part

        def forward(self, x):
            return checkpoint(self.part, x, use_reentrant=use_reentrant)

    torch.manual_seed(0)
    plain = batch_norm_net()
    net = copy.deepcopy(plain)
    net.stem, net.paths = Checkpointed(net.stem), nn.ModuleList(Checkpointed(path) for path in net.paths)
    x = torch.randn(5, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    plan = rdp.PathPlan(torch.tensor([True, False, True]), [0.5] * 3, "block")
    schemes = [rdp.ResidualDropPath(model, freeze_bn=freeze_bn) for model in (plain, net)]
    for phase, _ in zip(*(scheme.iterations(plan=plan) for scheme in schemes), strict=True):
        before = copy.deepcopy(dict(net.named_buffers()))
        for buffer, moved_twice in zip(plain.buffers(), net.buffers(), strict=True):
            buffer.copy_(moved_twice)  # what learns moves in the recomputation too, as without a scheme
        found = []
        for model in (plain, net):
            model(x).square().sum().backward()
            found.append({name.replace(".part", ""): p.grad for name, p in model.named_parameters()})
            model.zero_grad()
        for name, gradient in found[0].items():
            assert (gradient is None) == (found[1][name] is None), name
            if gradient is not None:
                torch.testing.assert_close(found[1][name], gradient, **TOLERANCE)
        moved = {name for name, buffer in net.named_buffers() if not torch.equal(buffer, before[name])}
        if phase == "reuse":
            assert moved == {name for name in before if name.startswith("paths.1.")}


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
    """Where the rows on which a branch gives NaN and Inf are dropped, output and gradients are those of finite rows."""
    torch.manual_seed(0)

    class Poison(torch.nn.Module):
        """Gives NaN and Inf for samples whose first entry is above 50."""

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
