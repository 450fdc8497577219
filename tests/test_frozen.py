import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rdp_kernels as rdp
from rdp_kernels.frozen import bypass, freeze, lean_ops, lean_ops_pay

CONVS = [
    (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 6)),
    (nn.Conv2d(4, 4, (3, 1), stride=(2, 1), padding=(2, 0), dilation=(2, 1), groups=2), (3, 4, 7, 5)),
    (nn.Conv2d(4, 4, 3, padding="same"), (2, 4, 5, 5)),
    (nn.Conv3d(2, 4, 2), (2, 2, 3, 4, 3)),
    (nn.BatchNorm2d(4).eval(), (3, 4, 2, 2)),
    (nn.BatchNorm1d(4, affine=False).eval(), (3, 4)),
    (nn.BatchNorm2d(4, track_running_stats=False).eval(), (3, 4, 2, 2)),
]


@pytest.mark.parametrize(("module", "shape"), CONVS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
def test_lean_ops_change_no_bit_of_the_forward_and_no_gradient(module, shape):
    module = copy.deepcopy(module).double().requires_grad_(False)
    for name, buffer in module.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = module(x)
    with lean_ops():
        out = module(x)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    actual, wanted = (torch.autograd.grad((o * weights).sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)

    def run(x):
        with lean_ops():
            return module(x)

    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


def test_lean_ops_leave_learning_and_half_precision_alone():
    conv, x = nn.Conv2d(2, 3, 1), torch.randn(1, 2, 3, 3, requires_grad=True)
    with lean_ops():
        conv(x).sum().backward()
    assert conv.weight.grad is not None
    conv.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = conv(x)
        with lean_ops():
            out = conv(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    with lean_ops(), pytest.raises(RuntimeError, match="channels"):
        conv(torch.randn(1, 5, 3, 3, requires_grad=True))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_bypass_is_linear_in_the_gradient(activation):
    constant = torch.randn(4, 3, dtype=torch.float64)

    def run(x):
        return bypass(x, lambda: (x + constant).relu() if activation else x + constant, activation)

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


def test_bypass_runs_without_grad():
    weight = torch.randn(3, requires_grad=True)
    seen = []

    def compute():
        update = x * weight
        seen.append(update.requires_grad)
        return x + update

    x = torch.randn(3, requires_grad=True)
    bypass(x, compute).sum().backward()
    assert seen == [False]
    assert weight.grad is None
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.parametrize("freeze_bn", [True, "running", False])
def test_freeze_puts_back_what_it_found(freeze_bn):
    norms = [nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)]
    net = nn.Sequential(nn.Linear(2, 2), *norms)
    net[0].bias.requires_grad_(False)
    net[2].eval()
    net[3].track_running_stats = False

    def state():
        flags = [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
        return [p.requires_grad for p in net.parameters()], flags, [id(b) for b in net.buffers()]

    before = state()
    places = [(m, name) for m in net for name in m._parameters]
    with pytest.raises(KeyboardInterrupt), freeze([*places, places[0]], net.modules(), freeze_bn):
        assert not any(p.requires_grad for p in net.parameters())
        assert [m.training for m in norms] == [
            freeze_bn != "running",
            False,
            freeze_bn != "running",
            freeze_bn != "running",
        ]
        assert [m.track_running_stats for m in norms] == [freeze_bn is not True, True, False, freeze_bn is not True]
        raise KeyboardInterrupt
    assert state() == before


@pytest.mark.parametrize("freeze_bn", [None, 1, "batch", torch.ones(1)])
def test_freeze_bn_is_checked(freeze_bn):
    with pytest.raises(ValueError, match='freeze_bn must be True, False or "running", got'):
        rdp.ResidualDropPath(nn.Sequential(rdp.ResidualBranch(nn.BatchNorm1d(2))), freeze_bn=freeze_bn)


def test_lean_ops_are_used_where_they_save_something():
    by_batch = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not lean_ops_pay(by_batch.modules())
    assert lean_ops_pay(by_batch.eval().modules())
    assert lean_ops_pay([nn.Conv2d(2, 2, 1)])


def test_a_batch_norm_with_a_forward_of_its_own_stands_still():
    """As other libraries write it, without asking `track_running_stats`."""

    class Own(nn.BatchNorm1d):
        def forward(self, x):
            self.num_batches_tracked.add_(1)
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    norm, x = Own(4), torch.randn(8, 4)
    expected = nn.BatchNorm1d(4)(x)
    before, buffers = copy.deepcopy(norm.state_dict()), norm._buffers
    with freeze([], [norm]):
        torch.testing.assert_close(norm(x), expected)
    assert norm._buffers is buffers
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    norm(x)
    assert norm.num_batches_tracked == 1
