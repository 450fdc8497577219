"""The scheme inside what training loops are made of: checkpointing, accumulation, AMP, EMA, compile, resuming."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rdp_kernels as rdp


class Mlp(nn.Sequential):
    def forward(self, x):  # a forward of our own: dynamo doesn't compile Sequential's in place
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
        schemes = [rdp.ResidualDropPath(m, mode=mode, freeze=freeze, seed=4) for m in (plain, net)]
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
    scheme = rdp.ResidualDropPath(net, mode="sample")
    with pytest.raises(RuntimeError, match="'stages.2.1' is recomputed by checkpointing, and which of the 2 forwards"):
        for _ in scheme.iterations([4, 4]):
            sum(net(torch.randn(4, 3).double()).sum() for _ in range(2)).backward()
    assert scheme.phase is None


def test_reentrant_checkpointing_that_loses_a_gradient_is_refused():
    """The frozen stem's output requires no grad, so the first segment would learn nothing, silently."""
    net = Net("reentrant")
    net.head = nn.Sequential(rdp.ResidualBranch(nn.Linear(8, 8)), nn.Linear(8, 2)).double()
    scheme = rdp.ResidualDropPath(net)
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


@pytest.mark.parametrize("mode", ["block", "sample"])
def test_gradient_accumulation(mode):
    """Micro-batches in one iteration add up to the gradients of the joined batch."""
    torch.manual_seed(0)
    net = Net()
    whole = copy.deepcopy(net)
    x = torch.randn(8, 3, dtype=torch.float64)
    schemes = [rdp.ResidualDropPath(m, mode=mode, seed=2) for m in (net, whole)]
    for _ in range(3):
        parts = iter(())
        for phase in schemes[1].iterations(8):
            whole(x).sum().backward()
            if phase == "drop":
                parts = schemes[0].iterations([3, 5], plan=schemes[1].plan)
            assert next(parts) == phase
            for part in (x[:3], x[3:]):
                net(part).sum().backward()
            assert_same(gradients(net), gradients(whole))
            net.zero_grad(), whole.zero_grad()
        next(parts, None)


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("chain", [False, True])
def test_a_micro_batch_in_which_nothing_learns_has_a_backward(freeze, chain):
    """Nothing of it was dropped, but something of the other: its loss has a graph, and adds nothing."""
    net = Net()
    if chain:
        net.stages = nn.ModuleList([rdp.ResidualSequence(*(stage[i] for stage in net.stages for i in (1, 2)))])
    whole = copy.deepcopy(net)
    keep = torch.ones(6, 5, dtype=torch.bool)
    keep[1, 0] = keep[4, 1] = False
    plan, x = rdp.PathPlan(keep, [0.5] * 6, "sample"), torch.randn(5, 3).double()
    schemes = [rdp.ResidualDropPath(m, mode="sample", freeze=freeze) for m in (net, whole)]
    phases = zip(*(s.iterations(n, plan=plan) for s, n in zip(schemes, ([2, 3], 5), strict=True)), strict=True)
    for _ in phases:
        whole(x).square().sum().backward()
        for part in x.split([2, 3]):
            net(part).square().sum().backward()
        assert_same(gradients(net), gradients(whole))
        net.zero_grad(), whole.zero_grad()


@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_and_grad_scaler(mode, freeze, dtype):
    torch.manual_seed(0)
    net = Net(dtype=torch.float32)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scheme = rdp.ResidualDropPath(net, 0.5, mode=mode, freeze=freeze, seed=1)
    x, target = torch.randn(16, 3), torch.randn(16, 2)
    losses = []
    for _ in range(30):
        for _ in scheme.iterations(16):
            with torch.autocast("cpu", dtype):
                out = net(x)
                loss = (out.float() - target).square().mean()
            assert out.dtype == dtype
            losses.append(loss.item())
            before = {n: p.detach().clone() for n, p in net.named_parameters()}
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            for name, p in net.named_parameters():
                assert p.grad is not None or torch.equal(p, before[name]), "frozen weights don't move by a bit"
            optimizer.zero_grad(set_to_none=True)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_bfloat16_gradients_are_near_float64s():
    torch.manual_seed(0)
    exact = Net()
    net = copy.deepcopy(exact).float()
    x = torch.randn(16, 3)
    schemes = [rdp.ResidualDropPath(m, seed=3) for m in (exact, net)]
    for _ in zip(*(s.iterations() for s in schemes), strict=True):
        exact(x.double()).square().mean().backward()
        with torch.autocast("cpu", torch.bfloat16):
            net(x).float().square().mean().backward()
        for p, q in zip(net.parameters(), exact.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None)
            if q.grad is not None:
                assert (p.grad - q.grad).norm() <= 0.05 * q.grad.norm() + 1e-4
        net.zero_grad(), exact.zero_grad()


