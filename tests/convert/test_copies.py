"""Converted blocks that are copied, replicated, called with other weights or given another forward."""

import copy
import importlib
import pickle
import sys
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import rdp_kernels as rdp
from rdp_kernels.paths.path import CONVERTED

from . import nets
from .nets import DIM, DropPath, tokens

DROPPED = rdp.PathPlan(torch.tensor([False, False]), [0.5, 0.5], "block")


class Plain(nn.Module):
    """A block without a drop-path, whose forward the tests replace."""

    def __init__(self):
        super().__init__()
        self.fn, self.gamma = nn.Linear(DIM, DIM), nn.Parameter(torch.rand(DIM))

    def forward(self, x):
        return x + self.scaled(self.fn(x))

    def scaled(self, y):
        return doubled(self.gamma * y)


def doubled(y):
    return 2 * y


@pytest.fixture
def model():
    """Its drop-paths drop nothing unless a plan says so."""
    torch.manual_seed(0)
    model = nets.Net(nets.Concat(0.0), nets.Shared(0.0)).train()
    assert len(rdp.convert(model, example_inputs=tokens()).converted) == 3
    return model


def path_of(block):
    return block.__dict__[CONVERTED][0][1]


def plain(drop_prob=0.0):
    model = nets.Net(Plain(), Plain()).train()
    assert len(rdp.convert(model, drop_prob, example_inputs=tokens()).converted) == 2
    return model


# Copies


def test_a_shallow_copy_runs_with_its_own_children(model):
    block, x = model.blocks[0], tokens()
    expected = block(x)
    other = copy.copy(block)
    assert type(other) is type(block)
    assert torch.equal(other(x), expected)
    other._modules = {**other._modules, "fn": nets.mlp()}
    wanted = block.out(torch.cat([x, other.fn(x)], -1))
    assert torch.equal(other(x), wanted)
    other(x).sum().backward()
    assert other.fn[0].weight.grad is not None
    assert block.fn[0].weight.grad is None
    assert torch.equal(block(x), expected)
    assert path_of(block).block is block
    assert path_of(other).block is other


def by_reduce(block):
    return copy.copy(block)


def by_hand(block):
    other = object.__new__(type(block))
    other.__dict__ = dict(block.__dict__)
    return other


def by_replica(block):
    """Copies as `nn.parallel.replicate` does, without its GPUs."""
    replicas = {id(m): m._replicate_for_data_parallel() for m in block.modules()}
    for module in block.modules():
        replica = replicas[id(module)]
        for name, child in module._modules.items():
            setattr(replica, name, None if child is None else replicas[id(child)])
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter * 1)  # not a leaf
        replica._former_parameters = dict(module._parameters)
    return replicas[id(block)]


@pytest.mark.parametrize("copied", [by_reduce, by_hand, by_replica])
def test_a_shallow_copy_has_no_part_in_an_iteration_of_the_original(model, copied):
    block, x = model.blocks[0], tokens()
    scheme = rdp.ResidualDropPath(model, 0.5)
    other, around = copied(block), nets.Net(block)  # a shallow copy of the outer module holds the block itself
    torch.testing.assert_close(other(x), block(x))
    plan = rdp.PathPlan(torch.zeros(3, dtype=torch.bool), [0.5] * 3, "block")
    with scheme.drop_iteration(plan=plan):
        torch.testing.assert_close(block(x), block.out(torch.cat([x, 0 * x], -1)))
        copy.copy(around)(x)
        for one in (other, copied(block), copied(other)):
            with pytest.raises(
                RuntimeError, match=r"path 'drop_path' of Concat can't follow the plan: .* copy.deepcopy"
            ):
                one(x)
        copy.deepcopy(block)(x)
        torch.testing.assert_close(other.eval()(x), copy.deepcopy(block).eval()(x))
        other.train()
    torch.testing.assert_close(other(x), block(x))


def test_a_shallow_copy_can_have_a_scheme_of_its_own(model):
    block, x = model.blocks[0], tokens()
    other = copy.copy(block)
    first, second = rdp.ResidualDropPath(block, 0.5), rdp.ResidualDropPath(other, 0.5)
    plan = rdp.PathPlan(torch.tensor([False]), [0.5], "block")
    with first.drop_iteration(plan=plan), second.drop_iteration(plan=plan):
        assert torch.equal(other(x), block(x))


