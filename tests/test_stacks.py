"""Checkpointing, exporting and resuming. Other parts of training loops are tested in `tests/integrations/`."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rdp_kernels as rdp


class Mlp(nn.Sequential):
    def forward(self, x):  # an own forward, as dynamo doesn't compile Sequential's in place
        for module in self:
            x = module(x)
        return x


class Net(nn.Module):
    """`checkpointed`: None, "reentrant" or "non-reentrant" around each pair of paths."""

    def __init__(self, checkpointed=None, dropout=0.0, dtype=torch.float64):
        super().__init__()
        self.checkpointed = checkpointed
        self.stem = nn.Linear(3, 8)

        def path():
            fn = Mlp(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
            return rdp.ResidualBranch(fn, norm=nn.LayerNorm(8), gamma=torch.ones(8), drop_prob=0.5)

        self.stages = nn.ModuleList(nn.Sequential(nn.LayerNorm(8), path(), path()) for _ in range(3))
        self.head = nn.Linear(8, 2)
        self.to(dtype)

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            if self.checkpointed is None or not self.training:
                x = stage(x)
            else:
                x = checkpoint(stage, x, use_reentrant=self.checkpointed == "reentrant")
        return self.head(x)


def gradients(net):
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert (actual[name] is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(
                actual[name], grad, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.parametrize("kind", ["reentrant", "non-reentrant"])
@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("freeze", ["parameters", "branch"])
class TestCheckpoint:
    def pair(self, kind, mode, freeze, num_forwards=1):
        torch.manual_seed(0)
        plain, net = Net(), Net(kind)
        net.load_state_dict(plain.state_dict())
        schemes = [rdp.ResidualDropPath(m, 0.5, mode=mode, freeze=freeze, seed=4) for m in (plain, net)]
        # Reentrant checkpointing gives gradients only where its input requires one (torch's own rule).
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        return plain, net, *schemes, x

    def test_equals_no_checkpoint(self, kind, mode, freeze):
        plain, net, expected_scheme, scheme, x = self.pair(kind, mode, freeze)
        for _ in range(4):
            for _, _ in zip(expected_scheme.iterations(6), scheme.iterations(6), strict=True):
                plain(x).square().sum().backward()
                net(x).square().sum().backward()
                assert_same(gradients(net), gradients(plain))
                plain.zero_grad(), net.zero_grad()

    def test_recomputation_replays_the_state_it_was_recorded_with(self, kind, mode, freeze):
        """Backward after the iteration is over, and while the next one is open."""
        plain, net, expected_scheme, scheme, x = self.pair(kind, mode, freeze)
        expected, late = [], []
        for _, _ in zip(expected_scheme.iterations(6), scheme.iterations(6), strict=True):
            plain(x).square().sum().backward()
            expected.append(gradients(plain))
            plain.zero_grad()
            late.append(net(x).square().sum())
        assert len(late) == 2
        next(scheme.iterations(6))
        for loss, grads in zip(late, expected, strict=True):
            loss.backward()
            assert_same(gradients(net), grads)
            net.zero_grad()

    def test_without_an_iteration(self, kind, mode, freeze):
        """Masks come from torch's generator, which checkpointing rewinds."""
        plain, net, _, _, x = self.pair(kind, mode, freeze)
        for module in (plain, net):
            torch.manual_seed(5)
            module(x).square().sum().backward()
        assert_same(gradients(net), gradients(plain))


def test_checkpoint_with_several_forwards_in_sample_mode_is_refused():
    net = Net("non-reentrant")
    scheme = rdp.ResidualDropPath(net, 0.5, mode="sample")
    with pytest.raises(RuntimeError, match="'stages.2.1' is recomputed by checkpointing, which can't tell the 2"):
        for _ in scheme.iterations([4, 4]):
            sum(net(torch.randn(4, 3).double()).sum() for _ in range(2)).backward()
    assert scheme.phase is None


