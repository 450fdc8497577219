"""Which branch gets which argument, and the errors for wrong calls of a branch and for wrong results."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import rdp_kernels as rdp
from rdp_kernels.integrations.compile import compile_branches

DIM = 4


class Masked(nn.Module):
    """`w x + mask`, with `mask` given by position or by name."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x, mask=None):
        return self.linear(x) if mask is None else self.linear(x) + mask


class ByName(Masked):
    def forward(self, x, *, mask=None, scale=1.0):
        return scale * super().forward(x, mask)


class Anything(Masked):
    def forward(self, x, **options):
        return super().forward(x, **options)


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.linear, self.make = nn.Linear(DIM, DIM), make

    def forward(self, x):
        return self.make(self.linear(x))


def sequence(*fns, **options):
    torch.manual_seed(0)
    return rdp.ResidualSequence(*(rdp.ResidualBranch(fn, norm=nn.LayerNorm(DIM), **options) for fn in fns))


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=str(reason)))
    for name, reason in rdp.available_backends().items()
]


# Which branch gets which argument


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
def test_a_sequence_hands_each_branch_what_it_takes(backend, training):
    net = sequence(Masked(), nn.Linear(DIM, DIM), ByName(), Anything()).train(training)
    for branch in net:
        branch.drop_prob = 0.5
        branch.per_sample = {"mask"}
    x, mask = torch.randn(6, 2, DIM), torch.randn(6, 1, DIM)
    with rdp.use_backend(backend):
        torch.manual_seed(1)
        out = net(x, mask=mask)
        torch.manual_seed(1)
        for branch, named in zip(net, ({"mask": mask}, {}, {"mask": mask}, {"mask": mask}), strict=True):
            x = branch(x, **named)
    torch.testing.assert_close(out, x)


def test_an_argument_of_a_single_branch():
    net, x = sequence(Masked(), ByName()), torch.randn(3, DIM)
    torch.testing.assert_close(net(x, scale=3.0), net[1](net[0](x), scale=3.0))


def test_a_wrapper_that_takes_anything_gets_all():
    net, x = sequence(Masked(), nn.Linear(DIM, DIM)), torch.randn(3, DIM)
    expected = net(x, mask=x)
    net[0].fn = nn.DataParallel(net[0].fn)
    assert net[0].takes().any_by_name
    torch.testing.assert_close(net(x, mask=x), expected)


def test_a_forward_of_an_instance_counts():
    """Accelerate's hooks and `torch.compile` set one."""
    net, x = sequence(Masked(), nn.Linear(DIM, DIM)), torch.randn(3, DIM)
    expected = net(x, mask=x)
    forward = net[0].fn.forward
    net[0].fn.forward = lambda x, mask: forward(x, mask)
    torch.testing.assert_close(net(x, mask=x), expected)


def test_wrappers_are_looked_through():
    """An MLP that takes no mask gets none when it is compiled or checkpointed either."""
    masked, mlp, x = Masked(), nn.Linear(DIM, DIM), torch.randn(3, DIM)
    expected = sequence(masked, mlp)(x, mask=x)
    for wrap in (lambda m: torch.compile(m, backend="eager"), checkpoint_wrapper):
        torch.testing.assert_close(sequence(wrap(masked), wrap(mlp))(x, mask=x), expected)


def test_a_branch_with_a_forward_of_its_own():
    class Scaled(rdp.ResidualBranch):
        def forward(self, x, scale):
            return super().forward(x * scale)

    net = rdp.ResidualSequence(rdp.ResidualBranch(Masked()), Scaled(nn.Linear(DIM, DIM)))
    x = torch.randn(3, DIM)
    torch.testing.assert_close(net(x, mask=x, scale=2.0), net[1](net[0](x, x), 2.0))


def test_compiled_whole():
    torch._dynamo.reset()
    net, x = sequence(Masked(), nn.Linear(DIM, DIM)).eval(), torch.randn(3, DIM)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mask=x), net(x, mask=x))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_and_traced_modules_are_branches():
    linear, masked, x = nn.Linear(DIM, DIM), Masked(), torch.randn(3, DIM)
    expected = sequence(linear, masked)(x, mask=x)
    torch.testing.assert_close(sequence(torch.jit.script(linear), masked)(x, mask=x), expected)
    traced = sequence(torch.jit.trace(linear, x))
    torch.testing.assert_close(traced(x), sequence(linear)(x))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: sequence(Masked(), ByName())(x, bias=x), r"no branch .* takes 'bias'; .*\['mask', 'scale'\]"),
        (lambda x: sequence(nn.Linear(DIM, DIM))(x, input=x), "no branch of the sequence takes 'input'"),
        (
            lambda x: sequence(Masked(), nn.Linear(DIM, DIM))(x, x),
            "branch 1 of the sequence takes 0 positional arguments after x, got 1: pass by name",
        ),
        (lambda x: sequence(ByName())(x, x), "branch 0 .* takes 0 positional"),
    ],
)
def test_arguments_that_no_branch_takes_are_named(call, words):
    with pytest.raises(TypeError, match=words):
        call(torch.randn(3, DIM))