def test_a_replica_gives_the_original_its_gradients(model):
    x = tokens()
    by_replica(model)(x).square().sum().backward()
    ours = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    for grad, parameter in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(grad, parameter.grad)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_whole_copy_is_on_its_own(model, clone):
    block, x = model.blocks[1], tokens()
    other = clone(clone(by_reduce(block)))
    assert type(other) is type(block)
    assert path_of(other).block is other
    assert torch.equal(other(x), block(x))
    nn.init.zeros_(other.fn1.weight)
    assert not torch.equal(other(x), block(x))


# Other weights


def test_functional_call(model):
    x = tokens()
    other = nets.Net(nets.Concat(0.0), nets.Shared(0.0)).train()
    weights = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    out = torch.func.functional_call(model, weights, (x,))
    torch.testing.assert_close(out, other(x))
    out.sum().backward()
    assert all(w.grad is not None for w in weights.values())
    assert all(p.grad is None for p in model.parameters())


def test_an_ensemble_by_vmap(model):
    members, x = [copy.deepcopy(model) for _ in range(3)], tokens()
    for member in members:
        for parameter in member.parameters():
            nn.init.normal_(parameter, std=0.3)
    weights, buffers = torch.func.stack_module_state(members)
    base = copy.deepcopy(model).to("meta")

    def run(weights, buffers):
        return torch.func.functional_call(base, (weights, buffers), (x,))

    torch.testing.assert_close(torch.func.vmap(run)(weights, buffers), torch.stack([m(x) for m in members]))


# Another forward


def other_forward(self, x):
    return x - 3 * self.fn(x)


REPLACED = {
    "forward": lambda: (Plain, "forward", other_forward),
    "method": lambda: (Plain, "scaled", lambda self, y: 5 * y),
    "helper": lambda: (sys.modules[__name__], "doubled", lambda y: 5 * y),
}


@pytest.mark.parametrize("name", REPLACED)
def test_code_that_is_replaced_later_runs(name, monkeypatch):
    model, x = plain(), tokens()
    before, block = model(x), model.blocks[0]
    scheme = rdp.ResidualDropPath(model, 0.5)
    place, attribute, function = REPLACED[name]()
    with monkeypatch.context() as patch:
        patch.setattr(place, attribute, function)
        with pytest.warns(
            UserWarning, match=f"Plain runs as before its conversion .*: .*{attribute} was replaced after"
        ):
            out = model(x)
        assert torch.equal(out, copy.deepcopy(model).eval()(x))
        assert not torch.equal(out, before)
        with (
            pytest.raises(RuntimeError, match=f"can't follow the plan: .*{attribute} was repl"),
            scheme.drop_iteration(),
        ):
            model(x)
        scheme.remove()
        rdp.revert(model)
        report = rdp.convert(model, 0.0, example_inputs=x)  # converts the replaced code
        assert len(report.converted) == (0 if name == "forward" else 2)
        torch.testing.assert_close(model(x), out)
        rdp.revert(model)
    rdp.convert(model, 0.0, example_inputs=x)
    assert torch.equal(model(x), before)
    assert type(block) is not Plain


def test_a_base_class_is_watched_too(monkeypatch):
    class Derived(Plain):
        def forward(self, x):
            return super().forward(x)

    model, x = nets.Net(Derived()).train(), tokens()
    assert rdp.convert(model, 0.0, example_inputs=x).converted
    monkeypatch.setattr(Plain, "forward", other_forward)
    with pytest.warns(UserWarning, match="Derived runs as before its conversion .*: Plain.forward was replaced"):
        out = model(x)
    assert torch.equal(out, model.eval()(x))


@pytest.mark.parametrize("attribute", ["forward", "scaled"])
def test_a_method_that_is_replaced_on_the_instance_before_is_refused(attribute):
    model, x = nets.Net(Plain()).train(), tokens()
    block = model.blocks[0]
    block.__dict__[attribute] = types.MethodType(lambda self, y: self.gamma * y, block)
    report = rdp.convert(model, 0.2, example_inputs=x)
    assert not report.rows
    (reason,) = (b.reason for b in report.without_paths if b.block == "blocks.0")
    assert reason.startswith(f"its {attribute} was replaced on the instance")
    wrapped = nets.tokens_net(nets.Block)
    wrapped.blocks[0].forward = wrapped.blocks[0].forward
    assert all("its forward was replaced" in row.refused for row in rdp.convert(wrapped, example_inputs=x))


