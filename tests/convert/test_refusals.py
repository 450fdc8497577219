"""Blocks that can't be converted are refused with a reason, or run as before; results are never wrong."""

import gc
import re
import sys
import threading
import time
import warnings

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.convert.calls import BlockCall
from rdp_kernels.convert.check import _castable
from rdp_kernels.paths.path import CONVERTED

from . import nets
from .nets import DIM, DropPath, Net, mlp, tokens


class Residual(nn.Module):
    """`x + drop_path(fn(x))`, to be varied."""

    def __init__(self, fn=None):
        super().__init__()
        self.fn, self.drop_path = mlp() if fn is None else fn, DropPath(0.2)

    def forward(self, x):
        return x + self.drop_path(self.fn(x))


class InPlace(nn.Module):
    """Changes its input, and so the residual too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.linear(x.data.mul_(2) + 0 * x)


class MixesSamples(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x):
        return self.linear(x - x.mean(0, keepdim=True))


class BehindZeros(MixesSamples):
    """Its branch is zero at first, as networks are initialised, whatever it computes."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Parameter(torch.zeros(DIM))
        self.gamma = nn.Parameter(torch.zeros(DIM))

    def forward(self, x):
        return self.gamma * (self.inner * super().forward(x))


class HoldsALock(Residual):
    """It can't be copied, and so it can't be checked."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class AsksForTypes(Residual):
    def forward(self, x):
        y = self.fn(x)
        y = 2 * y if isinstance(y, torch.Tensor) else 3 * y
        return x + self.drop_path(y)


class AsksForNumbers(Residual):
    def forward(self, x):
        y = self.fn(x)
        if y.sum() > 0:
            y = 2 * y
        return x + self.drop_path(y)


class Assigns(Residual):
    def forward(self, x):
        y = self.fn(x)
        y[:, 0] = 0
        return x + self.drop_path(y)


class ChangesInPlace(Residual):
    def forward(self, x):
        y = self.fn(x)
        y.mul_(2)
        return x + self.drop_path(y)


class ChangesItsInput(Residual):
    def forward(self, x):
        x += self.drop_path(self.fn(x))
        return x


class MakesTensors(Residual):
    def forward(self, x):
        return x + self.drop_path(self.fn(x) * torch.arange(DIM))


class UsedTwice(Residual):
    """The branch's module is called for the residual too."""

    def forward(self, x):
        return self.fn(x) + self.drop_path(self.fn(2 * x))


class ScaledTwice(Residual):
    """A parameter of the block scales the branch and the residual."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(DIM))

    def forward(self, x):
        return self.gamma * x + self.drop_path(self.gamma * self.fn(x))


class Everything(Residual):
    """The drop-path's input is used outside of it too."""

    def forward(self, x):
        y = self.fn(x)
        return x + self.drop_path(y) + y


class Calls(Residual):
    def forward(self, x, flag=None):
        return x + self.drop_path(self.fn(x))


