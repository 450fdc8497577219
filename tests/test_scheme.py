import contextlib
import copy
import gc
import itertools
import pickle
import warnings

import pytest
import torch
from torch import nn

import rdp_kernels as rdp


class Net(nn.Module):
    def __init__(self, num_paths=4, **options):
        super().__init__()
        self.stem = nn.Linear(3, 4)
        self.position = nn.Parameter(torch.zeros(4))
        self.paths = rdp.ResidualSequence(
            *(rdp.ResidualBranch(nn.Linear(4, 4), norm=nn.LayerNorm(4), **options) for _ in range(num_paths))
        )
        self.head = nn.Linear(4, 2)

    def features(self, x):
        return self.paths(self.stem(x) + self.position)

    def forward(self, x):
        return self.head(self.features(x))


def block_plan(*keep, p=0.5):
    return rdp.PathPlan(torch.tensor(keep, dtype=torch.bool), [p] * len(keep), "block")


def sample_plan(rows, p=0.5):
    return rdp.PathPlan(torch.tensor(rows, dtype=torch.bool), [p] * len(rows), "sample")


def flags(net):
    return [p.requires_grad for p in net.parameters()], [m.training for m in net.modules()]


def learned(net):
    """The parts of the net whose parameters have a gradient."""
    return {
        ".".join(n.split(".")[:2]) if "paths" in n else n.split(".")[0]
        for n, p in net.named_parameters()
        if p.grad is not None
    }


REST = {"stem", "position", "head"}


def run(scheme, net, batch_size=None, num_samples=4, **options):
    """A pair of iterations with a forward in each; their phases."""
    phases = []
    for phase in scheme.iterations(batch_size, **options):
        net(torch.randn(num_samples, 3))
        phases.append(phase)
    return phases


def test_a_pair():
    net, x = Net(), torch.randn(5, 3)
    scheme = rdp.ResidualDropPath(net, 0.5)
    assert (scheme.plan, scheme.phase, scheme.reuse_pending) == (None, None, False)
    plan, seen = block_plan(True, False, True, False), []
    for phase in scheme.iterations(plan=plan):
        assert (scheme.phase, scheme.plan) == (phase, plan)
        net(x).sum().backward()
        seen.append((phase, learned(net)))
        net.zero_grad(set_to_none=True)
    assert seen == [("drop", {"paths.0", "paths.2"} | REST), ("reuse", {"paths.1", "paths.3"})]
    assert (scheme.plan, scheme.phase, scheme.reuse_pending) == (None, None, False)


