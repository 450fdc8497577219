"""The second self-check: blocks that look right in eval mode and in float64, and train wrong. Most do what tracing
doesn't see. To keep tracing out, the tests carve a harmless block's forward and run another one."""

import collections
import copy
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.convert.calls import BATCH_SIZES, BlockCall, Refused
from rdp_kernels.convert.carve import carve
from rdp_kernels.convert.check import check
from rdp_kernels.convert.check_training import _of_gradients, check_training
from rdp_kernels.convert.differences import likeness
from rdp_kernels.convert.source import recipe_of
from rdp_kernels.convert.step import Setting
from rdp_kernels.convert.trace import trace

from . import nets
from .nets import DIM, DropPath


class Residual(nn.Module):
    def __init__(self, fn=None):
        super().__init__()
        torch.manual_seed(0)
        self.fn, self.drop_path = nn.Linear(DIM, DIM) if fn is None else fn, DropPath(0.2)
        self.last, self.calls, self.rest = None, 0, nn.Dropout(0.5)

    def forward(self, x):
        return x + self.drop_path(self.fn(x))


def checked(block, forward=None):
    """Carves `block`, gives it the other forward and checks it. Raises `Refused`, or another error where the first
    check would have been enough."""
    calls = [BlockCall((nets.tokens(size),), {}) for size in BATCH_SIZES]
    block.eval()
    traced = trace(block, calls[0])
    carved = carve(block, traced, [list(call.args) for call in calls], BATCH_SIZES)
    recipe = recipe_of(traced, carved)
    if forward is not None:
        block.__class__ = type("Other", (type(block),), {"forward": forward})
    before = copy.deepcopy(block.state_dict()), likeness(block), torch.get_rng_state(), random.getstate()
    check(block, carved, recipe, calls)
    try:
        check_training(block, carved, recipe, calls[0])
    finally:
        assert likeness(block) == before[1]
        assert torch.equal(torch.get_rng_state(), before[2])
        assert random.getstate() == before[3]
        for name, value in block.state_dict().items():
            assert torch.equal(value, before[0][name])


# With all rows kept


def autocast_is_lost(self, x):
    with torch.autocast("cpu", enabled=False):
        y = self.fn(x)
    return x + self.drop_path(y)


def another_dtype(self, x):
    y = self.drop_path(self.fn(x))
    return x.to(y.dtype) + y


def an_attribute_is_set(self, x):
    self.last = self.fn(x)
    return x + self.drop_path(self.last)


def calls_are_counted(self, x):
    self.calls += 1
    return x + self.drop_path(self.fn(x))


def an_attribute_is_new(self, x):
    self.tokens = x.shape[1]
    return x + self.drop_path(self.fn(x))


def a_hook_is_registered(self, x):
    if self.training:
        self.fn.register_forward_hook(lambda *_: None)
    return x + self.drop_path(self.fn(x))


def one_more_draw(self, x):
    if self.training:
        torch.rand(())
    return x + self.drop_path(self.fn(x))


def one_more_draw_of_python(self, x):
    if self.training:
        random.random()
    return x + self.drop_path(self.fn(x))


def dropout_that_is_lost(self, x):
    return x + self.drop_path(self.rest(self.fn(x)))


def another_type(self, x):
    return Tuple(x + self.drop_path(self.fn(x)))


def a_number_beside(self, x):
    return x + self.drop_path(self.fn(x)), float(self.training)


def a_gradient_is_stopped(self, x):
    y = self.fn(x)
    return x + self.drop_path(y.detach() if torch.is_autocast_enabled("cpu") else y)


def an_argument_is_changed(self, x):
    if torch.is_autocast_enabled("cpu"):
        x.mul_(2)
        return x / 2 + self.drop_path(self.fn(x / 2))
    return x + self.drop_path(self.fn(x))


@dataclass
class Tuple:
    out: torch.Tensor


OTHER_FORWARDS = {
    autocast_is_lost: r"under autocast to bfloat16 with all rows kept \(seed 0\) what it returns differs",
    another_dtype: r"under autocast .* what it returns has dtype torch.float32 instead of torch.bfloat16",
    an_attribute_is_set: r"kept \(seed 0\) the attribute 'last' is of type NoneType instead of Tensor, afterwards",
    calls_are_counted: r"kept \(seed 0\) the attribute 'calls' is 0 instead of 1, afterwards",
    an_attribute_is_new: "the attribute 'tokens' is not set afterwards",
    a_hook_is_registered: "the attribute 'fn._forward_hooks' is 0 instead of 1, afterwards",
    one_more_draw: "the generator of torch has another state afterwards",
    one_more_draw_of_python: "the generator of random has another state afterwards",
    dropout_that_is_lost: r"kept \(seed 0\) what it returns differs",
    another_type: "what it returns is of type Tensor instead of Tuple",
    a_number_beside: "what it returns is of type Tensor instead of tuple",
    a_gradient_is_stopped: "under autocast .* the gradient of input 0 differs",
    an_argument_is_changed: r"under autocast .* its arguments afterwards\[0\]\[0\] differs",
}


