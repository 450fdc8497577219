"""Conversion runs a drop-path to find what it does. The converted block does the same, or the path is refused."""

import copy
import importlib
import importlib.util
import math
import pickle
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed
from rdp_kernels.convert.libraries import is_drop_path, left_over, rate_of
from rdp_kernels.convert.observed import Law, law_of
from rdp_kernels.paths.path import CONVERTED

from . import nets


def per_sample(x, p, scaled=True):
    keep = torch.rand(len(x), *[1] * (x.dim() - 1), dtype=x.dtype) >= p
    return x * keep.to(x.dtype) / (1 - p if scaled else 1)


class Drops(nn.Module):
    """To be varied: by another `drop` and other attributes."""

    def __init__(self, p=0.2):
        super().__init__()
        self.p = p

    def forward(self, x):
        return self.drop(x) if self.training and self.rate() > 0 else x

    def rate(self):
        return float(self.p)

    def drop(self, x):
        return per_sample(x, self.rate())


# Drop-paths that are followed: how each is made, P(drop), mode and whether it scales


class KeepProb(Drops):
    def __init__(self, p=0.2):
        super().__init__()
        del self.p
        self.keep_prob = 1 - p

    def rate(self):
        return 1 - self.keep_prob


class Tensors(Drops):
    def __init__(self, p=0.2):
        super().__init__(torch.linspace(0, p, 3)[-1])


class Buffer(Drops):
    def __init__(self, p=0.2):
        super().__init__()
        del self.p
        self.register_buffer("p", torch.tensor(p))


class Property(Drops):
    def __init__(self, p=0.2):
        nn.Module.__init__(self)
        self._rate = p

    p = property(lambda self: self._rate)


class OfItsClass(Drops):
    p = 0.2

    def __init__(self):
        nn.Module.__init__(self)


class Unscaled(Drops):
    def drop(self, x):
        return per_sample(x, self.p, scaled=False)


class Whole(Drops):
    def __init__(self, p=0.2, scaled=True):
        super().__init__(p)
        self.scaled = scaled

    def drop(self, x):
        if torch.rand(()) < self.p:
            return x * 0
        return x / (1 - self.p) if self.scaled else x


class ByPython(Drops):
    """Drops a whole batch, with Python's generator."""

    def drop(self, x):
        return x * 0 if random.random() < self.p else x / (1 - self.p)


class Zeros(Drops):
    """Returns zeros that don't come from its input."""

    def drop(self, x):
        return torch.zeros_like(x) if random.random() < self.p else x


class Skip(Drops):
    """Found by its behaviour alone."""

    def __init__(self, p=0.2):
        super().__init__(p)
        self.index, self.enabled = 3, True

    def forward(self, x, extra=None):
        return per_sample(x, self.p) if self.enabled and self.training else x


class Nothing(Drops):
    def __init__(self):
        nn.Module.__init__(self)

    def forward(self, x):
        return x


FOLLOWED = {
    "P(drop)": (Drops, 0.2, "sample", True),
    "at rate 0": (lambda: Drops(0.0), 0.0, "sample", True),
    "an int": (lambda: Drops(0), 0.0, "sample", True),
    "P(keep)": (KeepProb, 0.2, "sample", True),
    "a tensor": (Tensors, 0.2, "sample", True),
    "a number of numpy's": (lambda: Drops(np.float32(0.2)), 0.2, "sample", True),
    "an array of numpy's": (lambda: Drops(np.array(0.2)), 0.2, "sample", True),
    "a buffer": (Buffer, 0.2, "sample", True),
    "a property": (Property, 0.2, "sample", True),
    "of its class": (OfItsClass, 0.2, "sample", True),
    "not scaled": (Unscaled, 0.2, "sample", False),
    "whole batches": (Whole, 0.2, "block", True),
    "whole batches, not scaled": (lambda: Whole(0.2, False), 0.2, "block", False),
    "Python's generator": (ByPython, 0.2, "block", True),
    "zeros made anew": (Zeros, 0.2, "block", False),
    "unknown names": (Skip, 0.2, "sample", True),
    "nothing": (Nothing, 0.0, "sample", True),
    "ours": (lambda: rdp.DropPath(0.2), 0.2, "sample", True),
}