@pytest.mark.parametrize(("mode", "sampling"), [("block", "bernoulli"), ("block", "fixed"), ("sample", "fixed")])
def test_draws_do_not_depend_on_the_default_device(mode, sampling):
    """Masks are drawn on the CPU, from its generators."""

    def outputs():
        torch.manual_seed(0)
        net, x = Net(drop_prob=0.5), torch.randn(6, 3)
        with torch.device(device):
            yield rdp.drop_path(x, 0.5, training=True)
            yield net(x)
            scheme = rdp.ResidualDropPath(net, 0.5, mode=mode, sampling=sampling)
            for _ in scheme.iterations(6):
                yield net(x)

    device = "cpu"
    expected = list(outputs())
    device = "meta"  # as "cuda" on a machine that has it
    for actual, wanted in zip(outputs(), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_paths():
    net = Net(3, drop_prob=0.25)
    scheme = rdp.ResidualDropPath(net)
    assert [(p.index, p.name, p.drop_prob) for p in scheme.paths] == [(i, f"paths.{i}", 0.25) for i in range(3)]
    assert [id(p) for p in scheme.paths[1].parameters()] == [
        id(p) for p in [*net.paths[1].norm.parameters(), *net.paths[1].fn.parameters()]
    ]
    net.paths[2].drop_prob = 0.75
    with scheme.drop_iteration() as plan:
        assert plan.drop_probs == (0.25, 0.25, 0.75), "read at each draw"
        net(torch.randn(2, 3))
    assert [path.drop_prob for path in net.paths] == [0.25, 0.25, 0.75], "never written"
    scheme.remove()
    scheme = rdp.ResidualDropPath(net, 0.5, schedule="linear")
    assert [p.drop_prob for p in scheme.paths] == [0.0, 0.25, 0.5]


def test_nothing_dropped_has_no_reuse_iteration():
    net = Net()
    scheme = rdp.ResidualDropPath(net, 0.5)
    assert run(scheme, net, plan=block_plan(*[True] * 4)) == ["drop"]
    with pytest.raises(RuntimeError, match="needs a drop iteration"), scheme.reuse_iteration():
        pass


@pytest.mark.parametrize(
    ("options", "phases"),
    [({}, ["drop"]), ({"train_rest": True}, ["drop", "reuse"]), ({"freeze": "none"}, ["drop", "reuse"])],
)
def test_a_reuse_iteration_in_which_nothing_can_learn_is_not_run(options, phases):
    """The user froze the dropped path's parameters: an optimizer step without gradients would fail under AMP."""
    net = Net(2)
    net.paths[1].requires_grad_(False)
    scheme = rdp.ResidualDropPath(net, 0.5, **options)
    assert run(scheme, net, plan=block_plan(True, False)) == phases


def test_without_an_iteration_it_is_ordinary_stochastic_depth():
    net, x = Net(2, drop_prob=1.0, mode="block"), torch.randn(4, 3)
    scheme = rdp.ResidualDropPath(net, 0.5)
    expected = net.head(net.stem(x) + net.position)
    assert torch.equal(net(x), expected)
    with scheme.drop_iteration(plan=block_plan(True, True)):
        assert not torch.equal(net(x), expected)


def test_eval_inside_an_iteration_is_inference():
    net, x = Net(), torch.randn(4, 3)
    expected = net.eval()(x)
    for mode, size in (("block", None), ("sample", [4])):
        scheme = rdp.ResidualDropPath(net, 1.0, mode=mode)
        for phase in scheme.iterations(size):
            out = net.eval()(x)
            assert torch.equal(out, expected)
            out.sum().backward()
            assert learned(net) == {"paths.0", "paths.1", "paths.2", "paths.3"} | REST
            net.zero_grad(set_to_none=True)
            net.train()(x).sum().backward()
            assert learned(net) == (REST if phase == "drop" else {f"paths.{i}" for i in range(4)})
            net.zero_grad(set_to_none=True)
        scheme.remove()


def test_masks_depend_on_the_seed_alone():
    def masks(seed, mode, noise):
        torch.manual_seed(noise)
        net, x = Net(6), torch.randn(4, 3)
        scheme = rdp.ResidualDropPath(net, 0.5, mode=mode, seed=seed)
        state = torch.get_rng_state()
        keeps = []
        for _ in range(5):
            for _ in scheme.iterations(4):
                keeps.append(scheme.plan.keep.tolist())
                net(x)
        assert torch.equal(state, torch.get_rng_state()), "the global generator is untouched"
        return keeps

    for mode in ("block", "sample"):
        assert masks(1, mode, 0) == masks(1, mode, 99)
        assert masks(1, mode, 0) != masks(2, mode, 0)


def test_ranks_share_block_masks_and_differ_in_sample_masks(monkeypatch):
    def keep(rank, mode):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        net = Net(8)
        with rdp.ResidualDropPath(net, 0.5, mode=mode).drop_iteration(8) as plan:
            net(torch.randn(8, 3))
            return plan.keep.tolist()

    assert keep(0, "block") == keep(1, "block")
    assert keep(0, "sample") != keep(1, "sample")


class TestSeveralForwards:
    def test_block_mode_takes_any(self):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 0.5)
        for _ in scheme.iterations(plan=block_plan(True, False, True, True)):
            sum(net(torch.randn(b, 3)).sum() for b in (2, 7, 1)).backward()

    def test_sample_mode_replays_in_order(self):
        net = Net(1).double()
        scheme = rdp.ResidualDropPath(net, 0.5, mode="sample")
        plan = sample_plan([[True, False, False, False, True]])
        crops = [torch.randn(2, 3).double(), torch.randn(3, 3).double()]
        full = [net.eval()(x) for x in crops]
        bare = [net.head(net.stem(x) + net.position) for x in crops]
        net.train()
        for phase in scheme.iterations([2, 3], plan=plan):
            out = torch.cat([net(x) for x in crops])
            kept = torch.tensor([True, False, False, False, True])
            if phase == "drop":
                assert torch.allclose(out[~kept], torch.cat(bare)[~kept])
            else:
                assert torch.allclose(out, torch.cat(full))
                out.sum().backward()
                x_dropped = torch.cat(crops)[~kept]
                grad = net.paths[0].fn.bias.grad
                net.zero_grad(set_to_none=True)
                net.eval()(x_dropped).sum().backward()
                assert torch.allclose(grad, net.paths[0].fn.bias.grad)

    def test_a_forward_that_does_not_fit_is_refused(self):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 0.5, mode="sample")
        with scheme.drop_iteration(4):
            net(torch.randn(4, 3)), net(torch.randn(4, 3))
            with pytest.raises(ValueError, match="'paths.0' got 5 rows where .* batch_size 4; .*mode='block'"):
                net(torch.randn(5, 3))
        with scheme.drop_iteration([4, 5]):
            net(torch.randn(4, 3)), net(torch.randn(5, 3))
            with pytest.raises(ValueError, match="called more than 2 times"):
                net(torch.randn(4, 3))
        with (
            pytest.raises(RuntimeError, match=r"opened for 2 forwards .* 'paths.0' ran in 1"),
            scheme.drop_iteration([4, 5]),
        ):
            net(torch.randn(4, 3))
        assert (scheme.phase, scheme.reuse_pending) == (None, False)

    def test_a_path_in_block_mode_is_decided_for_the_whole_batch_in_sample_mode(self):
        """Its rows are windows, k for each sample."""
        net = nn.Sequential(
            rdp.ResidualBranch(nn.Linear(4, 4)),
            nn.Unflatten(0, (-1, 1)), nn.Unflatten(2, (2, 2)), nn.Flatten(0, 2),
            rdp.ResidualBranch(nn.Linear(2, 2), mode="block"),
        )  # fmt: skip
        scheme = rdp.ResidualDropPath(net, 0.5, mode="sample", seed=1)
        for _ in range(8):
            for _ in scheme.iterations(3):
                assert len(set(scheme.plan.keep[1].tolist())) == 1
                net(torch.randn(3, 4, requires_grad=True)).sum().backward()
        with pytest.raises(ValueError, match="plan mixes samples for path '4'"):
            next(scheme.iterations(2, plan=sample_plan([[True, True], [True, False]])))

    @pytest.mark.parametrize("freeze", ["parameters", "branch"])
    def test_an_empty_batch_and_one_sample(self, freeze):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 0.5, mode="sample", freeze=freeze)
        assert run(scheme, net, 0, 0) == ["drop"]
        with scheme.drop_iteration(0):
            assert net(torch.randn(0, 3)).shape == (0, 2)
        for _ in range(5):
            for _ in scheme.iterations(1):
                net(torch.randn(1, 3)).sum().backward()