def test_reentrant_checkpointing_that_loses_a_gradient_is_refused():
    """The frozen stem's output requires no grad, so the first segment would learn nothing, silently."""
    net = Net("reentrant")
    net.head = nn.Sequential(rdp.ResidualBranch(nn.Linear(8, 8)), nn.Linear(8, 2)).double()
    scheme = rdp.ResidualDropPath(net, 0.5)
    plan = rdp.PathPlan(torch.tensor([False, True, True, True, True, True, False]), [0.5] * 7, "block")
    with (
        pytest.raises(RuntimeError, match="'stages.0.1' learns .* reentrant"),
        pytest.warns(UserWarning, match="requires_grad"),
    ):
        for _ in scheme.iterations(plan=plan):
            net(torch.randn(4, 3).double()).sum().backward()
    assert scheme.phase is None


def test_a_path_that_the_user_froze_may_run_without_grad():
    net = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(4, 4)) for _ in range(2)))
    net[0].requires_grad_(False)
    scheme = rdp.ResidualDropPath(net, 1.0, train_rest=True)
    x = torch.randn(2, 4, requires_grad=True)
    for _ in scheme.iterations():
        with torch.no_grad():
            features = net[0](x)
        net[1](features + x).sum().backward()
    assert net[1].fn.weight.grad is not None


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("chain", [False, True])
def test_a_micro_batch_in_which_nothing_learns_has_a_backward(freeze, chain):
    """Samples were dropped in the other micro-batch only: this one's loss has a graph and adds no gradient."""
    net = Net()
    if chain:
        net.stages = nn.ModuleList([rdp.ResidualSequence(*(stage[i] for stage in net.stages for i in (1, 2)))])
    whole = copy.deepcopy(net)
    keep = torch.ones(6, 5, dtype=torch.bool)
    keep[1, 0] = keep[4, 1] = False
    plan, x = rdp.PathPlan(keep, [0.5] * 6, "sample"), torch.randn(5, 3).double()
    schemes = [rdp.ResidualDropPath(m, 0.5, mode="sample", freeze=freeze) for m in (net, whole)]
    phases = zip(*(s.iterations(n, plan=plan) for s, n in zip(schemes, ([2, 3], 5), strict=True)), strict=True)
    for _ in phases:
        whole(x).square().sum().backward()
        for part in x.split([2, 3]):
            net(part).square().sum().backward()
        assert_same(gradients(net), gradients(whole))
        net.zero_grad(), whole.zero_grad()


@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("stop", range(1, 8))
def test_resuming_is_bit_identical(mode, stop, tmp_path):
    """Stopped after any iteration, also between drop and reuse, saved, loaded into new objects, continued."""

    def build():
        torch.manual_seed(1)
        net = Net(dropout=0.1, dtype=torch.float32)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        return net, optimizer, rdp.ResidualDropPath(net, 0.4, mode=mode, seed=11)

    def train(net, optimizer, scheme, steps):
        for _ in range(steps):
            with scheme.reuse_iteration() if scheme.reuse_pending else scheme.drop_iteration(5):
                batch = torch.Generator().manual_seed(scheme._pairs.drawn)
                net(torch.randn(5, 3, generator=batch)).square().sum().backward()
                optimizer.step(), optimizer.zero_grad()

    net, optimizer, scheme = build()
    train(net, optimizer, scheme, 10)
    expected = net.state_dict()

    net, optimizer, scheme = build()
    train(net, optimizer, scheme, stop)
    state = {
        "net": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheme": scheme.state_dict(),
        "rng": torch.get_rng_state(),
    }
    torch.save(state, tmp_path / "state.pt")
    net, optimizer, scheme = build()
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    net.load_state_dict(state["net"])
    optimizer.load_state_dict(state["optimizer"])
    scheme.load_state_dict(state["scheme"])
    torch.set_rng_state(state["rng"])
    train(net, optimizer, scheme, 10 - stop)
    assert all(torch.equal(net.state_dict()[name], value) for name, value in expected.items())