@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize("name", FOLLOWED)
def test_drop_paths_that_can_be_followed(name, dims):
    make, drop_prob, mode, scale = FOLLOWED[name]
    law, module = law_of(make(), dims), make()
    assert isinstance(law, Law), law
    assert law.holds_for(module)
    assert law.drop_prob(module) == pytest.approx(drop_prob)
    assert (law.mode, law.scale_by_keep) == (mode, scale)


def test_a_law_holds_for_modules_that_a_library_has_marked():
    """Such a mark says nothing about their behaviour."""
    plain, marked = Drops(), Drops()
    marked._is_hf_initialized = True
    assert [law_of(module, 3).holds_for(module) for module in (plain, marked)] == [True, True]


# Drop-paths that are refused: how each is made, and the reason


class Constant(Drops):
    def drop(self, x):
        return per_sample(x, 0.5)


class Percent(Drops):
    def rate(self):
        return self.p / 100


class Ramp(Drops):
    def __init__(self):
        super().__init__()
        self.ramp = 1.0

    def rate(self):
        return self.p * self.ramp


class Late(Ramp):
    """Drops nothing before a number has grown."""

    def rate(self):
        return self.p if self.ramp > 1000 else 0.0


class Rounded(Drops):
    def rate(self):
        return round(self.p, 1)


class ScaledInEval(Drops):
    def forward(self, x):
        return per_sample(x, self.p, scaled=False) if self.training else x * (1 - self.p)


class OtherScale(Drops):
    def drop(self, x):
        return per_sample(x, self.p) * (1 - self.p) ** 0.5


class Noise(Drops):
    def drop(self, x):
        return per_sample(x, self.p) + 0.1 * torch.randn_like(x)


class Channels(Drops):
    def drop(self, x):
        return x * (torch.rand(x.shape[:2] + (1,) * (x.dim() - 2)) >= self.p) / (1 - self.p)


class FixedCount(Drops):
    def drop(self, x):
        keep = torch.randperm(len(x)) >= round(self.p * len(x))
        return x * keep.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) / (1 - self.p)


class FixedCountOfMany(FixedCount):
    def drop(self, x):
        return super().drop(x) if len(x) > 128 else per_sample(x, self.p)


class NeverAll(Drops):
    def drop(self, x):
        out = per_sample(x, self.p)
        return out if out.any() else x / (1 - self.p)


class Pairs(Drops):
    def drop(self, x):
        keep = (torch.rand((len(x) + 1) // 2) >= self.p).repeat_interleave(2)[: len(x)]
        return x * keep.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) / (1 - self.p)


class NotAlone(Drops):
    def drop(self, x):
        return x if len(x) == 1 else per_sample(x, self.p)


class OwnGenerator(Drops):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator()


class SameMask(Drops):
    def drop(self, x):
        generator = torch.Generator().manual_seed(len(x))
        keep = torch.rand(len(x), *[1] * (x.dim() - 1), generator=generator) >= self.p
        return x * keep.to(x.dtype) / (1 - self.p)


class Fresh(Drops):
    def drop(self, x):
        keep = torch.tensor([random.SystemRandom().random() >= self.p for _ in x])
        return x * keep.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) / (1 - self.p)


class Largest(Drops):
    """Drops small rows."""

    def drop(self, x):
        keep = x.flatten(1)[:, 0].frac().abs() * torch.rand(len(x)) >= self.p
        return x * keep.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1)) / (1 - self.p)