# What a branch returns


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("made", [lambda y: (y, None), lambda y: None, lambda y: {"y": y}])
@pytest.mark.parametrize("where", ["branch", "sequence"])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_results_that_are_no_tensors_are_refused(freeze, made, where, backend):
    returns = Returns(lambda y: y)
    branch = rdp.ResidualBranch(returns)
    model = nn.Sequential(branch) if where == "branch" else rdp.ResidualSequence(branch)
    x = torch.randn(3, DIM)
    returns.make = made
    named = f"must return a tensor, got {type(made(x)).__name__}"
    advice = r".*returns that tensor alone" if isinstance(made(x), tuple) else ""
    with rdp.use_backend(backend):
        for training in (True, False):
            with pytest.raises(TypeError, match=f"the branch of a ResidualBranch of Returns {named}{advice}"):
                model.train(training)(x)
        model.train()
        for mode, keep in (("sample", [[True, False, True]]), ("block", [True]), ("block", [False])):
            scheme = rdp.ResidualDropPath(model, 0.5, mode=mode, freeze=freeze)
            plan = rdp.PathPlan(torch.tensor(keep), [0.5], mode)
            returns.make = made
            if mode == "sample" or keep == [True]:
                with (
                    scheme.drop_iteration(plan=plan),
                    pytest.raises(TypeError, match=f"the branch of path '0' {named}"),
                ):
                    model(x)
            returns.make = lambda y: y
            with scheme.drop_iteration(plan=plan):
                model(x)
            returns.make = made
            if scheme.reuse_pending:
                with scheme.reuse_iteration(), pytest.raises(TypeError, match=f"the branch of path '0' {named}"):
                    model(x)
            scheme.remove()


def test_attention_as_it_is_gets_advice():
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x)

    branch = rdp.ResidualBranch(SelfAttention(DIM, 2, batch_first=True))
    with pytest.raises(TypeError, match=r"a ResidualBranch of SelfAttention .* got tuple; wrap it.*\[0\]"):
        branch(torch.randn(2, 3, DIM))


def test_a_tuple_is_not_blamed_on_arguments():
    branch = rdp.ResidualBranch(Attention(lambda x, mask: (x, mask)), drop_prob=0.5)
    with pytest.raises(TypeError, match="must return a tensor, got tuple; wrap it"):
        for _ in range(20):
            branch(torch.randn(B, T, DIM), torch.randn(B, T, T))


def test_in_graphs_and_compiled_too():
    branch, x = rdp.ResidualBranch(Returns(lambda y: (y, None))), torch.randn(2, DIM)
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        torch.jit.trace(branch, x)
    compile_branches(branch, backend="eager")
    with pytest.raises(TypeError, match="must return a tensor, got tuple"):
        branch(x)


def test_a_shortcut_returns_a_tensor():
    branch = rdp.ResidualBranch(nn.Linear(DIM, DIM), shortcut=Returns(lambda y: (y,)))
    with pytest.raises(TypeError, match="the shortcut of a ResidualBranch of Linear must return a tensor, got tuple"):
        branch(torch.randn(2, DIM))


# Arguments with a row per sample that `per_sample` doesn't name


class Attention(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(DIM, DIM), function

    def forward(self, x, mask, more=None):
        x = self.linear(x)
        return self.function(x, mask)


def attend(x, mask):
    return (x @ x.mT + mask).softmax(-1) @ x


def fused(x, mask):
    return nn.functional.scaled_dot_product_attention(*[x[:, None]] * 3, attn_mask=mask[:, None])[:, 0]


def where(x, mask):
    return torch.where(mask.sum(2, keepdim=True) > 0, x, 0.0)


def pick(x, mask):
    return x[mask[:, 0, 0] > 0]


B, T = 5, 3


@pytest.mark.parametrize("kept", [1, 2, 4])
@pytest.mark.parametrize("function", [attend, fused, where, pick])
@pytest.mark.parametrize("as_what", ["position", "name", "tuple"])
@pytest.mark.parametrize("runs", ["alone", "sequence"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_arguments_missing_in_per_sample_are_named(kept, function, as_what, runs, backend):
    """On a single row some of these would broadcast instead of raising."""
    if as_what == "tuple":
        function = lambda x, mask, function=function: function(x, mask[0])  # noqa: E731
    branch = rdp.ResidualBranch(Attention(function))
    model = rdp.ResidualSequence(branch) if runs == "sequence" else branch
    scheme = rdp.ResidualDropPath(model, 0.5, mode="sample", freeze="none")
    plan = rdp.PathPlan((torch.arange(B) < kept)[None], [0.5], "sample")
    x, mask = torch.randn(B, T, DIM), torch.randn(B, T, T)
    mask = (mask,) if as_what == "tuple" else mask
    words = rf"run on {kept} of {B} rows with all {B} rows of 'mask': .*per_sample=\('mask',\)"
    args, kwargs = ((mask,), {}) if as_what == "position" else ((), {"mask": mask})
    with rdp.use_backend(backend), scheme.drop_iteration(plan=plan), pytest.raises(ValueError, match=words):
        model(x, *args, **kwargs)


@pytest.mark.parametrize(
    ("mask", "per_sample"),
    [(torch.randn(B, T, T), ["mask"]), (torch.randn(T, T), []), (torch.tensor(1.0), []), (3.0, []), (None, [])],
)
def test_arguments_with_other_rows_are_not_blamed(mask, per_sample):
    def fails(x, mask):
        raise RuntimeError("of its own")

    branch = rdp.ResidualBranch(Attention(fails), drop_prob=0.5, per_sample=per_sample)
    with pytest.raises(RuntimeError, match="^of its own$"):
        for _ in range(20):
            branch(torch.randn(B, T, DIM), mask)


def test_running_out_of_memory_stays_what_it_is():
    def fails(x, mask):
        raise torch.OutOfMemoryError("no memory")

    branch = rdp.ResidualBranch(Attention(fails), drop_prob=0.5)
    with pytest.raises(torch.OutOfMemoryError):
        for _ in range(20):
            branch(torch.randn(B, T, DIM), torch.randn(B, T, T))