def test_a_method_that_is_replaced_on_the_instance_later_runs():
    model, x = plain(), tokens()
    model.blocks[0].scaled = lambda y: 5 * y
    with pytest.warns(UserWarning, match="scaled was replaced after its conversion"):
        out = model.blocks[0](x)
    assert torch.equal(out, x + 5 * model.blocks[0].fn(x))


def test_a_forward_that_is_replaced_on_the_instance_later_is_reported_by_the_scheme():
    model, x = plain(), tokens()
    scheme = rdp.ResidualDropPath(model, 0.5)
    block = model.blocks[1]
    block.forward = types.MethodType(other_forward, block)
    told = pytest.warns(
        UserWarning, match=r"'blocks.1.*' in a drop iteration.*its forward was replaced on the instance"
    )
    with told, scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor([True, True]), [0.5] * 2, "block")):
        model(x).sum().backward()


def test_a_wrapper_around_the_forward_is_no_hindrance():
    """As with accelerate's hooks, the instance's forward calls the converted one."""
    model, x = plain(), tokens()
    for block in model.blocks:
        block.forward = lambda *args, inner=block.forward: inner(*args)
    scheme = rdp.ResidualDropPath(model, 0.5)
    with scheme.drop_iteration(plan=DROPPED):
        assert torch.equal(model.blocks[0](x), x)
        model(x).sum().backward()


LIBRARY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fn = nn.Linear(8, 8)

    def forward(self, x):{doc}
        return x + self.scaled(self.fn(x))

    def scaled(self, y{annotation}):
        return {factor} * y  {comment}
"""


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Makes and loads a version of a library."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(doc="", annotation="", factor=2, comment=""):
        text = LIBRARY.format(doc=doc, annotation=annotation, factor=factor, comment=comment)
        (tmp_path / "rdp_test_library.py").write_text(text)
        sys.modules.pop("rdp_test_library", None)
        importlib.invalidate_caches()
        return importlib.import_module("rdp_test_library")

    yield load
    sys.modules.pop("rdp_test_library", None)


def test_a_pickle_meets_another_version_of_the_library(library):
    x = torch.randn(4, DIM)
    model = nn.Sequential(library().Block()).train()
    assert rdp.convert(model, 0.0, example_inputs=x).converted
    expected, pickled = model(x), pickle.dumps(model)

    library(doc='\n        """Says more."""', annotation=": torch.Tensor", comment="# and a comment")
    same = pickle.loads(pickled)
    assert type(same[0]) is not type(model[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(same(x), expected)

    library(factor=3)
    other = pickle.loads(pickled)
    for again in (other, pickle.loads(pickle.dumps(other)), copy.deepcopy(other)):
        with pytest.warns(UserWarning, match="its class has other code than when it was converted"):
            out = again(x)
        assert torch.equal(out, again.eval()(x))
    other.train()
    scheme = rdp.ResidualDropPath(other, 0.5)
    plan = rdp.PathPlan(torch.tensor([False]), [0.5], "block")
    wanted = pytest.raises(RuntimeError, match="can't follow the plan: its class has other code")
    with wanted, scheme.drop_iteration(plan=plan):
        other(x)
    scheme.remove()
    rdp.revert(other)
    assert rdp.convert(other, 0.0, example_inputs=x).converted
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(other(x), x + 3 * other[0].fn(x))


# Other classes and calls of a block


def weight_norm(block):
    parametrizations.weight_norm(block.fn)


def old_weight_norm(block):
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(block.fn)


def spectral_norm(block):
    parametrizations.spectral_norm(block.fn)


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


def own_parameter(block):
    parametrize.register_parametrization(block, "gamma", Twice())


@pytest.mark.parametrize("wrap", [weight_norm, old_weight_norm, spectral_norm])
def test_parametrized_after_conversion(wrap):
    """The block runs with the computed weights, and the original weights of a dropped branch get no gradient."""
    model, x = plain(), tokens()
    block = model.blocks[0]
    wrap(block)
    scheme = rdp.ResidualDropPath(model, 0.5)
    kept = rdp.PathPlan(torch.tensor([True, True]), [0.0, 0.5], "block")
    with scheme.drop_iteration(plan=kept):
        out = block(x)
        block.eval()
        torch.testing.assert_close(out, block(x))
        block.train()
        model(x).sum().backward()
    assert all(p.grad is not None for p in block.parameters())
    assert {id(p) for p in block.parameters()} == {id(p) for p in scheme.paths[0].parameters()}
    model.zero_grad()
    scheme.reset()
    plan = rdp.PathPlan(torch.tensor([True, False]), [0.0, 0.5], "block")
    for phase in scheme.iterations(plan=plan):
        model.zero_grad()
        model(x).sum().backward()
        assert all((p.grad is not None) == (phase == "drop") for p in block.parameters()), phase


def test_a_class_that_was_made_of_a_converted_one():
    """Made of a block whose own parameter is parametrized: its forward falls back to the original, and revert
    raises."""
    model, x = plain(), tokens()
    block = model.blocks[0]
    own_parameter(block)
    with pytest.warns(UserWarning, match="Plain runs as before its conversion .*'gamma'"):
        assert torch.equal(block(x), Plain.forward(block, x))
    classes = [type(m) for m in model.modules()]
    with pytest.raises(RuntimeError, match="ParametrizedPlain was made of the converted Plain.*undo that first"):
        rdp.revert(model)
    assert [type(m) for m in model.modules()] == classes
    assert path_of(copy.deepcopy(block)).block is not block
    with pytest.raises((RuntimeError, pickle.PicklingError)):
        pickle.dumps(block)
    parametrize.remove_parametrizations(block, "gamma", leave_parametrized=True)
    rdp.revert(model)
    assert type(block) is Plain


def test_a_block_that_was_given_another_class():
    """It runs the new class's forward; the scheme warns about its path, and revert leaves its class."""
    model, x = plain(), tokens()
    scheme = rdp.ResidualDropPath(model, 0.5)
    model.blocks[1].__class__ = Plain
    plan = rdp.PathPlan(torch.tensor([False, True]), [0.5] * 2, "block")
    with pytest.warns(UserWarning, match=r"didn't run path 'blocks.1"), scheme.drop_iteration(plan=plan):
        assert torch.equal(model.blocks[1](model.blocks[0](x)), Plain.forward(model.blocks[1], x))
    scheme.remove()
    rdp.revert(model)
    assert [type(block) for block in model.blocks] == [Plain, Plain]
    assert not any(CONVERTED in vars(module) for module in model.modules())