class Counts(Drops):
    def __init__(self, p=0.0):
        super().__init__(p)

    def drop(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return per_sample(x, self.p)


class CountsInABuffer(Drops):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def drop(self, x):
        self.calls += 1
        return per_sample(x, self.p)


class CountsInItsClass(Drops):
    calls = 0

    def drop(self, x):
        type(self).calls += 1
        return per_sample(x, self.p)


class Shared(Drops):
    def __init__(self):
        super().__init__()
        self.schedule = {"factor": 1.0}


class Registry(Drops):
    schedule = {"factor": 1.0}  # noqa: RUF012

    def rate(self):
        return self.p * self.schedule["factor"]


class HoldsModules(Drops):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()


FACTOR = 1.0


class ReadsAGlobal(Drops):
    def rate(self):
        return self.p * FACTOR


def enclosing():
    factor = [1.0]

    class ReadsItsSurroundings(Drops):
        def rate(self):
            return self.p * factor[0]

    return ReadsItsSurroundings()


class Wide(Drops):
    def drop(self, x):
        return x * (torch.rand(len(x), *[1] * (x.dim() - 1)) >= self.p).float() / (1 - self.p)


class Detached(Drops):
    def drop(self, x):
        return per_sample(x.detach(), self.p)


class OnlyWithGradients(Drops):
    def drop(self, x):
        return per_sample(x, self.p) if torch.is_grad_enabled() else x


class InPlace(Drops):
    def drop(self, x):
        return x.mul_(per_sample(torch.ones_like(x), self.p))


class Adds(Drops):
    def forward(self, x, residual):
        return residual + super().forward(x)


class Replaced(Drops):
    def __init__(self):
        super().__init__()
        self.forward = lambda x: per_sample(x, self.p)


class TwoRates(Drops):
    def __init__(self):
        super().__init__(0.999)
        self.q = 0.999

    def rate(self):
        return self.p * self.q


class FewerThanItSays(Drops):
    """It has no scale that would show the rate."""

    def drop(self, x):
        return per_sample(x, 0.9 * self.p, scaled=False)


class ScaledWhereItDropsMuch(Drops):
    def drop(self, x):
        return per_sample(x, self.p, scaled=self.p > 0.5)


class WholeIfSmall(Drops):
    def drop(self, x):
        if len(x) > 32:
            return per_sample(x, self.p)
        return x * float(torch.rand(()) >= self.p) / (1 - self.p)


class OnlyInFloat32(Drops):
    def drop(self, x):
        return per_sample(x, self.p, scaled=x.dtype == torch.float32)


class OtherUnderAutocast(Drops):
    def drop(self, x):
        return x if torch.is_autocast_enabled("cpu") else per_sample(x, self.p)


class DoublesAtRateZero(Drops):
    def forward(self, x):
        return super().forward(x) if self.p > 0 or not self.training else 2 * x


STEPS = 0


class CountsInItsFile(Drops):
    def drop(self, x):
        global STEPS
        STEPS += 1
        return per_sample(x, self.p)


class RemembersInADefault(Drops):
    def drop(self, x, seen=[]):  # noqa: B006
        seen.append(len(x))
        return per_sample(x, self.p)


class Called(Drops):
    def __call__(self, x):
        return 2 * super().__call__(x)


class MakesAttributes(Drops):
    def __init__(self):
        nn.Module.__init__(self)

    def __getattr__(self, name):
        return 0.2 if name == "p" else super().__getattr__(name)


def replaced_identity():
    module = nn.Identity()
    module.forward = lambda x: 2 * x
    return module


class Learns(Drops):
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.2))


class OnMeta(Drops):
    def __init__(self):
        super().__init__(torch.tensor(0.2, device="meta"))


