"""Compiled branches, and models compiled whole, against the same model uncompiled; dynamo counts graphs."""

import contextlib
import copy
import gc
import io
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed
from rdp_kernels.integrations.compile import compile_branches

from .. import nets
from ..convert import nets as blocks
from ..test_stacks import Net, assert_same, gradients


@pytest.fixture(autouse=True)
def _fresh():
    """Makes a second graph of anything compiled an error, and a graph break too."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True, fail_on_recompile_limit_hit=True):
        yield
    torch._dynamo.reset()


def graphs():
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def compare(
    plain, x, steps=4, around=contextlib.nullcontext, tolerance=1e-10, backend="eager", dynamic=None, **options
):
    """Trains a copy of `plain` with compiled branches beside it; returns the copy."""
    net = copy.deepcopy(plain)
    compile_branches(net, backend=backend, dynamic=dynamic)
    schemes = [rdp.ResidualDropPath(model, 0.5, seed=3, **options) for model in (plain, net)]
    for _ in range(steps):
        for _ in zip(*(scheme.iterations(len(x)) for scheme in schemes), strict=True):
            losses = []
            for model in (plain, net):
                torch.manual_seed(5)  # for dropout
                with around():
                    losses.append(model(x).double().square().sum())
                losses[-1].backward()
            torch.testing.assert_close(*losses, rtol=tolerance, atol=tolerance)
            for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if p.grad is not None:
                    torch.testing.assert_close(p.grad, q.grad, rtol=tolerance, atol=tolerance)
            plain.zero_grad(), net.zero_grad()
    for scheme in schemes:
        scheme.remove()
    return net


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mode", "freeze"),
    [("block", "parameters"), ("block", "branch"), ("block", "none"), ("sample", "parameters")],
)
def test_fifty_plans_make_three_graphs(mode, freeze):
    """Six identical branches: learning, frozen, and frozen where no gradient passes."""
    compare(Net(), double(6, 3), 50, mode=mode, freeze=freeze)
    assert graphs() == {"parameters": 3, "branch": 2, "none": 1}[freeze]


CASES = [
    ("tied", "block", "parameters"),
    ("tied", "sample", "branch"),
    ("tokens", "sample", "parameters"),
    pytest.param("conv", "block", "parameters", marks=pytest.mark.slow),
    pytest.param("conv", "sample", "branch", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "mode", "freeze"), CASES)
def test_all_kinds_of_paths(name, mode, freeze):
    """Budget: 5 seconds."""
    net = compare(nets.NETS[name](), double(6, *nets.INPUTS[name]), mode=mode, freeze=freeze)
    assert graphs() <= 3 * len({path.binding.branch_runner for path in net.paths})


@pytest.mark.slow
@pytest.mark.parametrize("freeze_bn", [True, "running", False])
def test_batch_norms_statistics(freeze_bn):
    """Budget: 10 seconds."""
    plain = nets.batch_norm_net()
    net = compare(plain, double(4, 2, 4, 4), freeze_bn=freeze_bn, backend="aot_eager")
    for value, expected in zip(net.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert graphs() == 3


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "sample"])
def test_a_norm_that_kernels_would_fuse(mode):
    """Budget: 15 seconds. Inside the branch, whether it runs on all rows or on some."""
    with rdp.use_backend("triton"):
        compare(Net(), double(4, 3), mode=mode)
    assert graphs() == 3


@pytest.mark.slow
def test_a_sequence_hands_over_through_fused_kernels():
    """Budget: 15 seconds."""
    with rdp.use_backend("triton"):
        net = compare(nets.chain_net(), double(3, *nets.INPUTS["chain"]), 2, freeze="parameters")
    assert graphs() <= 3 * len({path.binding.branch_runner for path in net.paths}) + 3, "a norm may be fused or not"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "freeze"), [("block", "branch"), ("sample", "parameters")])
def test_converted_blocks(mode, freeze):
    """Budget: 10 seconds. Two blocks of each class, four distinct branches."""
    net = blocks.tokens_net(blocks.Block, blocks.Shared, blocks.Block, blocks.Shared).double()
    x = blocks.tokens(dtype=torch.float64)
    rdp.convert(net, example_inputs=x)
    compare(net, x, 8, mode=mode, freeze=freeze)
    assert graphs() <= 4 * 3


def test_converted_blocks_share_graphs():
    net, x = blocks.tokens_net(*[blocks.DinoBlock] * 3).double(), blocks.tokens(dtype=torch.float64)
    rdp.convert(net, drop_prob=0.4, example_inputs=x)
    compare(net, x, mode="sample", freeze="none")
    assert graphs() == 2


@pytest.mark.parametrize("kept", [range(7), range(6, -1, -1)])
def test_any_number_of_rows_is_one_graph(kept):
    plain = nn.Sequential(rdp.ResidualBranch(nn.Linear(3, 3), norm=nn.LayerNorm(3))).double()
    net = copy.deepcopy(plain)
    compile_branches(net, backend="aot_eager")
    schemes = [rdp.ResidualDropPath(model, 0.5, mode="sample") for model in (plain, net)]
    x = double(6, 3).requires_grad_()
    for count in kept:
        plan = rdp.PathPlan((torch.arange(6) < count)[None], [0.5], "sample")
        for _ in zip(*(scheme.iterations(6, plan=plan) for scheme in schemes), strict=True):
            plain(x).square().sum().backward(), net(x).square().sum().backward()
            assert_same(gradients(net), gradients(plain))
            plain.zero_grad(), net.zero_grad()
    assert graphs() == 2, "learning and frozen"


def test_batches_of_one_size_may_be_static():
    compare(Net(), double(4, 3), dynamic=False)
    assert graphs() == 3
    with pytest.raises(torch._dynamo.exc.RecompileError, match="size mismatch at index 0"):
        compare(Net(), double(4, 3), dynamic=False, mode="sample")


def test_branches_that_differ_share_nothing():
    """They differ in width, and in a number that only the forward reads. There are more than dynamo's limit of
    graphs."""

    class Scaled(nn.Linear):
        def __init__(self, width, factor):
            super().__init__(4, 4)
            self.factor, self.inner = factor, nn.Linear(4, width)

        def forward(self, x):
            return self.factor * super().forward(x) + self.inner(x).mean(-1, keepdim=True)

    different = [Scaled(width, 0.5) for width in range(1, 6)] + [Scaled(4, 0.1 * i) for i in range(5)]
    equal = [copy.deepcopy(different[0]) for _ in range(2)]
    net = nn.Sequential(*(rdp.ResidualBranch(fn) for fn in different + equal)).double()
    compare(net, double(4, 4), 2, freeze="none")
    assert graphs() == 10


def test_drop_probs_and_names_are_no_difference():
    net = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(4, 4), drop_prob=0.1 * i) for i in range(9))).double()
    compile_branches(net, backend="eager")
    for _ in range(3):
        net(double(5, 4)).sum().backward()
    assert graphs() == 1


class Conditioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.x, self.context = nn.Linear(4, 4), nn.Linear(3, 4)

    def forward(self, x, context, factor=None, bias=None):
        y = self.x(x).tanh() + self.context(context) + bias
        return y if factor is None else y * factor[:, None]


@pytest.mark.parametrize("mode", ["sample", pytest.param("block", marks=pytest.mark.slow)])
def test_arguments_with_a_row_per_sample(mode):
    """Budget: 5 seconds."""

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.bias = nn.Linear(3, 4), nn.Parameter(torch.randn(4))
            options = {"norm": nn.LayerNorm(4), "per_sample": ("context", "factor")}
            self.paths = nn.ModuleList(rdp.ResidualBranch(Conditioned(), **copy.deepcopy(options)) for _ in range(3))

        def forward(self, x):
            y = self.stem(x)
            for path in self.paths:
                y = path(y, x, factor=x[:, 0].exp(), bias=self.bias)
            return y

    # As many rows as the bias has elements: the compiler gets a hint for a tensor that has no rows per sample.
    compare(Conditional().double(), double(4, 3), 12, mode=mode)
    assert graphs() <= 3 + 1, "the bias gets a gradient in drop iterations only, which is a learning branch more"


@pytest.mark.parametrize("kind", ["non-reentrant", pytest.param("reentrant", marks=pytest.mark.slow)])
def test_checkpointing(kind):
    """Budget: 5 seconds."""
    compare(Net(kind), double(6, 3).requires_grad_(), mode="sample", backend="aot_eager")
    assert graphs() == (3 if kind == "reentrant" else 2), "a detached branch runs without grad first"


def test_dropout():
    compare(Net(dropout=0.3), double(6, 3), mode="sample")
    assert graphs() == 3


def test_autocast():
    net, x = Net(dtype=torch.float32), torch.randn(6, 3)
    compare(net, x, mode="sample", around=lambda: torch.autocast("cpu", torch.bfloat16), tolerance=1e-2)
    assert graphs() == 3


def test_without_iterations_and_in_eval():
    """Ordinary stochastic depth, plain inference, and no separately compiled branch in a model that is compiled
    whole."""
    plain = Net()
    net = copy.deepcopy(plain)
    compile_branches(net, backend="eager")
    scheme, x = rdp.ResidualDropPath(net, 0.5), double(6, 3)
    for _ in range(4):
        for model in (plain, net):
            torch.manual_seed(7)
            model(x).sum().backward()
        assert_same(gradients(net), gradients(plain))
    expected = plain.eval()(x)
    torch.testing.assert_close(net.eval()(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)
    assert graphs() == 3, "learning, and in eval with grad and without"
    with torch._dynamo.config.patch(error_on_recompile=False):
        torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="eager")(x), expected)
    assert graphs() == 4
    assert scheme.phase is None


def test_copies_are_not_compiled():
    net = Net()
    runners = compile_branches(net, backend="eager")
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        copied(double(4, 3)).sum().backward()
        assert graphs() == 0
    net(double(4, 3)).sum().backward()
    assert graphs() > 0
    runners.remove()
    counters.clear()
    torch._dynamo.reset()
    net(double(4, 3)).sum().backward()
    assert graphs() == 0
    compile_branches(net, backend="eager")


@pytest.mark.parametrize("converted", [False, True])
def test_models_do_not_outlive_their_use(converted):
    net, x = Net(), double(4, 3)
    if converted:
        net, x = blocks.tokens_net(blocks.Block), blocks.tokens()
        rdp.convert(net, example_inputs=x)
    runners = compile_branches(net, backend="eager" if converted else "aot_eager")
    scheme = rdp.ResidualDropPath(net, 0.5)
    for _ in scheme.iterations():
        net(x).sum().backward()
    reference = weakref.ref(net)
    del net, scheme
    gc.collect()
    assert reference() is None
    runners.remove()


def test_refusals():
    net = Net()
    runners = compile_branches(net)
    with pytest.raises(RuntimeError, match=r"path 'stages.0.1' is compiled or captured already: call remove\(\)"):
        compile_branches(net)
    runners.remove()
    runners.remove()
    with pytest.raises(ValueError, match="model has no paths"):
        compile_branches(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        compile_branches("vit")


@pytest.mark.parametrize("converted", [False, True])
def test_a_model_with_a_scheme_compiles_and_exports_whole_in_eval(converted):
    net, x = Net(), double(2, 3)
    if converted:
        net, x = (
            blocks.tokens_net(blocks.Block, blocks.Shared, blocks.Concat).double(),
            blocks.tokens(dtype=torch.float64),
        )
    expected = net.eval()(x)
    if converted:
        rdp.convert(net, example_inputs=x)
    scheme = rdp.ResidualDropPath(net, 0.5)
    with torch._dynamo.config.patch(error_on_recompile=False):  # the scheme's hooks run before the model and after it
        torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), expected)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
    pair = scheme.iterations()
    next(pair)
    torch.testing.assert_close(torch.export.export(net, (x,)).module()(x), expected)
    pair.close()
    assert scheme.phase is None


def test_a_graph_break_is_an_error():
    class Prints(nn.Linear):
        def forward(self, x):
            torch._dynamo.graph_break()
            return super().forward(x)

    net = nn.Sequential(rdp.ResidualBranch(Prints(3, 3))).double()
    compile_branches(net, backend="eager")
    with pytest.raises(torch._dynamo.exc.Unsupported):
        net(double(4, 3))


@pytest.mark.slow
def test_inductor_on_own_branches():
    """Budget: 30 seconds. The real compiler."""
    compare(Net(), double(6, 3), 8, mode="sample", backend="inductor")
    assert graphs() == 3


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "freeze"), [("sample", "parameters"), ("block", "branch")])
def test_inductor_on_a_vision_transformer(mode, freeze):
    """Budget: 90 seconds. timm's, converted: eight paths, two distinct branches."""
    if not installed("timm"):
        pytest.skip("timm is not installed")
    import_torchvision()
    import timm

    net = timm.create_model("vit_tiny_patch16_224", depth=4, img_size=32, num_classes=5).double().train()
    rdp.convert(net, drop_prob=0.2)
    compare(net, double(5, 3, 32, 32), 6, mode=mode, freeze=freeze, backend="inductor")
    assert graphs() <= 2 * (2 if freeze == "branch" else 3)
