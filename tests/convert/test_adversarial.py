"""Each block of `adversarial.py` trains after conversion exactly as before, or is refused and left as it was."""

import contextlib
import dataclasses
import io
import random
import re
import signal
import types
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rdp_kernels as rdp
from rdp_kernels.paths.path import CONVERTED

from . import adversarial
from .adversarial import KINDS
from .nets import DIM, DropPath

LIMIT = 60
"""Seconds for a block; a longer conversion is an error."""
STEPS = 9
AUTOCAST, WITHOUT_GRADIENTS, EVALUATION = (5, 6), 7, 8
TOLERANCE = 1e-6


class Net(nn.Module):
    """Two blocks of a kind. It returns the head's output and what the blocks returned."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.stem, self.blocks, self.head = (
            nn.Linear(DIM, DIM),
            nn.ModuleList(kind() for _ in range(2)),
            nn.Linear(DIM, 3),
        )

    def forward(self, x):
        x, outputs = self.stem(x), []
        for block in self.blocks:
            outputs.append(self.kind.call(block, x))
            x = self.kind.take(outputs[-1])
        return self.head(x), outputs


def net_of(kind):
    _seed(0)
    return Net(kind).train()


def _seed(seed):
    torch.default_generator.manual_seed(seed)  # `torch.manual_seed` also writes down its stack, for GPUs
    random.seed(seed)
    np.random.seed(seed)


def generators():
    name, numbers, *others = np.random.get_state()
    return torch.get_rng_state(), random.getstate(), (name, numbers.tobytes().hex(), *others)


# What is compared


def plain(value, seen=()):
    """`value` in plain containers: objects that aren't data as their type, modules and functions by name."""
    if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
        return "tensor within torch.func", list(value.shape)
    if isinstance(value, Tensor):
        data = value.detach()
        return ("tensor", str(data.dtype), str(data.device), list(data.shape), value.requires_grad, data.clone())
    if id(value) in seen:
        return "a cycle"
    seen = (*seen, id(value))
    kind = type(value).__qualname__
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return kind, plain(vars(value), seen)
    if isinstance(value, dict):
        return kind, {str(k): plain(v, seen) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return kind, [plain(v, seen) for v in value]
    if isinstance(value, (set, frozenset)):
        return kind, sorted(map(repr, value))
    if isinstance(value, types.SimpleNamespace):
        return kind, plain(vars(value), seen)
    if value is None or isinstance(value, (bool, int, float, complex, str, np.number)):
        return kind, value
    return kind, getattr(value, "__qualname__", None)


def difference(expected, actual, tolerance=TOLERANCE):
    """Where and how two values of `plain` differ first, or None."""
    if isinstance(expected, Tensor) and isinstance(actual, Tensor):
        if expected.shape != actual.shape or expected.is_meta or expected.numel() == 0:
            return None  # shapes and devices are compared before
        error = float((expected.to(torch.complex128) - actual.to(torch.complex128)).abs().max())
        largest = max(1.0, float(expected.to(torch.complex128).abs().max()))
        same = error <= tolerance * largest or (torch.equal(expected.isnan(), actual.isnan()) and error != error)
        return None if same else f" is off by {error / largest:.1e}"
    if type(expected) is not type(actual):
        return f" is {type(actual).__name__} instead of {type(expected).__name__}"
    if isinstance(expected, dict):
        if expected.keys() != actual.keys():
            return (
                f" has {sorted(actual.keys() - expected.keys())} more, {sorted(expected.keys() - actual.keys())} less"
            )
        places = [(f".{k}", expected[k], actual[k]) for k in expected]
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(actual):
            return f" has length {len(actual)} instead of {len(expected)}"
        places = [("", a, b) for a, b in zip(expected, actual, strict=True)]
    else:
        same = expected == actual or (expected != expected and actual != actual)
        return None if same else f" is {actual!r} instead of {expected!r}"
    for place, a, b in places:
        found = difference(a, b, tolerance)
        if found is not None:
            return place + found
    return None


def state_of(model):
    """Modules with their types, parameters, buffers, attributes and numbers of hooks, without what conversion adds."""
    state = {}
    for name, module in model.named_modules():
        attributes = {}
        for key, value in vars(module).items():
            if key.endswith("hooks") or "_hooks_" in key:
                attributes[key] = len(value)
            elif key == "_modules":
                attributes[key] = {k: type(m).__qualname__ for k, m in value.items()}
            elif not key.startswith("_rdp") and key != CONVERTED:
                attributes[key] = plain(value)
        state[name] = attributes
    return state


# Training


def trained(model):
    """All visible results of five steps, two of them under autocast, one without gradients, and of an evaluation."""
    kind, seen, calls = model.kind, [], []
    for name, module in model.blocks.named_modules():
        if name and not isinstance(module, DropPath) and "drop_path" not in name:
            record = _Records(name, calls)
            module.register_forward_pre_hook(record)
            module.register_forward_hook(record)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(STEPS):
        model.train(step != EVALUATION)
        if step == 2:
            kind.later(model)
        like = next(model.parameters())
        x = kind.inputs(step).to(like.device, like.dtype).requires_grad_()
        _seed(step)
        calls.clear()
        now = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                autocast = torch.autocast("cpu", torch.bfloat16, enabled=step in AUTOCAST)
                with autocast, torch.set_grad_enabled(step != WITHOUT_GRADIENTS):
                    head, outputs = model(x)
                now["outputs"] = plain((head, outputs))
                losses = [t for t in (head, *leaves(outputs), *auxiliary(model)) if t.requires_grad]
                if losses:
                    sum(t.to(like.dtype).square().mean() for t in losses).backward()
            except Exception as error:
                now["raises"] = f"{type(error).__name__}: {error}"
        now["calls of children"] = list(calls)
        now["gradients"] = {name: plain(p.grad) for name, p in model.named_parameters()} | {"x": plain(x.grad)}
        now["generators"] = plain(generators())
        now["printed"] = printed.getvalue()
        now["warnings"] = [str(w.message) for w in warned if "runs as before its conversion" not in str(w.message)]
        optimizer.step()
        now["state"] = state_of(model)
        now["shared state"] = plain(adversarial.shared_state())
        optimizer.zero_grad()
        seen.append(now)
    return seen


class _Records:
    """A hook that records each call of a child: its arguments or output, and the contexts around it."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __call__(self, module, *values):
        contexts = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_inference_mode_enabled())
        contexts = (*contexts, torch.backends.cuda.flash_sdp_enabled(), adversarial.number, module.training)
        self.calls.append((self.name, contexts, plain(values)))


def leaves(value):
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [leaf for v in values for leaf in leaves(v)]


def auxiliary(model):
    found = [getattr(block, "aux_loss", None) for block in model.blocks]
    return [loss for loss in found if isinstance(loss, Tensor)]


def first_difference(expected, actual):
    for step, (theirs, ours) in enumerate(zip(expected, actual, strict=True)):
        if theirs.keys() != ours.keys():
            return f"step {step}: {ours.get('raises', 'no error')} instead of {theirs.get('raises', 'no error')}"
        for what in theirs:
            found = difference(theirs[what], ours[what])
            if found is not None:
                return f"step {step}: {what}{found}"
    return None


# The judge


class Hangs(BaseException):
    pass


@contextlib.contextmanager
def limit(seconds):
    def stop(*_):
        raise Hangs(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def converted(model):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of blocks that warn
        bare = model.kind.__mro__[1] is adversarial.Bare or model.kind is adversarial.DropPathInForward
        return rdp.convert(model, 0.0 if bare else None, example_inputs=model.kind.inputs(0)[:4])


def judge(kind):
    """Returns what is wrong with the conversion of a kind of block, empty if nothing is, and the outcome."""
    wrong = []
    adversarial.reset()
    expected = trained(net_of(kind))
    adversarial.reset()
    model = net_of(kind)
    _seed(1)
    before, random_before = state_of(model), plain(generators())
    report = converted(model)
    found = difference(before, state_of(model))
    if found is not None:
        wrong.append(f"conversion leaves the model changed: {found}")
    found = difference(random_before, plain(generators()))
    if found is not None:
        wrong.append(f"conversion moves the generators: {found}")
    done = [CONVERTED in block.__dict__ for block in model.blocks]
    rows = [row for row in report if row.block.startswith("blocks.") and row.refused is not None]
    reasons = [row.refused for row in rows]
    reasons += [row.reason for row in getattr(report, "without_paths", ()) if row.block.startswith("blocks.")]
    outcome = "right" if all(done) else f"refused: {'; '.join(dict.fromkeys(reasons))}"
    if not all(done) and not (
        reasons and all(r and not re.search(r"(Error|Exception|Iteration): ?$", r) for r in reasons)
    ):
        wrong.append("no reason is given")
    if any(done) != all(done):
        wrong.append("blocks of one class are not treated alike")
    if not any(done) and any(type(block) is not kind for block in model.blocks):
        wrong.append("a refused block has another class")
    adversarial.reset()
    found = first_difference(expected, trained(model))
    if found is not None:
        wrong.append(found)
    return wrong, outcome


@pytest.fixture(autouse=True)
def _alone():
    yield
    adversarial.reset()


@pytest.mark.parametrize("name", KINDS)
def test_it_trains_as_before_or_is_refused(name):
    kind = KINDS[name]
    with limit(LIMIT):
        wrong, outcome = judge(kind)
    assert not wrong, f"{outcome}: {wrong}"
    if kind.outcome == "right":
        assert outcome == "right"
    elif kind.outcome == "refused":
        assert outcome.startswith("refused: "), outcome
        assert re.search(kind.reason, outcome), outcome


# With paths dropped


def planned(model, keep, mode):
    """The blocks' inputs and outputs in a drop iteration; `keep` holds what is kept of each block."""
    adversarial.reset()
    scheme = rdp.ResidualDropPath(model, 0.5, mode=mode, freeze="none")
    kept = [keep[[path.module.block is block for block in model.blocks].index(True)] for path in scheme.paths]
    plan = rdp.PathPlan(torch.tensor(kept), [0.5] * len(kept), mode)
    model.zero_grad()
    _seed(3)
    with scheme.drop_iteration(plan=plan), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of blocks that warn
        head, outputs = model(model.kind.inputs(0))
        head.square().mean().backward()
    scheme.remove()
    outputs = [model.kind.take(out).detach() for out in outputs]
    return [model.stem(model.kind.inputs(0)).detach(), *outputs[:-1]], outputs


def check_masked(twin, inputs, outputs, keep):
    """Checks outputs against the original blocks: the residual plus, where the branch is kept, twice the update."""
    adversarial.reset()
    _seed(3)
    for block, x, out, kept in zip(twin.blocks, inputs, outputs, keep, strict=True):
        with torch.no_grad():
            update = twin.kind.take(twin.kind.call(block, x.clone())) - x
        expected = x + 2 * update * torch.as_tensor(kept).float().reshape(-1, 1, 1)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


RIGHT = [name for name, kind in KINDS.items() if kind.outcome == "right"]


@pytest.mark.slow
@pytest.mark.parametrize("name", RIGHT)
def test_paths_are_dropped_as_masks_drop_them(name):
    """Some rows; then a whole block, whose weights get no gradient. Buffers move as if all rows had been computed.

    Budget for all: a minute on two cores.
    """
    kind = KINDS[name]
    rows = [True, False, True, True, False, False]
    with limit(LIMIT):
        adversarial.reset()
        model, twin = net_of(kind), net_of(kind)
        converted(model)
        keep = [rows, rows[::-1]]
        inputs, outputs = planned(model, keep, "sample")
        if kind.plain:
            check_masked(twin, inputs, outputs, keep)
            found = difference(plain(dict(twin.named_buffers())), plain(dict(model.named_buffers())))
            assert found is None, found
        keep = [True, False]
        inputs, outputs = planned(model, keep, "block")
        if kind.plain:
            check_masked(twin, inputs, outputs, keep)
    for _, path in vars(model.blocks[1])[CONVERTED]:
        inside = [p for module in path.branch_modules() for p in module.parameters()]
        assert all(p.grad is None for p in inside)


def test_blocks_that_look_alike_are_told_apart():
    """Converting one tells nothing about another of the same class with the same graph."""
    model = net_of(adversarial.LooksAlike)
    model.blocks[1].fc.mixes = True
    report = converted(model)
    assert [CONVERTED in vars(block) for block in model.blocks] == [True, False], str(report)