REFUSED = {
    TwoRates: "follows 'p' and 'q'",
    FewerThanItSays: "it drops 0.* of what it is given where 'p' is",
    ScaledWhereItDropsMuch: "at some rates only",
    WholeIfSmall: "a small batch whole and a large one in parts",
    OnlyInFloat32: "scales bfloat16 in another way than float32",
    OtherUnderAutocast: "depends on autocast",
    DoublesAtRateZero: "in training, where it doesn't drop, it isn't the identity",
    CountsInItsFile: "its code (changes|reads) 'STEPS'",
    RemembersInADefault: "a default of its arguments .list.",
    Called: "a __call__ of its own",
    MakesAttributes: "makes attributes by a method of its own",
    replaced_identity: "forward was replaced on the instance",
    Learns: "has parameters",
    OnMeta: "'p' .Tensor. has no numbers",
    Constant: "follows none of its attributes",
    Percent: "follows none of its attributes",
    Ramp: "'ramp' changes what it does too",
    Late: "follows none of its attributes",
    Rounded: "where P.drop. is 0.05, neither by",
    ScaledInEval: "in eval mode it isn't the identity",
    OtherScale: "neither by 1 / .1 - p. nor by 1",
    Noise: "not its input times a mask",
    Channels: "drops parts of a row",
    FixedCount: "depends on the others of its batch",
    FixedCountOfMany: "depends on the others of its batch",
    NeverAll: "depends on the others of its batch",
    Pairs: "depends on the others of its batch",
    NotAlone: "a sample that comes alone",
    OwnGenerator: "'generator' .Generator. may be shared",
    SameMask: "whatever the global generators' seed",
    Fresh: "something else than the global generators",
    Largest: "depends on the numbers in its input",
    Counts: "a call changes its attribute 'calls'",
    CountsInABuffer: "a call changes its attribute 'calls'",
    CountsInItsClass: "a call changes its attribute 'calls'",
    Shared: "'schedule' .dict. may be shared",
    Registry: "reads 'schedule' of its class .dict.",
    HoldsModules: "holds other modules",
    ReadsAGlobal: "reads 'FACTOR' .float.",
    enclosing: "reads 'factor' .list.",
    Wide: "returns .* float32 for .* bfloat16",
    Detached: "raises RuntimeError|gradient isn't",
    OnlyWithGradients: "depends on torch.no_grad",
    InPlace: "changes its input in place",
    Adds: "takes 2 arguments",
    Replaced: "forward was replaced on the instance",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_drop_paths_that_can_t_be_followed(make):
    module = make()
    before = copy.deepcopy(module.__dict__) if make is not OwnGenerator else None
    law = law_of(module, 3)
    assert isinstance(law, str)
    assert re.search(REFUSED[make], law), law
    assert CountsInItsClass.calls == STEPS == 0
    assert before is None or module.__dict__.keys() == before.keys()


# Modules around them


class Residual(nn.Module):
    """`x + drop_path(fn(x))`, to be varied."""

    def __init__(self, drop_path):
        super().__init__()
        self.fn, self.drop_path = nn.Linear(nets.DIM, nets.DIM), drop_path

    def forward(self, x):
        return x + self.drop_path(self.fn(x))


def dropped(model, rows=4000):
    """The fraction of rows that come back as they were."""
    x = torch.randn(rows, nets.DIM)
    return float((model(x) == x).all(1).float().mean())


def converted(*drop_paths):
    model = nn.Sequential(*map(Residual, drop_paths)).train()
    return model, rdp.convert(model, example_inputs=torch.randn(4, nets.DIM))


@pytest.mark.parametrize("make", [Drops, KeepProb, Tensors, Buffer, Property, Skip], ids=lambda make: make.__name__)
def test_a_schedule_is_followed(make):
    """Plans of a scheme follow it too, and so do copies."""
    model, report = converted(make())
    (row,) = report.converted
    assert row.drop_prob == pytest.approx(0.2)
    assert rate_of(model[0].drop_path) == pytest.approx(0.2)
    assert dropped(model) == pytest.approx(0.2, abs=0.04)
    scheme = rdp.ResidualDropPath(model, seed=0)
    copied = copy.deepcopy(model)
    for net in (model, copied):
        drop_path = net[0].drop_path
        name = next(n for n in ("keep_prob", "_rate", "p") if n in drop_path.__dict__ or n in drop_path._buffers)
        value = 0.4 if name == "keep_prob" else 0.6
        if isinstance(getattr(drop_path, name), torch.Tensor):
            getattr(drop_path, name).fill_(value)
        else:
            setattr(drop_path, name, value)
    for _ in scheme.iterations(4):
        assert scheme.plan.drop_probs == pytest.approx((0.6,))
        model(torch.randn(4, nets.DIM)).sum().backward()
    assert dropped(copied) == pytest.approx(0.6, abs=0.04)


def test_what_changes_after_conversion():
    """Another mode, scale or module is observed again, in copies from a pickle too."""
    model, report = converted(Whole(0.5), nn.Identity())
    assert [row.drop_prob for row in report] == [0.5, 0.0]
    model = pickle.loads(pickle.dumps(model))
    (_, first), (_, second) = (block.__dict__[CONVERTED][0] for block in model)
    assert (first.mode, first.scale_by_keep, second.drop_prob) == ("block", True, 0.0)
    model[0].drop_path.scaled, model[1].drop_path = False, KeepProb(0.3)
    assert (first.scale_by_keep, second.drop_prob) == (False, pytest.approx(0.3))
    model[0].drop_path = nn.Identity()
    assert dropped(model[1]) == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("make", [ScaledInEval, Adds, Replaced], ids=lambda make: make.__name__)
def test_a_drop_path_that_can_t_be_followed_is_put_in_later(make):
    model, _ = converted(Drops())
    scheme = rdp.ResidualDropPath(model)
    model[0].drop_path = make()
    with pytest.raises(RuntimeError, match=r"path 'drop_path' of Residual can't follow its drop-path.*rdp.convert"):
        next(scheme.iterations(4))
    scheme.remove()
    if make is not Adds:
        with pytest.warns(UserWarning, match="Residual runs as before its conversion.*its 'drop_path' was changed"):
            assert dropped(model) == pytest.approx(0.2, abs=0.04)


def doubled(self, x):
    return 2 * x


REPLACED_LATER = {
    "a method": lambda patch, drop_path: patch.setattr(type(drop_path), "drop", doubled),
    "the forward": lambda patch, drop_path: patch.setattr(type(drop_path), "forward", doubled),
    "a function": lambda patch, _: patch.setitem(globals(), "per_sample", lambda x, p: 2 * x),
    "a hook": lambda _, drop_path: drop_path.register_forward_hook(lambda module, args, out: 2 * args[0]),
    "a hook before": lambda _, drop_path: drop_path.eval().register_forward_pre_hook(lambda module, x: (2 * x[0],)),
}


@pytest.mark.parametrize("what", REPLACED_LATER)
def test_what_a_drop_path_calls_is_replaced_later(what, monkeypatch):
    """Also in a drop-path that was observed before. The block follows the new behaviour, and the old one once
    restored."""
    model, _ = converted(Drops())
    x = torch.randn(5, nets.DIM)
    with monkeypatch.context() as patch:
        REPLACED_LATER[what](patch, model[0].drop_path)
        with pytest.warns(UserWarning, match="Residual runs as before its conversion.*its 'drop_path' was changed"):
            torch.testing.assert_close(model(x), x + 2 * model[0].fn(x))
    if "hook" not in what:
        assert dropped(model) == pytest.approx(0.2, abs=0.04)


class HoldsDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x):
        return x * self.dropout(torch.ones(len(x), 1))