class TestExceptions:
    @pytest.mark.parametrize("raising", ["drop", "reuse"])
    @pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
    def test_leave_the_model_as_it_was(self, raising, error):
        class Bomb(nn.Linear):
            armed = False

            def forward(self, x):
                if self.armed:
                    raise error
                return super().forward(x)

        net = Net(3)
        net.paths[2].fn = Bomb(4, 4)
        net.paths.insert(0, rdp.ResidualBranch(nn.BatchNorm1d(4)))
        scheme, before = rdp.ResidualDropPath(net, 0.5), flags(net)

        def train():
            for phase in scheme.iterations(plan=block_plan(True, True, False, raising == "drop")):
                net.paths[3].fn.armed = phase == raising
                net(torch.randn(4, 3)).sum().backward()

        with pytest.raises(error):
            train()
        assert flags(net) == before
        assert (scheme.phase, scheme.plan, scheme.reuse_pending) == (None, None, False)
        net.paths[3].fn.armed = False
        assert run(scheme, net, plan=block_plan(True, True, False, True)) == ["drop", "reuse"]

    def test_break_abandons_the_pair(self):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 1.0)
        for _ in scheme.iterations():
            break
        assert run(scheme, net) == ["drop", "reuse"]

    def test_reset(self):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 1.0)
        left_open = scheme.iterations()
        next(left_open)
        with pytest.raises(RuntimeError, match=r"a drop iteration is open.*nest.*reset\(\)"):
            next(scheme.iterations())
        scheme.reset()
        assert scheme.phase is None
        assert run(scheme, net) == ["drop", "reuse"]
        with scheme.drop_iteration():
            net(torch.randn(4, 3))
        assert scheme.reuse_pending
        scheme.reset()
        assert not scheme.reuse_pending


