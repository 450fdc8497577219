"""Captured branches against the same scheme uncaptured. Without a GPU, a stand-in replaces `make_graphed_callables`. It
has static buffers for inputs, outputs and gradients, and every replay overwrites them."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.integrations import cuda_graphs
from rdp_kernels.integrations.cuda_graphs import capture_branches

from .. import nets
from ..convert import nets as blocks
from ..test_stacks import Net, assert_same, gradients
from .test_compile import double


def graphed(branch, samples, pool, allow_unused_input):
    """The stand-in on CPUs: after a warm-up, any backward sees the values of the last replay."""
    parameters = tuple(branch.parameters())
    call, run = branch.call, branch.call.module.run_branch
    pool.append((call.variant, any(p.requires_grad for p in parameters)))
    wanted, addresses = [p for p in parameters if p.requires_grad], [p.data_ptr() for p in parameters]
    (sample,) = samples
    static_input, static = sample.detach().clone(), {}

    def compute():
        x = static_input.detach().requires_grad_(sample.requires_grad)
        with torch.enable_grad():
            static["x"], static["out"] = x, run(x, (), {}, call.normed)
        static.setdefault("buffer", torch.empty_like(static["out"])).copy_(static["out"].detach())

    for _ in range(3):
        compute()

    class Replay(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, *_):
            assert [id(p) for p in parameters if p.requires_grad] == [id(p) for p in wanted], (
                "captured with other parameters"
            )
            assert [p.data_ptr() for p in parameters] == addresses, "a graph would read the old addresses"
            static_input.copy_(x)
            compute()
            return static["buffer"].detach()

        @staticmethod
        def backward(ctx, dout):
            sources = [static["x"]] * sample.requires_grad + wanted
            grads = torch.autograd.grad(static["out"], sources, dout, allow_unused=True)
            found = {}
            for index, (source, grad) in enumerate(zip(sources, grads, strict=True)):
                if grad is not None:
                    found[id(source)] = static.setdefault(index, torch.empty_like(grad)).copy_(grad)
            found = [found.get(id(source)) for source in (static["x"], *parameters)]
            return tuple(None if grad is None else grad.detach() for grad in found)

    return lambda x: Replay.apply(x, *parameters)


@pytest.fixture
def captures(monkeypatch):
    """The variants captured, in order."""
    found = []
    monkeypatch.setattr(cuda_graphs, "_check", lambda model, path_modules: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: found)
    return found


def compare(plain, x, steps=6, **options):
    net = copy.deepcopy(plain)
    capture_branches(net)
    schemes = [rdp.ResidualDropPath(model, 0.5, seed=3, **options) for model in (plain, net)]
    for _ in range(steps):
        for _ in zip(*(scheme.iterations() for scheme in schemes), strict=True):
            losses = [model(x).square().sum() for model in (plain, net)]
            torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
            for loss in losses:
                loss.backward()
            for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-10, msg=name)
            plain.zero_grad(), net.zero_grad()
    for value, expected in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    return net


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match=r"CUDA graphs need a GPU, but torch.cuda.is_available\(\) is False"):
        capture_branches(Net())


def test_where_it_can_not_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ValueError, match="its parameter 'stem.weight' is on cpu"):
        capture_branches(Net())
    net = nn.Sequential(rdp.ResidualBranch(nn.Tanh()))
    scheme = rdp.ResidualDropPath(net, 0.5, mode="sample")
    with pytest.raises(ValueError, match="path '0' has a scheme in sample mode"):
        capture_branches(net)
    scheme.remove()


@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
def test_each_variant_is_captured_once(captures, freeze):
    compare(Net(), double(4, 3), 20, freeze=freeze)
    variants = {
        "parameters": ["detached", "frozen", "learning"],
        "branch": ["detached", "learning"],
        "none": ["learning"],
    }
    assert sorted(set(captures)) == [(variant, variant == "learning") for variant in variants[freeze]]
    assert all(captures.count(variant) <= 6 for variant in captures), "one a path"


@pytest.mark.parametrize("name", ["tokens", "conv", "batch_norm"])
def test_all_kinds_of_paths(captures, name):
    """Weights of two paths, γ, shortcuts, and BatchNorm: a warm-up would move its statistics."""
    compare(nets.NETS[name](), double(3, *nets.INPUTS[name]))
    assert captures


@pytest.mark.parametrize("freeze_bn", [True, "running"])
def test_norms_in_another_mode_are_another_graph(captures, freeze_bn):
    """With weights that the user froze both iterations would share a graph, but BatchNorm's statistics move in one
    only. A training forward without grad moves them too; a frozen branch where no gradient passes doesn't."""
    plain = nets.batch_norm_net()
    for path in plain.paths:
        path.fn.requires_grad_(False)
    compare(plain, double(3, *nets.INPUTS["batch_norm"]), freeze_bn=freeze_bn, train_rest=True)
    assert len(captures) == 2 * len(plain.paths)

    plain = nets.batch_norm_net()
    net = copy.deepcopy(plain)
    capture_branches(net)
    plan = rdp.PathPlan(torch.tensor([True, True, False]), [0.5] * 3, "block")
    for model in (plain, net):
        scheme = rdp.ResidualDropPath(model, 0.5, freeze_bn=freeze_bn)
        for _ in scheme.iterations(plan=plan):
            model(double(3, *nets.INPUTS["batch_norm"])).sum().backward()
            model.zero_grad()
    net.load_state_dict(plain.state_dict())
    x = double(3, *nets.INPUTS["batch_norm"])
    with torch.no_grad():
        torch.testing.assert_close(net(x), plain(x), rtol=1e-10, atol=1e-10)
    for value, expected in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


