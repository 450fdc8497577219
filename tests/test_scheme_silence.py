"""Set-ups in which a scheme does less than it seems to. Each is corrected, refused with the reason, or warned about
once."""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import rdp_kernels as rdp


class Block(nn.Module):
    """A block as other libraries write it, with timm's drop-path."""

    def __init__(self, width=8):
        super().__init__()
        self.fc, self.drop_path = nn.Linear(width, width), rdp.DropPath(0.5)

    def forward(self, x):
        return x + self.drop_path(self.fc(x))


class Layers(nn.Module):
    """Leaves out the layers in `skipped`, as LayerDrop does."""

    skipped: frozenset = frozenset()

    def __init__(self, count=4):
        super().__init__()
        self.stem, self.layers = nn.Linear(8, 8), nn.ModuleList(Block() for _ in range(count))

    def forward(self, x):
        x = self.stem(x)
        for number, layer in enumerate(self.layers):
            if number not in self.skipped:
                x = layer(x)
        return x


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.a, self.b = base.requires_grad_(False), nn.Linear(8, 2), nn.Linear(2, 8)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def converted(count=4):
    model = Layers(count)
    assert not rdp.convert(model, example_inputs=torch.randn(2, 8)).refused
    return model.train()


def paths_alone(count=4, **options):
    return nn.Sequential(*(rdp.ResidualBranch(nn.Linear(8, 8), **options) for _ in range(count)))


def plan(*keep, p=0.5):
    return rdp.PathPlan(torch.tensor(keep, dtype=torch.bool), [p] * len(keep), "block")


def learned(modules):
    return [any(p.grad is not None for p in module.parameters()) for module in modules]


X = torch.randn(3, 8)


