"""Models compiled whole, with plans as data, against the scheme on the same model uncompiled; dynamo counts graphs."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import rdp_kernels as rdp
from rdp_kernels.integrations.compile_whole import compile_whole

from .. import nets
from ..convert import nets as blocks
from ..test_stacks import assert_same, gradients
from .test_compile import double


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        options = {"gamma": torch.ones(4), "activation": "relu"}, {"norm": nn.LayerNorm(4)}, {"drop_prob": 0.3}
        self.paths = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(4, 4), **given) for given in options))
        self.double()

    def forward(self, x):
        return self.head(self.paths(self.stem(x)))


def pair(plain, backend="eager", **options):
    net = copy.deepcopy(plain)
    schemes = [rdp.ResidualDropPath(model, 0.5, seed=3, **options) for model in (plain, net)]
    return net, compile_whole(net, schemes[1], backend=backend), schemes


def compare(plain, x, steps=6, backend="eager", **options):
    """Gradients are zeroed after every other pair only: frozen parameters keep their `.grad`, None or not."""
    net, compiled, schemes = pair(plain, backend, **options)
    for step in range(steps):
        for _ in zip(*(scheme.iterations(len(x)) for scheme in schemes), strict=True):
            expected, actual = plain(x), compiled(x)
            torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)
            expected.square().sum().backward(), actual.square().sum().backward()
            assert_same(gradients(net), gradients(plain))
        if step % 2:
            plain.zero_grad(), net.zero_grad()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


OPTIONS = [
    {"mode": "block"},
    {"mode": "sample", "freeze": "branch"},
    pytest.param({"mode": "block", "backend": "aot_eager"}, marks=pytest.mark.slow),
    pytest.param({"mode": "block", "freeze": "branch"}, marks=pytest.mark.slow),
    pytest.param({"mode": "sample", "freeze": "none"}, marks=pytest.mark.slow),
    pytest.param({"mode": "block", "train_rest": True, "scale_by_keep": False}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_one_graph_for_all_plans(options):
    """Budget: 10 seconds."""
    compare(Net(), double(6, 3), 16, **options)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "sample"])
def test_shared_branches_and_activations(mode):
    """Budget: 10 seconds. Weights of two paths, γ with and without a norm, relu after the add."""
    compare(nets.tokens_net(), double(4, 3, 5), mode=mode, freeze="branch")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "sample"])
def test_converted_blocks(mode):
    """Budget: 10 seconds."""
    net, x = blocks.tokens_net(blocks.Block, blocks.Shared).double(), blocks.tokens(dtype=torch.float64)
    rdp.convert(net, example_inputs=x)
    compare(net, x, mode=mode, freeze="branch")


@pytest.mark.slow
def test_inductor():
    """Budget: 60 seconds."""
    compare(Net(), double(6, 3), backend="inductor")


@pytest.mark.slow
def test_several_forwards():
    """Budget: 5 seconds. Their losses are added up; a path learns in one forward only."""
    plain = Net()
    net, compiled, schemes = pair(plain, mode="sample", freeze="branch")
    first, second = double(3, 3), double(2, 3)
    for _ in range(4):
        for _ in zip(*(scheme.iterations([3, 2]) for scheme in schemes), strict=True):
            for model in (plain, compiled):
                (model(first).square().sum() + model(second).square().sum()).backward()
            assert_same(gradients(net), gradients(plain))
            plain.zero_grad(), net.zero_grad()


def test_alternate():
    """Optimizers with momentum and weight decay move the same weights."""
    plain = Net()
    net, compiled, schemes = pair(plain)
    optimizers = [torch.optim.SGD(m.parameters(), 1e-3, momentum=0.9, weight_decay=0.1) for m in (plain, net)]
    for scheme, optimizer in zip(schemes, optimizers, strict=True):
        scheme.alternate(optimizer)
    for _ in range(6):
        x = double(4, 3)
        for model in (plain, compiled):
            model(x).square().sum().backward()
        assert_same(gradients(net), gradients(plain))
        assert schemes[1].phase == schemes[0].phase
        for optimizer in optimizers:
            optimizer.step(), optimizer.zero_grad()
        assert schemes[1].state_dict() == schemes[0].state_dict()
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10, msg=name)


def test_a_model_inside_another():
    """The wrapper's own parameters don't belong to the scheme: they always learn."""

    class WithLoss(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.factor = model, nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x):
            return self.factor * self.model(x).square().sum()

    plain, x = WithLoss(Net()), double(4, 3)
    wrapped = copy.deepcopy(plain)
    schemes = [rdp.ResidualDropPath(m.model, 0.5) for m in (plain, wrapped)]
    compiled = compile_whole(wrapped, schemes[1], backend="eager")
    for _ in zip(*(scheme.iterations() for scheme in schemes), strict=True):
        for model in (plain, compiled):
            model(x).backward()
        assert_same(gradients(wrapped), gradients(plain))
        assert wrapped.factor.grad is not None
        plain.zero_grad(), wrapped.zero_grad()


def test_without_an_iteration():
    """Training draws in the graph, and everything learns. Eval mode is plain, inside an iteration too."""
    net = Net()
    scheme = rdp.ResidualDropPath(net, 0.5, freeze="branch", seed=3)
    compiled = compile_whole(net, scheme, backend="eager")
    x = double(4, 3)
    for _ in scheme.iterations():
        compiled(x).sum().backward()
    net.zero_grad()
    outputs = [compiled(x) for _ in range(8)]
    assert any(not torch.equal(outputs[0], out) for out in outputs)
    sum(outputs).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    compiled.eval()
    expected = net(x)
    pair = scheme.iterations()
    next(pair)
    torch.testing.assert_close(compiled(x), expected)
    assert not counters["graph_break"]


@pytest.mark.slow
def test_a_model_that_is_compiled_without_being_told_is_slow_but_exact():
    """Budget: 10 seconds. Plain `torch.compile`: graphs break at the scheme's decisions, and the rest is still
    frozen."""
    plain = Net()
    net = copy.deepcopy(plain)
    schemes = [rdp.ResidualDropPath(model, 0.5, seed=3) for model in (plain, net)]
    compiled, x = torch.compile(net, backend="eager"), double(4, 3)
    for _ in zip(*(scheme.iterations() for scheme in schemes), strict=True):
        plain(x).square().sum().backward(), compiled(x).square().sum().backward()
        assert_same(gradients(net), gradients(plain))
        plain.zero_grad(), net.zero_grad()


def test_refusals():
    def whole(net, **options):
        return compile_whole(net, rdp.ResidualDropPath(net, 0.5, **options))

    with pytest.raises(ValueError, match='weights can\'t be frozen for single samples in a graph: use freeze="branch"'):
        whole(Net(), mode="sample")
    with pytest.raises(ValueError, match="path 'paths.0': in a graph a dropped branch would update"):
        whole(nets.batch_norm_net())
    for freeze_bn in (True, "running"):
        for norm in (nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True)):
            with pytest.raises(ValueError, match="BatchNorm can't be frozen in a graph: use train_rest=True"):
                whole(nn.Sequential(norm, rdp.ResidualBranch(nn.Linear(4, 4))), freeze_bn=freeze_bn)
    with pytest.raises(ValueError, match=r"a parameter of path 'paths.3' that paths.1 shares can't be frozen"):
        net = nets.tied_net()
        net.paths[2].fn.weight = nn.Parameter(torch.randn(4, 4).double())
        whole(net)
    with pytest.raises(ValueError, match=r"a parameter of path 'paths.2' that the rest shares can't be frozen"):
        whole(nets.tied_net(), freeze="branch")
    net = Net()
    with pytest.raises(ValueError, match="model must be, or contain, the model that scheme was made for"):
        compile_whole(Net(), rdp.ResidualDropPath(net, 0.5))
    with pytest.raises(TypeError, match="scheme must be a ResidualDropPath, got Net"):
        compile_whole(net, net)


def test_models_do_not_outlive_their_use():
    net, x = Net(), double(4, 3)
    scheme = rdp.ResidualDropPath(net, 0.5)
    compiled = compile_whole(net, scheme, backend="eager")
    for _ in scheme.iterations():
        compiled(x).sum().backward()
    reference = weakref.ref(net)
    del net, scheme, compiled
    gc.collect()
    torch._dynamo.reset()
    assert reference() is None