def test_converted_blocks(captures):
    net, x = blocks.tokens_net(blocks.Block, blocks.Shared).double(), blocks.tokens(dtype=torch.float64)
    rdp.convert(net, example_inputs=x)
    compare(net, x)
    assert len(captures) <= 3 * 4


def test_buffers_in_use_are_left_alone(captures):
    """Two forwards before their backwards, gradients that are added up, a forward whose backward never comes."""
    plain = Net()
    net = copy.deepcopy(plain)
    capture_branches(net)
    schemes = [rdp.ResidualDropPath(model, 0.5, seed=3) for model in (plain, net)]
    batches = double(3, 4, 3)
    for step in range(6):
        for _ in zip(*(scheme.iterations() for scheme in schemes), strict=True):
            for model in (plain, net):
                (model(batches[0]).square().sum() + model(batches[1]).sum()).backward()
                with torch.no_grad():
                    model(batches[1])
                model(batches[2])
                model(batches[2]).square().sum().backward()
            assert_same(gradients(net), gradients(plain))
            if step % 2:
                plain.zero_grad(), net.zero_grad()
    assert captures


def test_gradients_add_up(captures):
    """A parameter's `.grad` is the buffer that the next replay overwrites."""
    plain = Net()
    net = copy.deepcopy(plain)
    capture_branches(net)
    for x in double(3, 4, 3):
        for model in (plain, net):
            torch.manual_seed(1)
            model(x).square().sum().backward()
        assert_same(gradients(net), gradients(plain))
    assert captures


def test_other_shapes_and_arguments_run_uncaptured(captures):
    net = nn.Sequential(rdp.ResidualBranch(nn.Linear(3, 3))).double()
    expected = copy.deepcopy(net)
    capture_branches(net)
    for rows in (4, 4):
        torch.testing.assert_close(net(x := double(rows, 3)), expected(x))
    with pytest.warns(UserWarning, match=r"path '0' runs some calls uncaptured: .* shape \[2, 3\]"):
        torch.testing.assert_close(net(x := double(2, 3)), expected(x))
    torch.testing.assert_close(net(x := double(5, 3)), expected(x))
    net[0].fn.weight.data = expected[0].fn.weight.data = double(3, 3)
    torch.testing.assert_close(net(x := double(4, 3)), expected(x))
    assert len(captures) == 1

    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y

    net = rdp.ResidualBranch(Sum())
    capture_branches(net)
    with pytest.warns(UserWarning, match="further arguments"):
        torch.testing.assert_close(net(torch.ones(2, 2), torch.ones(2, 2)), torch.full((2, 2), 3.0))
    assert len(captures) == 1


def test_handles_copies_and_lifetimes(captures):
    net = Net()
    runners = capture_branches(net)
    copy.deepcopy(net)(double(4, 3)).sum().backward()
    assert not captures
    net(double(4, 3)).sum().backward()
    assert captures
    runners.remove()
    assert all(path.binding.branch_runner is None for path in net.modules() if isinstance(path, rdp.ResidualBranch))
    capture_branches(net)
    net(double(4, 3)).sum().backward()
    reference = weakref.ref(net)
    del net
    gc.collect()
    assert reference() is None


@pytest.fixture
def captured_weights_may_be_accumulated_elsewhere():
    """A captured graph keeps the `AccumulateGrad` nodes of its weights, on the stream of the capture, and torch
    warns."""
    warn = getattr(torch.autograd.graph, "set_warn_on_accumulate_grad_stream_mismatch", lambda enabled: None)
    warn(False)
    yield
    warn(True)


@pytest.mark.gpu
@pytest.mark.usefixtures("captured_weights_may_be_accumulated_elsewhere")
@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("name", ["net", "conv", "batch_norm", "converted"])
def test_on_a_gpu(name, freeze, monkeypatch):
    count = 0
    make = torch.cuda.make_graphed_callables

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return make(*args, **kwargs)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", counted)
    if name == "net":
        net, x = Net(), double(4, 3)
    elif name == "converted":
        net, x = blocks.tokens_net(blocks.Block, blocks.Shared).double(), blocks.tokens(dtype=torch.float64)
        rdp.convert(net, example_inputs=x)
    else:
        net, x = nets.NETS[name](), double(4, *nets.INPUTS[name])
    net = compare(net.cuda(), x.cuda(), 20, freeze=freeze)
    paths = len(rdp.ResidualDropPath(net, 0.5).paths)
    assert 2 * paths <= count <= (2 if freeze == "branch" else 3) * paths
