"""What is looked up of a model is looked up again where the model has changed, and only there."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import rdp_kernels as rdp
from rdp_kernels.paths.path import batch_norms_of, modules_of, parameter_refs_of, parts_of
from rdp_kernels.scheme.rest import Rest


def path(**options):
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
    return rdp.ResidualBranch(inner, drop_prob=0.5, **options)


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def delete_first(branch):
    del branch.fn[0]  # makes a new dict of children


def replace_children(branch):
    branch.fn._modules = dict(branch.fn._modules, more=nn.Linear(4, 4))


IN_BRANCHES = {
    "the branch": lambda branch: setattr(branch, "fn", nn.Sequential(nn.BatchNorm1d(4))),
    "a norm": lambda branch: setattr(branch, "norm", nn.LayerNorm(4)),
    "a layer": lambda branch: branch.fn.__setitem__(0, nn.BatchNorm1d(4)),
    "a deep layer": lambda branch: branch.fn[1].__setitem__(1, nn.BatchNorm1d(4)),
    "one more layer": lambda branch: branch.fn[1].append(nn.BatchNorm1d(4)),
    "a layer of a leaf": lambda branch: branch.fn[0].add_module("adapter", nn.BatchNorm1d(4)),
    "one layer less": delete_first,
    "the children": replace_children,
    "a child set to None": lambda branch: branch.fn[1]._modules.__setitem__("1", None),
    "a parametrization": lambda branch: parametrize.register_parametrization(branch.fn[0], "weight", Doubled()),
    "a class": lambda branch: setattr(branch.fn[0], "__class__", nn.Conv1d),
    "a parameter": lambda branch: branch.fn[0].register_parameter("more", nn.Parameter(torch.ones(4))),
}


@pytest.mark.parametrize("change", IN_BRANCHES)
def test_a_change_of_a_branch_is_seen(change):
    branch = path()
    before = parts_of(branch)
    assert parts_of(branch) is before
    IN_BRANCHES[change](branch)
    tops = [top for top in (branch.norm, branch.fn) if top is not None]
    modules = [module for top in tops for module in top.modules()]
    assert modules_of(branch) == modules
    assert batch_norms_of(branch) == [m for m in modules if isinstance(m, nn.BatchNorm1d)]
    assert parameter_refs_of(branch) == [(module, name) for module in modules for name in module._parameters]
    assert [m for m in modules if isinstance(m, (nn.BatchNorm1d, nn.Conv1d))] == parts_of(branch).layers
    assert parts_of(branch) is parts_of(branch)


def test_a_copy_has_parts_of_its_own():
    branch = path()
    parts_of(branch)
    copied = copy.deepcopy(branch)
    assert modules_of(copied) == list(copied.fn.modules())


def test_a_batch_norm_that_is_put_in_later_sees_the_whole_batch():
    branch, x = path(), torch.randn(50, 4)
    branch(x)
    norm = branch.fn[1][1] = nn.BatchNorm1d(4)
    sizes = []
    norm.register_forward_hook(lambda norm, args, out: sizes.append(len(args[0])))
    branch(x)
    assert sizes == [50]


# The rest


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
        self.paths = rdp.ResidualSequence(*(path() for _ in range(3)))
        self.head = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Identity()})

    def forward(self, x):
        return self.head["a"](self.paths(self.stem(x)))


def share_a_module(net):
    net.paths[0].fn.append(net.stem[1])


IN_THE_REST = {
    "nothing": lambda net: None,
    "the head": lambda net: net.head.update({"a": nn.Linear(4, 2)}),
    "another layer": lambda net: setattr(net, "more", nn.Linear(4, 4)),
    "two names": lambda net: net.head.update({"a": net.head["b"], "b": net.head["a"]}),
    "one layer less": lambda net: net.stem.__delitem__(0),
    "a parameter": lambda net: setattr(net, "position", nn.Parameter(torch.zeros(4))),
    "a bias": lambda net: setattr(net.stem[2], "bias", nn.Parameter(torch.zeros(4))),
    "no bias": lambda net: setattr(net.stem[0], "bias", None),
    "no statistics": lambda net: setattr(net.stem[1], "running_mean", None),
    "a gamma": lambda net: setattr(net.paths[1], "gamma", nn.Parameter(torch.ones(4))),
    "a shortcut": lambda net: setattr(net.paths[1], "shortcut", nn.Linear(4, 4)),
    "a tied weight": lambda net: setattr(net.head["a"], "weight", net.paths[1].fn[0].weight),
    "a tied module": share_a_module,
    "a branch": lambda net: setattr(net.paths[1], "fn", nn.BatchNorm1d(4)),
}


def state_of(rest):
    found = rest._refs, rest._batch_norms, rest._holders, rest.names, [[*refs] for refs in rest.shared]
    return *found, rest.handles.keys(), rest.path_modules(), [parts.modules for parts in rest.parts], rest.nested


@pytest.mark.parametrize("change", IN_THE_REST)
def test_a_change_of_the_rest_is_seen(change):
    net = Net()
    scheme = rdp.ResidualDropPath(net, 0.5)
    rest = scheme._rest
    refs = rest._refs
    IN_THE_REST[change](net)
    rest.refresh()
    fresh = Rest(net, scheme.paths, lambda: False, True)
    assert state_of(rest) == state_of(fresh)
    assert (rest._refs is refs) == (change in ("nothing", "a tied weight")), "it is looked up only where it has changed"


def test_an_interrupted_look_is_done_again():
    net = Net()
    rest = rdp.ResidualDropPath(net, 0.5)._rest
    share_a_module(net)
    hook, rest._hook = rest._hook, None
    with pytest.raises(TypeError):
        rest.refresh()
    rest._hook = hook
    before = rest._refs
    rest.refresh()
    assert rest._refs is not before


@pytest.mark.parametrize("place", [lambda net: (net.paths[1], "gamma"), lambda net: (net.paths[1].fn[0], "bias")])
def test_what_the_rest_shares_with_a_path(place):
    net = Net()
    net.paths[1].gamma = nn.Parameter(torch.ones(4))
    rest = rdp.ResidualDropPath(net, 0.5)._rest
    rest.refresh()
    assert not any(rest.shared)
    module, name = place(net)
    setattr(module, name, net.stem[0].bias)
    rest.refresh()
    assert rest.shared == [[], [(module, name)], []]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.drop = nn.Linear(4, 4), rdp.DropPath(0.5)

    def forward(self, x):
        return x + self.drop(self.fc(x))


def test_a_block_that_is_converted_later_is_a_path_of_the_scheme():
    """Its modules and their names stay the same."""
    net = nn.Sequential(nn.Linear(4, 4), path(), Block())
    scheme = rdp.ResidualDropPath(net, 0.5)
    rdp.convert(net[2], example_inputs=torch.randn(2, 4))
    for _ in scheme.iterations():
        net(torch.randn(2, 4)).sum().backward()
    assert [path.name for path in scheme.paths] == ["1", "2.drop"]


def test_a_path_that_comes_to_lie_in_another_is_refused():
    net = nn.Sequential(rdp.ResidualBranch(nn.Sequential(nn.Linear(4, 4), Block())), nn.Linear(4, 4))
    scheme = rdp.ResidualDropPath(net, 0.5)
    plan = rdp.PathPlan(torch.tensor([False]), [0.5], "block")
    with scheme.drop_iteration(plan=plan):
        net(torch.randn(2, 4))
    rdp.convert(net[0].fn, example_inputs=torch.randn(2, 4))
    with pytest.raises(ValueError, match="lies inside"), scheme.reuse_iteration():
        pass