class TestAlternate:
    def setup_method(self):
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1)
        self.scheme = rdp.ResidualDropPath(self.net, 0.5, seed=5)

    def step(self):
        self.optimizer.zero_grad()
        self.net(torch.randn(4, 3)).sum().backward()
        phase, part = self.scheme.phase, learned(self.net)
        self.optimizer.step()
        return phase, part

    def test_every_step_turns_to_the_next(self):
        handle = self.scheme.alternate(self.optimizer)
        dropped, phases = set(), []
        for _ in range(12):
            if self.scheme.phase == "drop":
                dropped = {f"paths.{i}" for i in self.scheme.plan.dropped_paths}
            phase, part = self.step()
            phases.append(phase)
            assert part == (dropped if phase == "reuse" else ({f"paths.{i}" for i in range(4)} | REST) - dropped)
        assert phases[:2] == ["drop", "reuse"]
        assert all(a != b or a == "drop" for a, b in itertools.pairwise(phases))
        with pytest.raises(RuntimeError, match="alternate"):
            next(self.scheme.iterations())
        with pytest.raises(RuntimeError, match="alternate"):
            self.scheme.alternate(self.optimizer)
        handle.remove()
        handle.remove()
        assert self.scheme.phase is None
        self.step()
        assert self.scheme.phase is None

    def test_accumulation_and_skipped_steps_stay_in_the_iteration(self):
        self.scheme.alternate(self.optimizer)
        plan = self.scheme.plan
        for _ in range(3):
            self.net(torch.randn(4, 3)).sum().backward()
        assert self.scheme.plan == plan
        scaler = torch.amp.GradScaler("cpu")
        scaler.scale((self.net(torch.randn(4, 3)) * torch.inf).sum()).backward()
        scaler.step(self.optimizer)  # skipped: the gradients are not finite
        assert (self.scheme.phase, self.scheme.plan) == ("drop", plan)

    @pytest.mark.parametrize("stop", [3, 4, 7])
    def test_state_between_steps(self, stop):
        self.scheme.alternate(self.optimizer)
        for _ in range(stop):
            self.step()
        state = copy.deepcopy(self.scheme.state_dict())
        self.net(torch.randn(4, 3)).sum().backward()
        self.optimizer.zero_grad()  # as after a step that a GradScaler skipped: this iteration is repeated
        assert self.scheme.state_dict() == state
        expected = [self.step() for _ in range(6)]
        self.scheme.load_state_dict(state)
        assert [self.step() for _ in range(6)] == expected
        self.setup_method()
        self.scheme.seed = 0
        self.scheme.alternate(self.optimizer)
        self.scheme.load_state_dict(state)
        assert [self.step() for _ in range(6)] == expected

    @pytest.mark.parametrize("begun", [False, True])
    @pytest.mark.parametrize("stop", range(5))
    def test_ending_loses_no_iteration(self, stop, begun):
        """Two loops, one after the other, see the iterations that a single loop would."""
        self.scheme.alternate(self.optimizer)
        expected = [self.step() for _ in range(8)]
        assert "reuse" in [phase for phase, _ in expected[3:]]
        self.setup_method()
        handle = self.scheme.alternate(self.optimizer)
        actual = [self.step() for _ in range(stop)]
        if begun:
            self.net(torch.randn(4, 3))
        handle.remove()
        assert self.scheme.phase is None
        assert self.scheme.reuse_pending == (expected[stop][0] == "reuse")
        self.scheme.alternate(self.optimizer)
        assert actual + [self.step() for _ in range(8 - stop)] == expected

    def test_a_step_without_a_forward_is_no_iteration(self):
        self.scheme.alternate(self.optimizer)
        plan = self.scheme.plan
        self.net.eval()(torch.randn(4, 3))
        self.optimizer.step()
        assert self.scheme.plan is plan
        with pytest.warns(UserWarning, match=r"no path ran in two optimizer steps in a row.*call model.train\(\)"):
            self.optimizer.step()
        self.net.train()
        self.step()
        assert self.scheme.plan is not plan or self.scheme.phase == "reuse"

    def test_wrapped_optimizers(self):
        """accelerate's wrapper is an Optimizer whose hooks were never set up."""

        class Wrapper(torch.optim.Optimizer):
            def __init__(self, optimizer):
                self.optimizer = optimizer

        self.scheme.alternate(Wrapper(Wrapper(self.optimizer)))
        assert len({phase for phase, _ in (self.step() for _ in range(8))}) == 2

    def test_errors(self):
        with pytest.raises(TypeError, match="optimizer must be a torch.optim.Optimizer, got Net"):
            self.scheme.alternate(self.net)
        self.scheme.remove()
        with pytest.raises(ValueError, match="mode='block'"):
            rdp.ResidualDropPath(self.net, 0.5, mode="sample").alternate(self.optimizer)