class TestNothingCanLearn:
    """An iteration in which nothing can learn isn't run: its backward would raise, and so would GradScaler."""

    def test_the_reuse_iteration_follows_at_once(self):
        model = paths_alone()
        scheme = rdp.ResidualDropPath(model, 0.8, seed=0)
        plans = []
        for _ in range(60):
            phases = []
            for phase in scheme.iterations():
                phases.append(phase)
                model(X).sum().backward()
                model.zero_grad()
                kept = scheme.plan.keep.tolist()
            assert phases == (["reuse"] if not any(kept) else ["drop", "reuse"] if not all(kept) else ["drop"])
            plans.append(kept)
        assert [False] * 4 in plans, "no plan dropped every path"
        drawn = torch.tensor(plans).double().mean()
        assert abs(drawn - 0.2) < 0.08, "no plan is drawn again, so that the rates are right"
        assert scheme.state_dict()["drawn"] == 60

    def test_resuming_is_exact(self):
        def follow(scheme, model, pairs):
            seen = []
            for _ in range(pairs):
                for phase in scheme.iterations():
                    seen.append((phase, scheme.plan.keep.tolist()))
                    model(X)
            return seen

        model = paths_alone(2)
        whole = follow(rdp.ResidualDropPath(model, 0.6, seed=1), model, 12)
        assert ("reuse", [False, False]) in whole
        assert ("drop", [False, False]) not in whole
        for stop in range(12):
            model, again = paths_alone(2), paths_alone(2)
            scheme, other = rdp.ResidualDropPath(model, 0.6, seed=1), rdp.ResidualDropPath(again, 0.6)
            before = follow(scheme, model, stop)
            other.load_state_dict(scheme.state_dict())
            assert before + follow(other, again, 12 - stop) == whole

    def test_adapters_only(self):
        model = converted()
        for layer in model.layers:
            layer.fc.requires_grad_(False)
        model.stem.requires_grad_(False)
        model.layers[2].fc = LoRA(model.layers[2].fc)
        scheme = rdp.ResidualDropPath(model, 0.5, seed=0)
        for keep in ((True, True, False, True), (True, False, True, False)):
            for phase in scheme.iterations(plan=plan(*keep)):
                assert phase == ("drop" if keep[2] else "reuse")
                model(X).sum().backward()
                assert learned(model.layers) == [False, False, True, False]
                model.zero_grad()

    def test_drop_iteration_says_so_and_leaves_the_reuse_iteration_pending(self):
        model = paths_alone()
        scheme = rdp.ResidualDropPath(model, 1.0)
        with pytest.raises(RuntimeError, match=r"nothing else can learn.*continue with reuse_iteration\(\)"):
            scheme.drop_iteration().__enter__()
        with scheme.reuse_iteration():
            model(X).sum().backward()
        assert learned(model) == [True] * 4
        with scheme.drop_iteration(plan=plan(*[False] * 4)):  # a given plan runs
            assert torch.equal(model(X), X)

    def test_alternate(self):
        model = paths_alone(2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheme = rdp.ResidualDropPath(model, 0.7, seed=0)
        scheme.alternate(optimizer)
        seen = set()
        for _ in range(40):
            seen.add((scheme.phase, *scheme.plan.keep.tolist()))
            model(X).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert ("reuse", False, False) in seen
        assert ("drop", False, False) not in seen

    def test_what_learns_may_be_outside_of_the_model(self):
        """A frozen backbone is stochastic depth for a head on top of it. `alternate` looks at the optimizer too."""
        model, head = paths_alone().requires_grad_(False), nn.Linear(8, 2)
        scheme = rdp.ResidualDropPath(model, 0.5)
        for keep in ((True, False, True, False), (False,) * 4):
            assert [head(model(X)).sum().backward() or phase for phase in scheme.iterations(plan=plan(*keep))] == [
                "drop"
            ]
        model[0].requires_grad_(True)
        scheme.alternate(torch.optim.SGD([*model.parameters(), *head.parameters()], 0.1))
        for _ in range(8):
            scheme.reset()
            assert scheme.phase == "drop"


class TestPathsThatDoNotRun:
    """One warning names the path and the likely reason. An iteration in which no path ran doesn't count."""

    def test_the_model_skips_a_layer(self):
        model = converted()
        scheme = rdp.ResidualDropPath(model, 0.5)
        model.skipped = frozenset({1, 3})
        with pytest.warns(
            UserWarning, match="didn't run path 'layers.1.*' and 1 more in a drop iteration.*LayerDrop"
        ) as seen:
            for _ in scheme.iterations(plan=plan(True, True, False, True)):
                model(X).sum().backward()
        assert len(seen) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # once
            for _ in scheme.iterations(plan=plan(True, False, False, True)):
                model(X).sum().backward()

    def test_what_has_nothing_to_do_may_be_skipped(self):
        model = converted()
        model.skipped = frozenset({1})
        scheme = rdp.ResidualDropPath(model, 0.5)
        with scheme.drop_iteration(plan=plan(True, False, True, True)):
            model(X)

    def test_a_forward_replaced_after_conversion(self):
        model = converted()
        model.layers[2].forward = lambda x: x
        scheme = rdp.ResidualDropPath(model, 0.5)
        with (
            pytest.warns(UserWarning, match="'layers.2.*' in a drop iteration.*its forward was replaced"),
            scheme.drop_iteration(plan=plan(True, True, True, False)),
        ):
            model(X)

    def test_a_frozen_path_is_to_run_too(self):
        model = converted()
        scheme = rdp.ResidualDropPath(model, 0.5)
        with pytest.warns(UserWarning, match="'layers.0.*' in a reuse iteration in which it was to run"):
            for phase in scheme.iterations(plan=plan(True, False, True, True)):
                model.skipped = frozenset({0} if phase == "reuse" else ())
                model(X).sum().backward()

    def test_a_path_in_eval_mode(self):
        model = converted()
        scheme = rdp.ResidualDropPath(model, 0.5)
        model.layers[0].eval()
        with (
            pytest.warns(UserWarning, match="'layers.0.*' in a drop.*eval mode"),
            scheme.drop_iteration(plan=plan(*[True] * 4)),
        ):
            model(X)
        scheme.remove()
        scheme = rdp.ResidualDropPath(model, 0.5)
        model.layers[0].requires_grad_(False)  # users freeze a part in this way
        with scheme.drop_iteration(plan=plan(*[True] * 4)):
            model(X)

    @pytest.mark.parametrize("mode", ["block", "sample"])
    def test_no_path_at_all(self, mode):
        model = paths_alone()
        scheme = rdp.ResidualDropPath(model, 0.5, mode=mode)
        model.eval()
        with pytest.warns(
            UserWarning, match=r"no path ran in a drop iteration.* not counted .*call model.train\(\)"
        ) as seen:
            for _ in range(5):
                for _ in scheme.iterations(3):
                    model(X).sum().backward()
                    model.zero_grad()
        assert len(seen) == 1
        assert scheme.state_dict()["completed"] == {"drop": 0, "reuse": 0}
        model.train()
        with pytest.warns(UserWarning, match="no path ran.*call the model inside the iteration.*not a copy"):
            list(scheme.iterations(3))

    def test_under_alternate(self):
        model = paths_alone()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheme = rdp.ResidualDropPath(model, 0.5)
        scheme.alternate(optimizer)
        twin = copy.deepcopy(model)
        with pytest.warns(UserWarning, match="no path ran in two optimizer steps in a row.*not a copy") as seen:
            for _ in range(4):
                twin(X).sum().backward()
                optimizer.step()
        assert len(seen) == 1


class TestSetUps:
    def test_rates_of_zero(self):
        with pytest.warns(UserWarning, match="drop_prob is 0: .* plain training"):
            rdp.ResidualDropPath(paths_alone())
        rdp.ResidualDropPath(nn.Sequential(*paths_alone(1), *paths_alone(1, drop_prob=0.1)))

    def test_an_optimizer_of_other_parameters(self):
        scheme = rdp.ResidualDropPath(paths_alone(), 0.5)
        with pytest.raises(ValueError, match="optimizer must have parameters of the scheme's model, but has none"):
            scheme.alternate(torch.optim.AdamW(paths_alone().parameters()))
        assert scheme.phase is None
        next(scheme.iterations())  # none is open

    @pytest.mark.parametrize("freeze", ["parameters", "none"])
    @pytest.mark.parametrize("when", ["first", "last"])
    def test_gradients_of_zero(self, when, freeze):
        model = converted()
        optimizer = torch.optim.AdamW(model.parameters(), 0.1)
        scheme = rdp.ResidualDropPath(model, 0.5, freeze=freeze)
        with pytest.warns(
            UserWarning, match=r"\d parameters .* gradients of zero instead of None.*set_to_none=True"
        ) as seen:
            for _ in range(3):
                for _ in scheme.iterations(plan=plan(True, True, False, False)):
                    if when == "first":
                        optimizer.zero_grad(set_to_none=False)
                    model(X).sum().backward()
                    optimizer.step()
                    if when == "last":
                        optimizer.zero_grad(set_to_none=False)
        assert len(seen) == 1

    def test_a_warning_made_an_error_leaves_the_scheme_usable(self):
        model = paths_alone()
        scheme = rdp.ResidualDropPath(model, 0.5)
        with pytest.raises(UserWarning, match="gradients of zero"):
            for _ in range(3):
                for _ in scheme.iterations(plan=plan(True, True, False, False)):
                    model.zero_grad(set_to_none=False)
                    model(X).sum().backward()
        assert scheme.phase is None
        assert scheme.state_dict()["completed"] == {"drop": 1, "reuse": 1}

    @pytest.mark.parametrize("zero", ["nothing", "gammas", "head"])
    def test_gradients_that_accumulate_over_a_pair_are_no_mistake(self, zero):
        model = nn.Sequential(paths_alone(gamma=torch.full((8,), float(zero != "gammas"))), nn.Linear(8, 2))
        if zero == "head":
            nn.init.zeros_(model[1].weight)
        scheme = rdp.ResidualDropPath(model, 0.5)
        for _ in range(3):
            for _ in scheme.iterations(plan=plan(True, True, False, False)):
                model(X).sum().backward()

    def test_a_pair_may_be_saved_in_its_middle(self):
        """The code is that in the docstring of `iterations`."""
        model, again = paths_alone(), paths_alone()
        scheme, other = rdp.ResidualDropPath(model, 0.5, seed=3), rdp.ResidualDropPath(again, 0.5)
        with scheme.drop_iteration() as drawn:
            model(X)
        other.load_state_dict(scheme.state_dict())
        assert scheme.reuse_pending
        assert other.reuse_pending
        with scheme.reuse_iteration(), other.reuse_iteration() as resumed:
            model(X), again(X)
            assert resumed == drawn


class TestWhatChangesLater:
    """The modules of branches and of the rest are looked up when an iteration opens."""

    def test_a_layer_in_a_branchs_place(self):
        model = converted()
        scheme = rdp.ResidualDropPath(model, 0.5)
        for layer in model.layers:
            layer.fc = LoRA(layer.fc)
        for phase in scheme.iterations(plan=plan(True, False, True, False)):
            model(X).sum().backward()
            assert learned(model.layers) == [(phase == "drop") == kept for kept in scheme.plan.keep.tolist()]
            assert learned([model.stem]) == [phase == "drop"]
            model.zero_grad()

    def test_under_alternate_until_the_next_forward(self):
        """The next iteration opens right after a step."""
        model = nn.Sequential(nn.Linear(8, 8), converted(2), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scheme = rdp.ResidualDropPath(model, 0.5, sampling="fixed")
        handle = scheme.alternate(optimizer)
        model(X).sum().backward()
        optimizer.step()
        assert scheme.phase == "reuse"
        for layer in model[1].layers:
            layer.fc = LoRA(layer.fc)
        model[2] = nn.Linear(8, 3)
        model.zero_grad()
        model(X).sum().backward()
        assert learned([model[0], *model[1].layers, model[2]]) == [False, *(~scheme.plan.keep).tolist(), False]
        handle.remove()

    def test_a_layer_that_moves_into_a_branch_is_the_rests_no_longer(self):
        model = converted(2)
        scheme = rdp.ResidualDropPath(model, 0.5)
        model.layers[1].fc = nn.Sequential(model.layers[1].fc, model.stem)  # tied now: part of the rest and of the path
        model.stem = nn.Identity()
        for phase in scheme.iterations(plan=plan(True, False)):
            model(X).sum().backward()
            assert learned(model.layers) == [phase == "drop", phase == "reuse"]
            model.zero_grad()

    def test_a_rest_that_comes_later(self):
        """The scheme found no rest on which to put hooks."""
        model = nn.Sequential(nn.Identity(), paths_alone(2), nn.Identity())
        scheme = rdp.ResidualDropPath(model, 0.5)
        model[0], model[2] = nn.Linear(8, 8), nn.Linear(8, 3)
        for phase in scheme.iterations(plan=plan(True, False)):
            model(X).sum().backward()
            assert learned([model[0], *model[1], model[2]]) == (
                [True, True, False, True] if phase == "drop" else [False, False, True, False]
            )
            model.zero_grad()
        scheme.remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_a_path_inserted_and_one_taken_out(self):
        model = nn.Sequential(nn.Linear(8, 8), paths_alone(2))
        scheme = rdp.ResidualDropPath(model, 0.4, schedule="linear")
        gone = model[1][1]
        model[1].insert(1, rdp.ResidualBranch(nn.Linear(8, 8)))
        with scheme.drop_iteration(plan=plan(True, False, True)):
            model(X).sum().backward()
            assert learned(model[1]) == [True, False, True]
        assert [(path.name, path.drop_prob) for path in scheme.paths] == [("1.0", 0.0), ("1.1", 0.2), ("1.2", 0.4)]
        del model[1][2]
        with pytest.raises(RuntimeError, match=r"paths have changed since the drop iteration.*reset\(\)"):
            next(scheme.iterations())
        scheme.reset()
        with scheme.drop_iteration() as drawn:
            assert drawn.num_paths == 2
            model(X)
        rdp.ResidualDropPath(gone, 0.5)  # it is free

    @pytest.mark.parametrize("where", ["nested", "owned"])
    def test_a_path_that_does_not_fit(self, where):
        model = paths_alone(2)
        scheme = rdp.ResidualDropPath(model, 0.5)
        other = paths_alone(1)
        keeps = rdp.ResidualDropPath(other, 0.5)
        if where == "nested":
            model[0].fn = nn.Sequential(nn.Linear(8, 8), *paths_alone(1))
        else:
            model.append(other[0])
        words = "lies inside path '0'" if where == "nested" else "path '2' has a scheme already"
        with pytest.raises((ValueError, RuntimeError), match=words):
            next(scheme.iterations())
        assert (scheme.phase, keeps.phase) == (None, None)


def test_a_path_that_is_put_into_a_known_branch_is_noticed_by_the_reuse_iteration():
    model = nn.Sequential(rdp.ResidualBranch(nn.Sequential(nn.Linear(8, 8))), *paths_alone(1))
    scheme = rdp.ResidualDropPath(model, 0.5)
    model[0].fn.append(rdp.ResidualBranch(nn.Linear(8, 8)))
    with scheme.drop_iteration(plan=plan(True, False)):
        model(X)
    with pytest.raises(ValueError, match="path '0.fn.1' lies inside path '0'"), scheme.reuse_iteration():
        pass


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
def test_computed_weights(freeze):
    """`functional_call` replaces parameters by tensors that aren't leaves, as in hypernetworks and meta-learning."""
    model = nn.Sequential(nn.Linear(8, 8), paths_alone(3)).double()
    x = X.double()
    scheme = rdp.ResidualDropPath(model, 0.5, freeze=freeze)
    for _ in scheme.iterations(plan=plan(True, False, True)):
        model.zero_grad()
        F.mse_loss(model(x), x).backward()
        wanted = {name: p.grad for name, p in model.named_parameters()}
        factors = {name: torch.ones_like(p, requires_grad=True) for name, p in model.named_parameters()}
        model.zero_grad()
        computed = {name: p.detach() * factors[name] for name, p in model.named_parameters()}
        F.mse_loss(torch.func.functional_call(model, computed, (x,)), x).backward()
        for name, parameter in model.named_parameters():
            if wanted[name] is None:
                assert factors[name].grad is None, name
            else:
                torch.testing.assert_close(factors[name].grad, wanted[name] * parameter.detach(), rtol=1e-10, atol=0)
        assert all(isinstance(p, nn.Parameter) and p.requires_grad for p in model.parameters())


def test_the_rest_follows_the_plan_with_the_paths():
    """Even if the model is in eval mode and its paths aren't."""
    model = converted().eval()
    model.layers.train()
    scheme = rdp.ResidualDropPath(model, 0.5)
    for phase in scheme.iterations(plan=plan(True, False, True, False)):
        model(X).sum().backward()
        assert learned([model.stem]) == [phase == "drop"]
        model.zero_grad()


def test_a_model_that_owns_its_scheme_is_freed():
    model = converted()
    model.scheme = rdp.ResidualDropPath(model, 0.5)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None