def test_ema_copy_follows():
    """An averaged copy made inside an iteration: an ordinary model, updated at every step."""
    torch.manual_seed(0)
    net = Net()
    scheme = rdp.ResidualDropPath(net, seed=1)
    optimizer, ema, x = torch.optim.SGD(net.parameters(), 1e-3), None, torch.randn(4, 3).double()
    expected = None
    for _ in range(4):
        for phase in scheme.iterations():
            net(x).square().sum().backward()
            optimizer.step(), optimizer.zero_grad()
            if ema is None and phase == "reuse":
                ema = torch.optim.swa_utils.AveragedModel(
                    net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
                )
                assert all(p.requires_grad for p in ema.parameters())
            if ema is not None:
                ema.update_parameters(net)
                value = net.head.weight.detach()
                expected = value.clone() if expected is None else 0.5 * expected + 0.5 * value
    torch.testing.assert_close(ema.module.head.weight.detach(), expected)
    assert all(path.slot.scheme is None for path in ema.modules() if isinstance(path, rdp.ResidualBranch))


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
def test_compiled_branches(freeze):
    """Each branch's `fn` compiled whole: gradients as without, and a bounded number of graphs whatever the plans."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Net()
    net = copy.deepcopy(plain)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for path in (m for m in net.modules() if isinstance(m, rdp.ResidualBranch)):
        path.fn.compile(fullgraph=True, backend=backend, dynamic=False)
    schemes = [rdp.ResidualDropPath(m, freeze=freeze, seed=3) for m in (plain, net)]
    x = torch.randn(4, 3).double()
    counts = []
    for _ in range(8):
        for _ in zip(*(s.iterations() for s in schemes), strict=True):
            plain(x).square().sum().backward()
            net(x).square().sum().backward()
            assert_same(gradients(net), gradients(plain))
            plain.zero_grad(), net.zero_grad()
        counts.append(len(graphs))
    assert counts[-1] == counts[-4], "no graph is added once learning and frozen variants are known"
    assert counts[-1] <= 4 * 6


def test_a_model_with_a_scheme_compiles_and_exports_whole_in_eval():
    torch._dynamo.reset()
    net, x = Net().eval(), torch.randn(2, 3, dtype=torch.float64)
    scheme = rdp.ResidualDropPath(net, 0.5)
    expected = net(x)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
    assert scheme.phase is None


@pytest.mark.slow
def test_compiled_by_inductor():
    """Budget: 2 minutes. The real compiler on one branch, learning and frozen, full and on rows."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    plain = Net()
    net = copy.deepcopy(plain)
    path = net.stages[1][1]
    path.fn = torch.compile(path.fn, fullgraph=True, dynamic=True)
    x = torch.randn(6, 3).double()
    for mode in ("block", "sample"):
        schemes = [rdp.ResidualDropPath(m, mode=mode, seed=3) for m in (plain, net)]
        for _ in range(3):
            for _ in zip(*(s.iterations(6) for s in schemes), strict=True):
                plain(x).square().sum().backward()
                net(x).square().sum().backward()
                for p, q in zip(net.parameters(), plain.parameters(), strict=True):
                    assert (p.grad is None) == (q.grad is None)
                    assert p.grad is None or torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-10)
                plain.zero_grad(), net.zero_grad()
        for scheme in schemes:
            scheme.remove()


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
                batch = torch.Generator().manual_seed(scheme._drawn)
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


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("freeze", ["parameters", "branch"])
def test_frozen_weights_do_not_move(optimizer, freeze):
    """With momentum and weight decay, foreach: what takes no part has no gradient, not zeros."""
    torch.manual_seed(0)
    net = Net()
    options = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    optimizer = optimizer(net.parameters(), lr=0.01, weight_decay=0.1, foreach=True, **options)
    scheme = rdp.ResidualDropPath(net, freeze=freeze, seed=2)
    moved_ever = set()
    for _ in range(5):
        for phase in scheme.iterations():
            dropped = {scheme.paths[i].name for i in scheme.plan.dropped_paths}
            before = {n: p.detach().clone() for n, p in net.named_parameters()}
            net(torch.randn(4, 3).double()).square().sum().backward()
            optimizer.step(), optimizer.zero_grad(set_to_none=True)
            moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
            in_dropped = {n for n in before if any(n.startswith(f"{d}.") for d in dropped)}
            assert moved == (in_dropped if phase == "reuse" else set(before) - in_dropped)
            moved_ever |= moved
    assert moved_ever == set(before)