class TestCopies:
    @pytest.mark.parametrize(
        "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
    )
    @pytest.mark.parametrize("phase", [None, "drop", "reuse"])
    def test_a_copy_has_no_scheme(self, clone, phase):
        """A copy is the ordinary model with the user's own flags, even if it is made inside an iteration."""
        net, x = Net(), torch.randn(3, 3)
        net.scheme = scheme = rdp.ResidualDropPath(net, 1.0)  # as a LightningModule keeps it
        told = contextlib.nullcontext() if clone is copy.deepcopy else pytest.warns(UserWarning, match="a NoScheme: ")
        for current in [None] if phase is None else scheme.iterations():
            net(x)
            if current == phase:
                with told:
                    other = clone(net)
        with pytest.raises(
            AttributeError, match=r"NoScheme has no 'iterations': .*rdp.ResidualDropPath\(model, ...\).*state_dict"
        ):
            other.scheme.iterations(3)
        assert repr(clone(other).scheme) == "NoScheme()", "a copy of a copy"
        assert flags(other) == flags(net)
        other(x).sum().backward()
        assert len(learned(other)) == 7
        assert all(p.grad is None for p in net.parameters())
        rdp.ResidualDropPath(other, 0.5)
        assert other.state_dict().keys() == Net().state_dict().keys()

    @pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy])
    def test_a_scheme_itself_is_not_copied(self, clone):
        scheme = rdp.ResidualDropPath(Net(), 0.5)
        with pytest.raises(TypeError, match=r"can't be copied: save its state_dict\(\)"):
            clone(scheme)
        for around in ([scheme], {"model": 1, "scheme": scheme}):
            with pytest.raises(TypeError, match="can't be copied"):
                copy.deepcopy(around)
        with pytest.warns(UserWarning, match=r"the scheme is pickled as a NoScheme: .*save its state_dict\(\)"):
            pickled = pickle.dumps(scheme)
        with pytest.raises(AttributeError, match=r"load_state_dict\(\)"):
            _ = pickle.loads(pickled).plan

    def test_torch_save(self, tmp_path):
        net = Net()
        rdp.ResidualDropPath(net, 0.5)
        torch.save(net, tmp_path / "net.pt")
        other = torch.load(tmp_path / "net.pt", weights_only=False)
        assert torch.equal(other.head.weight, net.head.weight)
        torch.save(net.state_dict(), tmp_path / "state.pt")
        Net().load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))

    def test_the_model_is_free_when_the_scheme_goes(self):
        net = Net()
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
        scheme = rdp.ResidualDropPath(net, 0.5)
        with pytest.raises(RuntimeError, match=r"path 'paths.0' has a scheme already: call its remove\(\)"):
            rdp.ResidualDropPath(net, 0.5)
        with pytest.raises(RuntimeError, match="has a scheme already"):
            rdp.ResidualDropPath(net.paths)
        scheme.remove()
        scheme = rdp.ResidualDropPath(net, 0.5)
        del scheme
        gc.collect()
        scheme = rdp.ResidualDropPath(net, 0.5)
        scheme.remove()
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == hooks