def test_the_rate_of_one_that_is_refused():
    """The rate is an attribute's if that agrees with the observed one, else the observed one."""
    _, report = converted(ScaledInEval(0.3), Constant(0.3), ScaledInEval(0.0))
    assert [row.drop_prob for row in report.refused] == [0.3, pytest.approx(0.5, abs=0.05), 0.0]


NAMED = {
    "modules": (HoldsDropout, "it holds other modules"),
    "compiled": (lambda: torch.compile(Drops(), backend="eager"), "its forward was replaced on the instance"),
}


@pytest.mark.parametrize("what", NAMED)
def test_a_refused_module_that_is_named_like_a_drop_path_is_reported(what):
    """Its rate is unknown, so that a scheme warns about it."""
    make, reason = NAMED[what]
    model, report = converted(make())
    (row,) = report.refused
    assert (row.refused, math.isnan(row.drop_prob)) == (reason, True)
    assert left_over(model) == ["0.drop_path"]


@pytest.mark.parametrize("drop_prob", [None, 0.3])
def test_a_refused_one_goes_on_as_it_did_and_a_scheme_warns_of_it(drop_prob):
    model = nn.Sequential(Residual(Constant()), Residual(Drops())).train()
    report = rdp.convert(model, drop_prob, example_inputs=torch.randn(4, nets.DIM))
    (row,) = report.refused
    assert row.block == "0"
    assert "follows none of its attributes" in row.refused
    assert drop_prob is not None or row.drop_prob == pytest.approx(0.5, abs=0.05)
    assert dropped(model[0]) == pytest.approx(0.5, abs=0.04)
    assert left_over(model) == ["0.drop_path"]
    with pytest.warns(UserWarning, match="0.drop_path"):
        rdp.ResidualDropPath(model)


class GivesARate(Residual):
    def forward(self, x):
        return x + self.drop_path(self.fn(x), 0.1)


class GivesAName(Residual):
    def forward(self, x):
        return x + self.drop_path(x=self.fn(x))