class InheritsTorchs(nn.TransformerEncoderLayer):
    """Its forward is torch's own."""


def test_a_forward_that_is_torchs_own(monkeypatch):
    model = nn.Sequential(InheritsTorchs(DIM, 2, 16, dropout=0.0, batch_first=True)).train()
    report = rdp.convert(model, 0.0, example_inputs=tokens())
    assert report.converted or report.without_paths
    if report.converted:
        monkeypatch.setattr(nn.TransformerEncoderLayer, "forward", lambda self, x: x)
        with pytest.warns(UserWarning, match="InheritsTorchs.forward was replaced"):
            assert model(tokens()).equal(tokens())


@pytest.mark.parametrize("first", ["compile", "convert"])
def test_block_compile(first):
    """`Module.compile`, before conversion or after it."""
    torch._dynamo.reset()
    model, x = nets.Net(Plain()).train(), tokens()
    block = model.blocks[0]
    if first == "compile":
        block.compile(backend="eager", fullgraph=True)
        block(x)
    rdp.convert(model, 0.0, example_inputs=x)
    if first == "convert":
        block.compile(backend="eager", fullgraph=True)
    rdp.convert(model, 1.0, example_inputs=x)
    assert torch.equal(block(x), x)
    other = pickle.loads(pickle.dumps(block))
    assert other._compiled_call_impl is None
    assert torch.equal(other(x), x)


def test_a_state_of_its_own_stays_its_own():
    """Attributes that a block's `__getstate__` leaves out aren't in pickles of the converted block."""
    model = nets.Net(Forgets()).train()
    assert rdp.convert(model, example_inputs=tokens()).converted
    model.blocks[0].cache = {"large": 1}
    assert pickle.loads(pickle.dumps(model.blocks[0])).cache == {}
    assert copy.copy(model.blocks[0]).cache == {}
    torch.manual_seed(0)
    expected = model(tokens())
    torch.manual_seed(0)
    assert torch.equal(pickle.loads(pickle.dumps(model))(tokens()), expected)


class Forgets(nn.Module):
    def __init__(self):
        super().__init__()
        self.fn, self.drop_path, self.cache = nn.Linear(DIM, DIM), DropPath(0.2), {}

    def __getstate__(self):
        return {**self.__dict__, "cache": {}}

    def forward(self, x):
        return x + self.drop_path(self.fn(x))