class TestRest:
    def test_methods_of_the_model_are_refused_where_their_parameters_would_learn(self):
        net, x = Net(), torch.randn(2, 3)
        scheme = rdp.ResidualDropPath(net, 1.0)
        for phase in scheme.iterations():
            if phase == "drop":
                net.features(x)
                continue
            with pytest.raises(RuntimeError, match="'paths.0' runs in a reuse iteration without a call of 'the model'"):
                rdp.ResidualBranch.forward(net.paths[0], net.stem(x) + net.position)
            net(x)
        scheme.remove()
        scheme = rdp.ResidualDropPath(net, 1.0, train_rest=True)
        for _ in scheme.iterations():
            net.features(x)

    def test_parts_may_be_called_one_by_one(self):
        net = nn.Sequential(nn.Linear(3, 4), Net().paths, nn.Linear(4, 2))
        scheme = rdp.ResidualDropPath(net, 1.0)
        for phase in scheme.iterations():
            net[2](net[1](net[0](torch.randn(2, 3)))).sum().backward()
            got = {n.split(".")[0] for n, p in net.named_parameters() if p.grad is not None}
            assert got == ({"0", "2"} if phase == "drop" else {"1"})
            net.zero_grad()

    def test_flags_are_the_users_own_between_forward_and_backward(self):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 1.0)
        for _ in scheme.iterations():
            out = net(torch.randn(2, 3))
            assert all(p.requires_grad for p in net.parameters())
            out.sum().backward()

    def test_a_head_that_is_swapped_later_is_frozen_too(self):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 1.0)
        net.head = nn.Linear(4, 5)
        for phase in scheme.iterations():
            net(torch.randn(2, 3)).sum().backward()
            assert ("head" in learned(net)) == (phase == "drop")
            net.zero_grad()

    @pytest.mark.parametrize("mode", ["block", "sample"])
    def test_a_shared_layer_may_change_between_pairs(self, mode):
        """For example by a parametrization, which removes the weight; drop iterations don't look it up."""
        net, x = Net(), torch.randn(2, 3)
        net.paths[0].fn = nn.Sequential(net.paths[0].fn, shared := nn.Linear(4, 4))
        net.head = nn.Sequential(shared, net.head)
        scheme = rdp.ResidualDropPath(net, 1.0, mode=mode)
        assert run(scheme, net, 2, 2) == ["drop", "reuse"]
        nn.utils.parametrizations.weight_norm(shared)
        for phase in scheme.iterations(2):
            net(x).sum().backward()
            assert shared.parametrizations.weight.original0.grad is not None, phase
            net.zero_grad()


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.outer = rdp.ResidualBranch(nn.Sequential(nn.Linear(2, 2), rdp.ResidualBranch(nn.Linear(2, 2))))