REFUSED = {
    "hidden in-place child": (lambda: Residual(InPlace()), "changes its own input|differs from the original"),
    "samples are mixed": (lambda: Residual(MixesSamples()), "with some rows dropped .* differs from the original"),
    "samples are mixed, behind a γ of zeros": (lambda: Residual(BehindZeros()), "differs from the original"),
    "an error of its own": (HoldsALock, "TypeError: cannot pickle"),
    "isinstance of a proxy": (AsksForTypes, "differs from the original"),
    "if over numbers": (AsksForNumbers, "depends on numbers in a tensor"),
    "setitem": (Assigns, "assigns to a part of a tensor"),
    "in place, old name": (ChangesInPlace, "changes a tensor in place and uses it under its old name"),
    "input in place": (ChangesItsInput, "changes its own input in place"),
    "tensor of constants": (MakesTensors, "makes a tensor of constants"),
    "module used outside": (UsedTwice, "is called outside of all branches too"),
    "parameter used outside": (ScaledTwice, "'gamma' of a branch is used outside of all branches too"),
    "nothing to skip": (Everything, "used elsewhere too, so there is nothing to skip"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why_and_changes_nothing(name):
    make, reason = REFUSED[name]
    model = nets.tokens_net(make())
    before = nets.tokens_net(make())  # not a copy, as a lock can't be copied
    before.load_state_dict(model.state_dict())
    report = rdp.convert(model, example_inputs=tokens())
    (row,) = report.refused
    assert (row.block, row.name) == ("blocks.0", "drop_path")
    assert re.search(reason, row.refused), row.refused
    assert type(model.blocks[0]) is type(before.blocks[0])
    left = vars(model.blocks[0]).keys() - vars(before.blocks[0]).keys()
    assert left == {"_rdp_refused"}, "nothing of torch.fx's"
    torch.manual_seed(5)
    expected = before(tokens())
    torch.manual_seed(5)
    assert torch.equal(model(tokens()), expected)
    with pytest.raises(rdp.ConversionError, match=r"blocks.0.drop_path \(\w+\): "):
        rdp.convert(model, strict=True, example_inputs=tokens())


def test_strict_leaves_the_model_as_it_was():
    model = nets.tokens_net(nets.Block, Assigns())
    with pytest.raises(rdp.ConversionError):
        rdp.convert(model, strict=True, example_inputs=tokens())
    assert type(model.blocks[0]) is nets.Block
    assert not any(CONVERTED in module.__dict__ for module in model.modules())


def test_a_nested_drop_path_stays_a_mask_in_the_branch_around_it():
    model = nets.tokens_net(nets.Nested)
    report = rdp.convert(model, example_inputs=tokens())
    assert [(row.name, row.nested) for row in report] == [("drop_path", "drop_path:1"), ("drop_path:1", None)]
    assert len(rdp.ResidualDropPath(model, 0.5).paths) == 1


def test_an_attribute_that_changes_after_conversion():
    model = nets.tokens_net(nets.Block)
    rdp.convert(model, example_inputs=tokens())
    model.blocks[0].heads = 4
    with pytest.warns(
        UserWarning, match="Block runs as before its conversion and skips nothing: its attribute 'heads' was 2"
    ):
        model(tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens())  # warned once
    scheme = rdp.ResidualDropPath(model, 0.5)
    with pytest.raises(RuntimeError, match="can't follow the plan: its attribute 'heads'"), scheme.drop_iteration():
        model(tokens())
    scheme.remove()
    rdp.revert(model)
    assert not rdp.convert(model, example_inputs=tokens()).refused


def test_a_call_in_another_way():
    block, x = nets.tokens_net(Calls()).blocks[0], tokens()
    model = Net(block)
    rdp.convert(model, example_inputs=x)
    with pytest.warns(UserWarning, match="it is called in another way than when it was converted"):
        block(x, flag=True)
    rdp.ResidualDropPath(model, 0.5).remove()


class HandsOn(Residual):
    """Passes keyword arguments on to its children, as transformers' blocks do; `flag` makes a difference."""

    def forward(self, x, **kwargs):
        return x + self.drop_path(self.inner(x, **kwargs))

    def inner(self, x, flag=False, **_):
        return self.fn(x) * (2 if flag else 1)


class CachesByItself(HandsOn):
    def forward(self, x, use_cache=True, **kwargs):
        return x + self.drop_path(self.inner(x, flag=not use_cache, **kwargs))


def test_a_trainers_argument_for_the_loss_is_no_other_call():
    blocks = nets.tokens_net(HandsOn(), CachesByItself()).blocks
    x, model, other = tokens(), Net(blocks[0]), Net(blocks[1])
    rdp.convert(model, example_inputs=x)
    rdp.convert(other, example_inputs=x)
    scheme = rdp.ResidualDropPath(model, 0.5)
    plan = rdp.PathPlan(torch.tensor([True]), [0.5], "block")
    with scheme.drop_iteration(plan=plan):
        out = blocks[0](x, num_items_in_batch=torch.tensor(4), use_cache=False)
        torch.testing.assert_close(out, x + 2 * blocks[0].fn(x))
        with pytest.raises(RuntimeError, match="called in another way"):
            blocks[0](x, num_items_in_batch=torch.tensor(4), flag=True)
    scheme = rdp.ResidualDropPath(other, 0.5)
    pair = scheme.iterations(plan=plan)
    next(pair)
    with pytest.raises(RuntimeError, match="called in another way"):
        blocks[1](x, use_cache=False)


def test_sizes_that_an_if_asked_for():
    model = nets.tokens_net(nets.Sizes)
    rdp.convert(model, example_inputs=tokens())
    with pytest.warns(UserWarning, match="its inputs had another shape"):
        model(torch.randn(2, 8, DIM))


def test_any_batch_size_and_any_other_size_serve():
    model = nets.tokens_net(nets.Block, nets.Windows, nets.Concat)
    rdp.convert(model, example_inputs=tokens())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for shape in ((1, 6), (2, 2), (9, 10)):
            model(torch.randn(*shape, DIM)).sum().backward()


BAD = {
    "model": (lambda: rdp.convert("vit"), TypeError, "model must be a torch.nn.Module, got str"),
    "drop_prob": (lambda: rdp.convert(nets.tokens_net(nets.Plain), 1.5), ValueError, "drop_prob must be"),
    "strict": (lambda: rdp.convert(nets.tokens_net(nets.Block), strict="no"), TypeError, "strict must be"),
    "no tensor": (lambda: rdp.convert(nets.tokens_net(nets.Block), example_inputs=3), ValueError, "must hold a tensor"),
    "wrong shape": (
        lambda: rdp.convert(nets.tokens_net(nets.Block), example_inputs=torch.ones(2, 3)),
        ValueError,
        "example_inputs: the model can't be called with them",
    ),
    "no example": (lambda: rdp.convert(nets.tokens_net(nets.Block)), ValueError, "example_inputs: the model can't"),
    "revert": (lambda: rdp.revert(None), TypeError, "model must be a torch.nn.Module, got NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_model_without_anything_to_convert():
    model = nn.Sequential(nn.Linear(DIM, DIM))
    report = rdp.convert(model, example_inputs=torch.ones(2, DIM))
    assert "no block has a drop-path" in str(report)
    with pytest.raises(ValueError, match="model has no paths"):
        rdp.ResidualDropPath(model)


def test_the_scheme_warns_of_drop_paths_that_keep_dropping_by_themselves():
    model = nets.tokens_net(nets.Block, Assigns())
    rdp.convert(model, example_inputs=tokens())
    with pytest.warns(UserWarning, match=r"paths of the scheme and keep dropping .*: blocks.1.drop_path") as told:
        rdp.ResidualDropPath(model, 0.5).remove()
    assert [warning.filename for warning in told] == [__file__]
    model.blocks[1].drop_path.drop_prob = 0.0
    rdp.ResidualDropPath(model, 0.5).remove()
    rdp.revert(model)
    assert not any("_rdp_refused" in vars(module) for module in model.modules())


def test_a_drop_path_that_is_never_called_is_ignored():
    block = nets.Block()
    block.drop_path3 = DropPath(0.2)
    model = nets.tokens_net(block)
    report = rdp.convert(model, strict=True, example_inputs=tokens())
    assert [row.name for row in report] == ["drop_path1", "drop_path2"]
    rdp.ResidualDropPath(model, 0.5)


class SizeAsArgument(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Sized()

    def forward(self, x):
        return self.block(x, x.shape[1:])


class Sized(Residual):
    def forward(self, x, size):
        return x + self.drop_path(self.fn(x).reshape(-1, *size))


def test_a_size_is_a_tuple_of_numbers():
    model = nets.tokens_net(SizeAsArgument)
    assert not rdp.convert(model, example_inputs=tokens()).refused
    for path in rdp.ResidualDropPath(model, 0.5).paths:
        path.module.binding.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(tokens())
        model(torch.randn(2, 8, DIM))


def test_the_check_is_as_strict_as_float64_allows():
    """A block that computes in float32 by itself is compared less strictly; others aren't."""
    call = BlockCall((tokens(),), {})
    assert _castable(nets.Block(), call) == (True, 1e-9)
    block = nets.Block()
    block.norm1.forward = lambda x: nn.functional.layer_norm(x.float(), (DIM,)).to(x.dtype)
    assert _castable(block, call) == (True, 2e-5)


class Attention(nn.Module):
    """Returns weights on request, as in transformers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x, flag=None):
        return (self.linear(x), x.mean(-1) if flag else None)


class ReturnsTuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.drop_path = Attention(), DropPath(0.2)

    def forward(self, x, flag=None):
        outputs = self.attention(x, flag)
        return (x + self.drop_path(outputs[0]), *outputs[1:])


class AsksForOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = ReturnsTuples()

    def forward(self, x, flag=None):
        return self.block(x, flag)


def test_unrequested_results_and_a_constant_that_changes():
    model = AsksForOutputs().train()
    report = rdp.convert(model, example_inputs=tokens())
    assert not report.refused, str(report)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, nothing = model(tokens())
    assert nothing is None
    with pytest.warns(UserWarning, match="it is called in another way"):
        _, weights = model(tokens(), flag=True)
    assert weights is not None


def test_a_drop_path_in_eval_mode_drops_nothing():
    model = nets.tokens_net(nets.Concat)
    rdp.convert(model, example_inputs=tokens())
    model.blocks[0].drop_path.drop_prob = 0.9
    model.blocks[0].drop_path.eval()
    x = tokens()
    torch.testing.assert_close(model(x), model.eval()(x))


def test_a_block_in_the_branch_of_another_stays_as_it_was():
    model = nets.tokens_net(Residual(Residual()))
    report = rdp.convert(model, example_inputs=tokens())
    assert [(row.block, row.nested) for row in report] == [("blocks.0", None), ("blocks.0.fn", "blocks.0.drop_path")]
    assert CONVERTED not in model.blocks[0].fn.__dict__
    rdp.ResidualDropPath(model, 0.5)


def test_garbage_collection_is_no_call_of_the_forward():
    """Libraries measure it with `gc.callbacks`, which run in the middle of any code."""

    def callback(phase, info):
        time.perf_counter()

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    gc.callbacks.append(callback)
    try:
        report = rdp.convert(nn.Sequential(Residual(), Residual()), example_inputs=tokens())
    finally:
        gc.callbacks.remove(callback)
        gc.set_threshold(*threshold)
    assert len(report.converted) == 2
    assert gc.isenabled()


def test_tracing_has_a_bound(monkeypatch):
    """A forward with endless operations would otherwise fill the memory."""
    monkeypatch.setattr(sys.modules["rdp_kernels.convert.trace"], "LARGEST", 5)
    model = nets.tokens_net(nets.Block)
    report = rdp.convert(model, example_inputs=tokens())
    assert all("makes more than 5 operations" in row.refused for row in report)
