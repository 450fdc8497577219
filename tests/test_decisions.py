"""A path's decision takes one call of `decide`, and that calls no other function of the package.

The tests count calls of functions whose code is in the package, from the call of `decide` to its return. Code generated
by `dataclasses` and calls in torch don't count. In sample mode the first path of a forward makes the decisions of all
paths, so the tests look at the other paths.
"""

import copy
import gc
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rdp_kernels as rdp
from rdp_kernels.paths.binding import STOCHASTIC_DEPTH
from rdp_kernels.paths.decision import FROZEN, LEARN, ROWS, SKIP, Decision

PACKAGE = str(Path(rdp.__file__).parent)
PLANS = {
    "block": rdp.PathPlan(torch.tensor([True, False, True]), [0.5] * 3, "block"),
    "sample": rdp.PathPlan(torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]) > 0, [0.5] * 3, "sample"),
}
KINDS = {
    ("block", "drop"): [LEARN, SKIP, LEARN],
    ("block", "reuse"): [FROZEN, LEARN, FROZEN],
    ("sample", "drop"): [ROWS, ROWS, LEARN],
    ("sample", "reuse"): [ROWS, ROWS, FROZEN],
}


def paths(chain=True):
    branches = [rdp.ResidualBranch(nn.Linear(3, 3), drop_prob=0.5) for _ in range(3)]
    return rdp.ResidualSequence(*branches) if chain else nn.Sequential(*branches)


def model(chain=True):
    return nn.Sequential(nn.Linear(3, 3), paths(chain), nn.Linear(3, 3))


def traced(run):
    """For each decision in `run()`: the names of the package's functions that it called, `decide` first, and its
    result."""
    found, inside = [], 0

    def look(frame, event, argument):
        nonlocal inside
        if event not in ("call", "return") or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if event == "call" and (inside or frame.f_code.co_name == "decide"):
            if not inside:
                found.append([])
            inside += 1
            found[-1].append(f"{type(frame.f_locals.get('self')).__name__}.{frame.f_code.co_name}")
        elif event == "return" and inside:
            inside -= 1
            if not inside:
                found[-1] = found[-1], argument

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        run()
    finally:
        sys.setprofile(before)
    return found


@pytest.mark.parametrize("chain", [True, False])
@pytest.mark.parametrize("build", [model, paths])
@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("train_rest", [False, True])
def test_a_decision_is_one_function(train_rest, mode, build, chain):
    net, x = build(chain), torch.randn(4, 3)
    scheme = rdp.ResidualDropPath(net, 0.5, mode=mode, train_rest=train_rest)
    for phase in scheme.iterations(plan=PLANS[mode]):
        decisions = traced(lambda: net(x).sum().backward())
        assert [decision.kind for _, decision in decisions] == KINDS[mode, phase]
        assert all(functions == ["Iteration.decide"] for functions, _ in decisions[mode == "sample" :])


@pytest.mark.parametrize("chain", [True, False])
def test_without_an_iteration_too(chain):
    net, x = model(chain), torch.randn(1, 3)
    bound = copy.deepcopy(net)
    scheme = rdp.ResidualDropPath(bound, 0.5)
    for called, decider in (net, "StochasticDepth.decide"), (bound, "History.decide"):
        decisions = traced(lambda called=called: called(x))
        assert [functions[0] for functions, _ in decisions] == [decider] * 3
        assert all(isinstance(decision, Decision) for _, decision in decisions)
        assert traced(lambda called=called: called.eval()(x)) == []
    assert scheme.phase is None


def test_who_decides():
    net, x = model(), torch.randn(2, 3)
    bindings = [path.binding for path in net[1]]
    deciders = lambda: {id(binding.decider): binding.decider for binding in bindings}.values()  # noqa: E731
    scheme = rdp.ResidualDropPath(net, 0.5)
    (between,) = deciders()
    for phase in scheme.iterations(plan=PLANS["block"]):
        net(x)
        (iteration,) = deciders()
        assert (iteration.phase, between.phase, iteration is between) == (phase, phase, False)
    assert [*deciders()] == [between]
    assert between.phase is None
    scheme.remove()
    assert [*deciders()] == [STOCHASTIC_DEPTH]


def test_paths_do_not_keep_their_scheme():
    net = model()
    scheme = rdp.ResidualDropPath(net, 0.5)
    for _ in scheme.iterations(plan=PLANS["block"]):
        net(torch.randn(2, 3)).sum().backward()
    references, bindings = [weakref.ref(scheme), weakref.ref(net)], [path.binding for path in net[1]]
    gc.collect()
    gc.disable()
    try:
        del scheme
        assert references[0]() is None
        assert all(binding.scheme is None and binding.decider is STOCHASTIC_DEPTH for binding in bindings)
        del net
        assert references[1]() is None
    finally:
        gc.enable()


def test_a_recomputation_finds_its_iteration():
    """Its backward runs inside another iteration, whose decisions differ."""
    net, x = paths(chain=False), torch.randn(4, 3, requires_grad=True)
    scheme = rdp.ResidualDropPath(net, 0.5)
    found = {}
    for phase in scheme.iterations(plan=PLANS["block"]):
        found[phase] = checkpoint(net, x, use_reentrant=False)
        if phase == "reuse":
            for name in ("drop", "reuse"):
                decisions = traced(lambda name=name: found[name].sum().backward())
                assert [decision.kind for _, decision in decisions][: len(KINDS["block", name])] == KINDS["block", name]
                assert all(functions[:2] == ["Iteration.decide", "History.decide"] for functions, _ in decisions)