def batch_norm_net(**options):
    return nn.Sequential(rdp.ResidualBranch(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), **options))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rdp.ResidualDropPath(nn.Linear(2, 2)), ValueError, r"no paths: call rdp.convert\(model\) first, or build it from"),
        (lambda: rdp.ResidualDropPath([]), TypeError, "model must be a torch.nn.Module"),
        (lambda: rdp.ResidualDropPath(Nested()), ValueError, "'outer.fn.1' lies inside path 'outer': a plan can't decide about nested paths"),
        (lambda: rdp.ResidualDropPath(Nested().outer), ValueError, "'fn.1' lies inside path ''"),
        (lambda: rdp.ResidualDropPath(Net(), 1.5), ValueError, "drop_prob"),
        (lambda: rdp.ResidualDropPath(Net(), schedule="linear"), ValueError, "schedule='linear'.*give drop_prob"),
        (lambda: rdp.ResidualDropPath(Net(), 0.1, schedule="cosine"), ValueError, "schedule"),
        (lambda: rdp.ResidualDropPath(Net(), mode="row"), ValueError, "mode.*'row'"),
        (lambda: rdp.ResidualDropPath(Net(), freeze="all"), ValueError, "freeze must be one of 'parameters', 'branch', 'none'"),
        (lambda: rdp.ResidualDropPath(Net(), sampling="even"), ValueError, "sampling"),
        (lambda: rdp.ResidualDropPath(Net(), train_rest=1), TypeError, "train_rest"),
        (lambda: rdp.ResidualDropPath(Net(), seed=0.5), TypeError, "seed"),
        (lambda: rdp.ResidualDropPath(batch_norm_net(), mode="sample"), ValueError, "path '0': BatchNorm in a branch can't be frozen"),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5, mode="sample").iterations()), ValueError, "batch_size must be given"),
        (
            lambda: next(rdp.ResidualDropPath(Net(), 0.5).iterations(torch.randn(64, 3))), TypeError,
            r"batch_size must be the number of samples, len\(images\) for example, got a tensor of torch.float32 and shape \[64, 3\]",
        ),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5).iterations({"x": 1})), TypeError, "batch_size must be the number of samples"),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5).iterations([torch.randn(64, 3)])), TypeError, r"batch_size\[0\].* got a tensor"),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5, mode="sample").iterations(-1)), ValueError, "batch_size must be at least 0"),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5, mode="sample").iterations([2, 0.5])), TypeError, r"batch_size\[1\]"),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5, mode="sample").iterations([])), ValueError, "batch_size must have an entry"),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5).iterations(plan=[True])), TypeError, "plan must be a PathPlan, got list"),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5).iterations(plan=block_plan(True))), ValueError, "plan must be .* 4 paths.* with 1"),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5).iterations(plan=sample_plan([[True]] * 4))), ValueError, "mode 'block'.*mode 'sample'"),
        (
            lambda: next(rdp.ResidualDropPath(Net(), 0.5, mode="sample").iterations(3, plan=sample_plan([[True]] * 4))),
            ValueError, r"plan must be for batch_size \[3\], got one for 1",
        ),
        (lambda: next(rdp.ResidualDropPath(Net(), 0.5).iterations(plan=block_plan(*[True] * 4, p=1.0))), ValueError, "infinite"),
    ],
)  # fmt: skip
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("options", [{"mode": "block"}, {"mode": "sample", "freeze": "none"}])
def test_batch_norm_where_it_is_exact(options):
    rdp.ResidualDropPath(batch_norm_net(), 0.5, **options)
    rdp.ResidualDropPath(batch_norm_net(mode="block"), 0.5, mode="sample")


