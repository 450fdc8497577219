"""A model that is converted a second time, whole or in part."""

import copy

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from rdp_kernels.convert import ConversionError
from rdp_kernels.convert.libraries import left_over
from rdp_kernels.paths.path import CONVERTED

from . import nets
from .nets import tokens


@pytest.fixture
def model():
    model = nets.tokens_net(nets.Shared, nets.Concat)
    rdp.convert(model, example_inputs=tokens())
    return model


def rates(model):
    return [path.drop_prob for block in model.blocks for _, path in block.__dict__.get(CONVERTED, ())]


def classes(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("strict", [False, True])
def test_a_second_time_it_says_so(model, strict):
    before = classes(model)
    report = rdp.convert(model, strict=strict, example_inputs=tokens())
    assert [(row.block, row.name) for row in report.already] == [
        ("blocks.0", "drop_path"), ("blocks.0", "drop_path:1"), ("blocks.1", "drop_path"),
    ]  # fmt: skip
    assert not report.converted
    assert not report.refused
    assert report.already[0].what == "converted already; skips norm1, fn1"
    assert "\n3 paths in 2 blocks were converted already and stay as they are\n" in str(report)
    assert report.summary() == "0 paths in 0 blocks converted, 3 converted already"
    assert classes(model) == before
    assert rates(model) == [0.2] * 3


def test_a_new_rate_is_taken(model):
    report = rdp.convert(model, drop_prob=0.5, example_inputs=tokens())
    assert rates(model) == [0.5] * 3
    assert [row.drop_prob for row in report] == [0.5] * 3
    assert str(report).count("were converted already; their drop_prob is 0.5 now\n") == 1
    rdp.convert(model, example_inputs=tokens())
    assert rates(model) == [0.5] * 3


@pytest.mark.parametrize("own", [None, 0.4])
def test_a_new_rate_while_a_scheme_has_the_model(model, own):
    scheme = rdp.ResidualDropPath(model, own)
    with scheme.drop_iteration() as plan:
        report = rdp.convert(model, drop_prob=0.5, example_inputs=tokens())
        model(tokens())
        assert plan.drop_probs == (own or 0.2,) * 3
    scheme.reset()
    with scheme.drop_iteration() as plan:
        model(tokens())
        assert plan.drop_probs == (own or 0.5,) * 3
    assert "reads it at its next draw, unless it was given a drop_prob of its own" in str(report)


def test_blocks_that_were_added_are_converted(model):
    model.blocks.insert(1, nets.Between(0.3))
    model.blocks.append(nets.Concat(0.3))
    report = rdp.convert(model, example_inputs=tokens())
    assert [(row.block, row.already) for row in report if row.refused is None] == [
        ("blocks.0", True), ("blocks.0", True), ("blocks.1", False), ("blocks.2", True), ("blocks.3", False),
    ]  # fmt: skip
    assert len(rdp.ResidualDropPath(model).paths) == 5


def train(model, scheme, steps=4):
    """The weights and losses of some pairs, to be compared bit by bit."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        for phase in scheme.iterations():
            loss = model(tokens()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append((phase, loss.item()))
    return losses, list(model.parameters())


@pytest.mark.parametrize("own", [None, 0.5])
def test_a_scheme_goes_on_with_new_paths(model, own):
    """Training equals to the bit that of a scheme that was made after the new paths."""
    scheme = rdp.ResidualDropPath(model, own, seed=3)
    train(model, scheme)
    torch.manual_seed(1)
    model.blocks.append(nets.Concat(0.3))
    twin = copy.deepcopy(model)
    report = rdp.convert(model, example_inputs=tokens())
    assert len(report.converted) == 1
    rdp.convert(twin, example_inputs=tokens())
    other = rdp.ResidualDropPath(twin, own, seed=3)
    other.load_state_dict({**scheme.state_dict(), "num_paths": 4})
    losses, weights = train(model, scheme)
    expected, wanted = train(twin, other)
    assert len(scheme.paths) == 4
    assert losses == expected
    assert all(map(torch.equal, weights, wanted))


def drop_iteration_open(scheme, model):
    with scheme.drop_iteration():
        model(tokens()).sum().backward()
        yield
    scheme.reset()


def reuse_pending(scheme, model):
    plan = rdp.PathPlan(torch.tensor([True, False, True]), [0.5] * 3, "block")
    with scheme.drop_iteration(plan=plan):
        model(tokens()).sum().backward()
    yield
    scheme.reset()


def alternating(scheme, model):
    handle = scheme.alternate(torch.optim.SGD(model.parameters(), lr=0.1))
    yield
    handle.remove()


BUSY = {
    drop_iteration_open: "has a drop iteration open",
    reuse_pending: "has a reuse iteration pending",
    alternating: "has a drop iteration open.*its handle's remove",
}


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("drop_prob", [None, 0.5])
def test_no_new_paths_in_the_middle_of_a_pair(model, drop_prob, busy):
    scheme = rdp.ResidualDropPath(model)
    model.blocks.append(nets.Concat(0.3))
    before = classes(model)
    for _ in busy(scheme, model):
        with pytest.raises(RuntimeError, match=f"new paths can't be made now: a scheme of the model {BUSY[busy]}"):
            rdp.convert(model, drop_prob, example_inputs=tokens())
        assert classes(model) == before
        assert rates(model) == [0.2] * 3
    assert len(rdp.convert(model, drop_prob, example_inputs=tokens()).converted) == 1


class Half(nn.Module):
    """The first drop-path is refused: its whole input is used elsewhere too."""

    def __init__(self):
        super().__init__()
        self.fn1, self.fn2 = nn.Linear(nets.DIM, nets.DIM), nn.Linear(nets.DIM, nets.DIM)
        self.drop_path1, self.drop_path2 = nets.DropPath(0.2), nets.DropPath(0.2)

    def forward(self, x):
        y = self.fn1(x)
        x = x + self.drop_path1(y) + y
        return x + self.drop_path2(self.fn2(x))


class Refused(nn.Module):
    def __init__(self):
        super().__init__()
        self.fn, self.drop_path = nn.Linear(nets.DIM, nets.DIM), nets.DropPath(0.2)

    def forward(self, x):
        y = self.fn(x)
        return x + self.drop_path(y) + y


@pytest.mark.parametrize("kind", [Half, Refused])
def test_what_was_refused_is_refused_again(kind):
    model = nets.tokens_net(kind, nets.Concat)
    first = rdp.convert(model, example_inputs=tokens())
    assert len(first.refused) == 1
    left, before = left_over(model), classes(model)
    again = rdp.convert(model, example_inputs=tokens())
    assert [(r.block, r.name, r.drop_prob) for r in again.refused] == [(r.block, r.name, 0.2) for r in first.refused]
    with pytest.raises(ConversionError, match=first.refused[0].name):
        rdp.convert(model, 0.7, strict=True, example_inputs=tokens())
    assert left_over(model) == left != []
    assert classes(model) == before
    assert set(rates(model)) == {0.2}


def test_a_strict_conversion_that_raises_leaves_no_trace():
    model = nets.tokens_net(Refused, nets.Concat)
    before = [vars(module).keys() - {"training"} for module in model.modules()]
    with pytest.raises(ConversionError):
        rdp.convert(model, strict=True, example_inputs=tokens())
    assert [vars(module).keys() - {"training"} for module in model.modules()] == before


@pytest.mark.parametrize("drop_prob", [None, 0.3])
def test_paths_inside_a_branch_stay_there(drop_prob):
    """A block with a drop-path inside another block's branch, and inside a ResidualBranch."""

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.drop_path = nets.Concat(), nets.DropPath(0.2)

        def forward(self, x):
            return x + self.drop_path(self.inner(x))

    model = nets.tokens_net(Outer, rdp.ResidualBranch(nets.Concat()))
    for _ in range(2):
        report = rdp.convert(model, drop_prob, example_inputs=tokens())
        assert {(row.block, row.nested) for row in report if row.nested} == {
            ("blocks.0.inner", "blocks.0.drop_path"), ("blocks.1.fn", "blocks.1"),
        }  # fmt: skip
        assert len(report.converted) + len(report.already) == 1
    assert len(rdp.ResidualDropPath(model, 0.5).paths) == 2


def test_a_block_around_own_branches_is_refused():
    """Nested paths can't be planned separately."""

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.fn, self.drop_path = rdp.ResidualBranch(nn.Linear(nets.DIM, nets.DIM)), nets.DropPath(0.2)

        def forward(self, x):
            return x + self.drop_path(self.fn(x))

    model = nets.tokens_net(Around)
    assert "nested paths" in rdp.convert(model, example_inputs=tokens()).refused[0].refused
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"blocks\.0\.drop_path"):
        rdp.ResidualDropPath(model, 0.5)