class GivesBoth(Residual):
    def forward(self, x):
        return self.drop_path(self.fn(x), x)


def with_a_hook():
    drop_path = Drops()
    drop_path.register_forward_hook(lambda module, args, out: 2 * out)
    return Residual(drop_path)


CALLED = {
    "another argument": (lambda: GivesARate(Skip()), r"called with .fn, 0\.1. instead of one tensor"),
    "by keyword": (lambda: GivesAName(Drops()), r"called with .x=fn. instead of one tensor"),
    "the residual": (lambda: GivesBoth(Adds()), "instead of one tensor"),
    "a hook": (with_a_hook, "it has hooks"),
}


@pytest.mark.parametrize("name", CALLED)
def test_how_it_is_called(name):
    make, reason = CALLED[name]
    model = nn.Sequential(make()).train()
    model[0].drop_path.__class__ = type("DropPath", (type(model[0].drop_path),), {})
    (row,) = rdp.convert(model, example_inputs=torch.randn(4, nets.DIM))
    assert re.search(reason, row.refused), row.refused


class DropPathScale(nn.Module):
    """Isn't a drop-path."""

    def forward(self, x):
        return 2 * x


class DropPathless(Drops):
    """Is a drop-path under a name that other modules have too."""


class Dropout(Drops):
    """Drops numbers, not rows."""

    def drop(self, x):
        return nn.functional.dropout(x, self.p)


def test_what_is_a_drop_path():
    expected = {
        Skip(0.0): True, Skip(): True, Drops(): True, FixedCount(): True, DropPathless(): True,
        DropPathScale(): False, Dropout(): False, Nothing(): False, nn.Dropout(): False, nn.ReLU(): False,
        nn.Identity(): False,
    }  # fmt: skip
    assert {module: is_drop_path("skip", module) for module in expected} == expected
    assert is_drop_path("drop_path", nn.Identity())


def test_blocks_alike_but_for_their_drop_paths():
    """Neither their names nor their descriptions tell them apart."""
    same = [type("DropPath", (kind,), {"extra_repr": lambda self: ""}) for kind in (Drops, Constant, KeepProb)]
    _, report = converted(*(kind() for kind in same))
    assert [row.refused is None for row in report] == [True, False, True]


def test_the_generators_stay_as_they_are():
    drop_paths = [type("DropPath", (kind,), {})() for kind in (Drops, ByPython, Fresh, Counts)]
    before = [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]
    with torch.no_grad():
        laws = [law_of(drop_path, 3) for drop_path in drop_paths]
        assert [is_drop_path("skip", drop_path) for drop_path in drop_paths] == [True] * 4
        assert [rate_of(drop_path) for drop_path in drop_paths] == [0.2, 0.2, pytest.approx(0.2, abs=0.05), 0.0]
    assert [isinstance(law, Law) for law in laws] == [True, True, False, False]
    assert [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()] == before


def library_classes(library):
    """All drop-paths of a library, by the names of their classes."""
    root = Path(importlib.util.find_spec(library).origin).parent
    for file in sorted(root.rglob("*.py")):
        found = re.findall(r"^class (\w*(?:DropPath|StochasticDepth)\w*)\(", file.read_text(), re.MULTILINE)
        if found and not file.name.startswith("modular_"):
            module = importlib.import_module(".".join(file.relative_to(root.parent).with_suffix("").parts))
            yield from (getattr(module, name) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "torchvision", "transformers"])
def test_drop_paths_of_libraries(library):
    """Budget: two minutes."""
    if not installed(library):
        pytest.skip(f"{library} is not installed")
    if installed("torchvision"):
        import_torchvision()
    seen = 0
    for kind in library_classes(library):
        modes = ["row", "batch"] if library == "torchvision" else [None]
        for mode in modes:
            drop_path = kind(0.1) if mode is None else kind(0.1, mode)
            law = law_of(drop_path, 3)
            assert isinstance(law, Law), (kind, law)
            assert law.mode == ("block" if mode == "batch" else "sample")
            assert law.scale_by_keep
            assert law.drop_prob(drop_path) == 0.1
            seen += 1
    assert seen >= {"timm": 1, "torchvision": 2, "transformers": 40}[library]