class TestState:
    def test_errors_leave_the_scheme_as_it_was(self):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 1.0, seed=3)
        with scheme.drop_iteration(), pytest.raises(RuntimeError, match="inside an open drop iteration"):
            net(torch.randn(4, 3))
            scheme.state_dict()
        state = scheme.state_dict()
        for wrong, words in [
            ({}, "state is not from"),
            ({**state, "drawn": -1}, "drawn"),
            ({**state, "phase": "third"}, "phase"),
            ({**state, "plan": {**state["plan"], "keep": [True]}}, "drop_probs"),
            ({**state, "mode": "sample"}, "mode 'block' with 4 paths, got mode 'sample'"),
            ({**state, "num_paths": 5}, "4 paths, got mode 'block' with 5"),
            ([], "state is not from"),
        ]:
            with pytest.raises(ValueError, match=words):
                scheme.load_state_dict(wrong)
            assert scheme.state_dict() == state

    def test_a_pending_reuse_iteration_is_the_only_one(self):
        net, another, x = Net(), Net(), torch.randn(6, 3)
        scheme = rdp.ResidualDropPath(net, 0.5, mode="sample", seed=3)
        with scheme.drop_iteration(6):
            net(x)
        state = scheme.state_dict()
        other = rdp.ResidualDropPath(another, 0.5, mode="sample")
        other.load_state_dict(pickle.loads(pickle.dumps(state)))
        with pytest.raises(ValueError, match=r"batch_size must be \[6\]"):
            next(other.iterations(5))
        with pytest.raises(ValueError, match="pending"):
            next(other.iterations(plan=sample_plan([[True] * 6] * 4)))
        assert other.reuse_pending
        assert run(other, another, 6, 6) == ["reuse"]
        assert run(scheme, net, 6, 6) == ["reuse"]
        with scheme.drop_iteration(6) as expected, other.drop_iteration(6) as plan:
            assert plan == expected
            net(x), another(x)

    def test_loads_with_weights_only(self, tmp_path):
        net = Net()
        scheme = rdp.ResidualDropPath(net, 1.0)
        with scheme.drop_iteration():
            net(torch.randn(4, 3))
        torch.save(scheme.state_dict(), tmp_path / "scheme.pt")
        scheme.load_state_dict(torch.load(tmp_path / "scheme.pt", weights_only=True))


def test_repr_says_what_it_does():
    net = Net(3)
    scheme = rdp.ResidualDropPath(net, 0.4, schedule="linear", seed=7)
    assert repr(scheme) == (
        "ResidualDropPath(3 paths, drop_prob=0–0.4, mode='block', freeze='parameters', sampling='bernoulli', "
        "seed=7, phase=None)"
    )
    with scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor([True, False, True]), [0.4] * 3, mode="block")):
        assert repr(scheme).endswith("phase='drop')")
        net(torch.ones(1, 3))
    assert repr(scheme).endswith("phase=None, reuse_pending=True)")


@pytest.mark.parametrize("option", ["mode", "freeze", "sampling"])
def test_options_that_a_scheme_was_made_with_stay(option):
    scheme = rdp.ResidualDropPath(Net(), 0.5)
    with pytest.raises(AttributeError):
        setattr(scheme, option, getattr(scheme, option))


def test_no_warnings_and_no_growth():
    """A thousand pairs leave nothing behind, except the few iterations that checkpointing may need."""
    net = Net()
    scheme = rdp.ResidualDropPath(net, 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(1000):
            run(scheme, net)
    assert len(scheme._pairs.history.closed) <= 16


@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
@pytest.mark.parametrize("mode", ["block", "sample"])
def test_learning_parameters_are_those_that_get_a_gradient(mode, freeze):
    net = Net(drop_prob=0.5).double()
    net.stem.weight.requires_grad_(False)
    scheme = rdp.ResidualDropPath(net, mode=mode, freeze=freeze, seed=2)
    assert scheme.learning_parameters() == []
    for _ in range(4):
        for _ in scheme.iterations(3):
            net(torch.randn(3, 3).double()).square().sum().backward()
            with_grad = {id(p) for p in net.parameters() if p.grad is not None}
            announced = {id(p) for p in scheme.learning_parameters()}
            assert with_grad == announced if mode == "block" else with_grad <= announced
            assert id(net.stem.weight) not in announced
            net.zero_grad()