@pytest.mark.parametrize("forward", OTHER_FORWARDS, ids=lambda forward: forward.__name__)
def test_another_forward_is_noticed_with_all_rows_kept(forward):
    checked(Residual())
    with pytest.raises(Refused, match=r"^in training mode.*" + OTHER_FORWARDS[forward]):
        checked(Residual(), forward)


class Numbers(Residual):
    def forward(self, x):
        return {"out": x + self.drop_path(self.fn(x)), "rows": [1, None]}


OUTPUTS = {
    "of another type": (collections.OrderedDict, "is of type dict instead of OrderedDict"),
    "with another number": (lambda out: {**out, "rows": [2, None]}, r"returns\['rows'\]\[0\] is 1 instead of 2"),
    "with another type of number": (lambda out: {**out, "rows": [1.0, None]}, "is of type int instead of float"),
    "longer": (lambda out: {**out, "rows": [1]}, r"returns\['rows'\] holds \[0, 1\] instead of \[0\]"),
    "with a detached tensor": (lambda out: {**out, "out": out["out"].detach()}, "has requires_grad True instead of"),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_another_output_is_noticed(name):
    change, reason = OUTPUTS[name]

    def forward(self, x):
        out = Numbers.forward(self, x)
        return change(out) if self.training and self.fn.training else out

    with pytest.raises(Refused, match=reason):
        checked(Numbers(), forward)


# With some rows, and with frozen branches


class Statistics(nn.Module):
    """Statistics of the batch, by a function."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x):
        x = self.linear(x).transpose(1, 2)
        return F.batch_norm(x, None, None, training=True).transpose(1, 2) if self.training else x.transpose(1, 2)


class Noisy(Statistics):
    def forward(self, x):
        return super().forward(x + 0.1 * torch.randn_like(x))


class Evo(Statistics):
    """EvoNorm-B0: the variance of the batch, and a running one."""

    def __init__(self):
        super().__init__()
        self.register_buffer("var", torch.ones(DIM))

    def forward(self, x):
        x = self.linear(x)
        var = self.var
        if self.training:
            var = x.var((0, 1))
            self.var.lerp_(var.detach(), 0.1)
        return x / torch.maximum((var + 1e-3).sqrt(), 0.5 * x)


class Router(Statistics):
    """In training, tokens beyond an expert's capacity are left out."""

    def forward(self, x):
        tokens = self.linear(x).flatten(0, 1)
        expert = tokens[:, 0] > 0
        if self.training:
            place = torch.where(expert, expert.cumsum(0), (~expert).cumsum(0))
            tokens = tokens * (place <= 0.4 * len(tokens))[:, None]
        return tokens.view_as(x)


class Codebook(Statistics):
    """A buffer follows the inputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("code", torch.ones(DIM))

    def forward(self, x):
        x = self.linear(x)
        x = x - self.code.to(x.dtype)
        if self.training:
            self.code = self.code.lerp(x.detach().mean((0, 1)), 0.1)
        return x


class HiddenCodebook(Statistics):
    """Like `Codebook`, with an attribute instead, which the next call uses."""

    code = torch.zeros(())

    def forward(self, x):
        x = self.linear(x)
        x = x - self.code.to(x.dtype)
        if self.training:
            self.code = self.code + 0.1 * x.detach().mean((0, 1))
        return x


class Clamps(Statistics):
    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.linear.weight.mul_(0.9)
        return self.linear(x)


class Instance(Statistics):
    """Keeps running statistics of its input rows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(DIM, track_running_stats=True)

    def forward(self, x):
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


BRANCHES = {
    Statistics: "^in training mode with some rows dropped output 0 differs .* computes from the other samples too",
    Noisy: "^in training mode with some rows dropped output 0 differs .* computes from the other samples too",
    Evo: "^in training mode with some rows dropped",
    Router: "^in training mode with .* output 0 differs .* computes from the other samples too: statistics of the batch, or a capacity",
    Codebook: "buffer 'fn.code'",
    HiddenCodebook: "its branch changes the attribute 'fn.code' in training, and a frozen branch has to leave it",
    Clamps: "its branch changes the parameter 'fn.linear.weight' in training",
    Instance: "^in training mode with some rows dropped the buffer 'fn.norm.running_mean' differs",
}


@pytest.mark.parametrize("branch", BRANCHES, ids=lambda branch: branch.__name__)
def test_a_branch_that_needs_the_batch_or_moves_in_training_is_refused(branch):
    with pytest.raises(Refused, match=BRANCHES[branch]):
        checked(Residual(branch()))


class Noise(Statistics):
    def forward(self, x):
        x = (
            x
            + torch.randn_like(x) * torch.rand(len(x), 1, 1).to(x)
            + torch.randn(x.shape).to(x) * torch.rand(()).item()
        )
        x = self.linear(x) * torch.bernoulli(torch.full_like(x, 0.5))
        return F.rrelu(F.alpha_dropout(F.dropout(x, 0.1, self.training), 0.1, self.training)) * random.random()


class KeepsMap(Statistics):
    """Keeps its last result as an attribute."""

    def forward(self, x):
        self.map = self.linear(x)
        return self.map


class Attention(nn.MultiheadAttention):
    def __init__(self):
        super().__init__(DIM, 2, dropout=0.3, batch_first=True)

    def forward(self, x):
        return super().forward(x, x, x, need_weights=False)[0]


class Norm(Statistics):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(DIM)

    def forward(self, x):
        return self.norm(self.linear(x).transpose(1, 2)).transpose(1, 2)


class Ranks(Norm):
    """A network prepared for several ranks, before it moves to GPUs."""

    def __init__(self):
        super().__init__()
        self.norm = nn.SyncBatchNorm(DIM)


@pytest.mark.parametrize("branch", [Noise, KeepsMap, Attention, Norm, Ranks], ids=lambda branch: branch.__name__)
def test_random_branches_and_batch_norms_pass(branch):
    checked(Residual(branch()))


class Concatenated(Residual):
    """A dropped branch is zeros, which require no gradient."""

    def forward(self, x):
        return self.drop_path(self.fn(x))


def test_a_branch_without_a_residual_passes():
    checked(Concatenated())


def test_the_checks_are_made_when_converting():
    model = nets.tokens_net(Residual(), Residual(Statistics()))
    report = rdp.convert(model, example_inputs=nets.tokens())
    assert [(row.block, row.refused and "computes from the other samples too" in row.refused) for row in report] == [
        ("blocks.0", None), ("blocks.1", True),
    ]  # fmt: skip


# Which blocks share a check


class Sometimes(Statistics):
    """Uses statistics of the batch where an attribute says so; `repr` doesn't show the attribute."""

    def __init__(self, kind):
        super().__init__()
        self.kinds = {"kind": [kind]}

    def forward(self, x):
        return super().forward(x) if self.kinds["kind"] == ["batch"] else self.linear(x)


def test_blocks_with_other_attributes_in_children_are_checked_apart():
    model = nets.tokens_net(*(Residual(Sometimes(kind)) for kind in ("plain", "plain", "batch")))
    report = rdp.convert(model, example_inputs=nets.tokens())
    assert [row.refused is None for row in report] == [True, True, False]


def test_which_blocks_are_alike():
    assert likeness(nets.Block(0.1)) == likeness(nets.Block(0.2))
    for change in (
        lambda block: setattr(block.mlp[0], "flag", 1),
        lambda block: setattr(block.mlp[1], "approximate", "tanh"),
        lambda block: block.register_buffer("table", torch.ones(3)),
        lambda block: setattr(block, "mlp", nets.mlp(DIM).append(nn.Dropout(0.1))),
        lambda block: setattr(block.proj, "weight", block.mlp[2].weight),
        lambda block: block.proj.register_forward_hook(print),
        lambda block: setattr(block, "norm2", block.norm1),
    ):
        other = nets.Block(0.1)
        change(other)
        assert likeness(other) != likeness(nets.Block(0.1))


def test_gradients_under_autocast_may_differ_by_their_noise():
    """Sums of terms of size 20 that cancel out: noise of 0.3 is their rounding in bfloat16."""
    expected = torch.tensor([0.3, -0.2, 0.1])
    autocast = Setting("", autocast="cpu")
    assert _of_gradients("g", expected, -expected, autocast, 20.0) is None
    assert "g differs" in _of_gradients("g", expected, -expected, autocast, 2.0)
    assert "g differs" in _of_gradients("g", expected, -expected, Setting(), 20.0)
    assert "dtype" in _of_gradients("g", expected, expected.bfloat16(), autocast, 20.0)
    assert "NoneType" in _of_gradients("g", expected, None, autocast, 20.0)
