"""The second self-check of a conversion: on copies in training mode, children too, as users run them.

With all rows kept the same operations run in both, so that all is compared to the bit: what is returned, gradients, what
is left on modules, the generators. With some rows or none, and with the branches frozen, dropout is switched off, the
original's drop-paths are given masks, and numbers are compared within the error that the original has itself.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from ..drop_paths import is_drop_path
from ..frozen import tensors_of
from ..paths import CONVERTED, Decision, parameters_of
from .calls import Call, Refused, cloned
from .carve import Carved
from .check import _castable, _masking, _planning, _silence, _spread, _without_dropout
from .differences import Differences, exactly, relative_difference
from .snapshot import generator_states, preserved_generators, repr_of
from .source import install
from .spec import Recipe

SEEDS = (0, 1)
_OWN = {"_parameters", "_buffers", "_modules", "forward", "training"}


def check_training(block: nn.Module, carved: Carved, recipe: Recipe, call: Call) -> None:
    """Raises `Refused` with the first difference that is seen."""
    with preserved_generators(), _quiet():
        block = _spread(block)
        device = next((t.device.type for t in [*block.parameters(), *call.flat()[0]] if isinstance(t, Tensor)), "cpu")
        _Whole(block, recipe, call).check(None)
        _Whole(block, recipe, call).check(device)
        _Masked(block, carved, recipe, call, device).check()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# One step, and what it leaves


@dataclass
class _Step:
    """What a forward and a backward gave, and what the modules hold afterwards."""

    output: Any
    gradients: dict[str, Tensor | None]
    inputs: Any
    state: dict[str, Any]
    generators: dict[str, Any]

    def numbers(self, with_buffers: bool) -> dict[str, Tensor]:
        """Outputs, gradients that there are, and buffers."""
        found = {f"output {i}": t.detach() for i, t in enumerate(tensors_of(self.output))}
        found |= {name: t for name, t in self.gradients.items() if t is not None}
        buffers = {name: t for name, t in self.state.items() if name.startswith("the buffer") and t is not None}
        return found | (buffers if with_buffers else {})


def _step(block: nn.Module, call: Call, run: Callable[[Call], Any], seed: int, autocast: str | None) -> _Step:
    """`autocast`: of which device type, None for none."""
    for parameter in block.parameters():
        parameter.grad = None
    given = call.map_tensors(lambda t: cloned(t).requires_grad_() if t.is_floating_point() else cloned(t))
    leaves = {f"the gradient of input {i}": t for i, t in enumerate(given.flat()[0]) if _learns(t)}
    passed = given.map_tensors(lambda t: t.view_as(t) if t.requires_grad else t)  # not leaves: works in place
    context = contextlib.nullcontext() if autocast is None else torch.autocast(autocast, torch.bfloat16)
    _seed(seed)
    with torch.enable_grad():
        with context:
            output = run(passed)
        learning = [t for t in tensors_of(output) if t.is_floating_point() and t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        weights = [(torch.rand(t.shape, generator=generator) + 0.5).to(t) for t in learning]
        if learning:
            torch.autograd.backward(learning, weights)
    leaves |= {f"the gradient of {name}": p for name, p in block.named_parameters() if p.requires_grad}
    gradients = {name: t.grad for name, t in leaves.items()}
    return _Step(output, gradients, (passed.args, passed.kwargs), _state_of(block), generator_states())


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _state_of(block: nn.Module) -> dict[str, Any]:
    """What modules hold, by the words that a reason has for it."""
    state: dict[str, Any] = {}
    for name, module in block.named_modules():
        prefix = f"{name}." if name else ""
        state |= {f"the parameter {prefix + n!r}": p for n, p in module._parameters.items()}
        state |= {f"the buffer {prefix + n!r}": b for n, b in module._buffers.items()}
        for attribute, value in module.__dict__.items():
            if attribute.startswith("_rdp_") or attribute in _OWN:
                continue
            hooks = attribute.endswith("hooks") or "_hooks_" in attribute
            state[f"the attribute {prefix + attribute!r}"] = len(value) if hooks and hasattr(value, "__len__") else value
    return state


def _in_training(block: nn.Module, double: bool = False) -> nn.Module:
    copied = copy.deepcopy(block)
    copied = copied.double() if double else copied
    copied.train()
    for module in copied.modules():
        if isinstance(module, nn.SyncBatchNorm):  # it would wait for other ranks, and needs a GPU
            module.__class__ = _Local
    return copied


class _Local(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


class _Decided:
    """A slot that always decides the same."""

    scheme = runner = probe = None

    def __init__(self, decision: Decision):
        self._decision = decision

    def decide(self, x: Tensor) -> Decision:
        return self._decision


def _decide(block: nn.Module, decision: Decision) -> None:
    for _, path in block.__dict__[CONVERTED]:
        path.slot = _Decided(decision)


def _called(block: nn.Module) -> Callable[[Call], Any]:
    return lambda call: block(*call.args, **call.kwargs)


def _ours(ours: nn.Module, when: str, run: Callable[[], _Step]) -> _Step:
    """The converted block's step. Raises `Refused` where it doesn't run, or runs as before its conversion."""
    try:
        step = run()
    except Exception as error:
        raise Refused(f"{when} it raises {type(error).__name__}: {error}") from error
    for reason in ours.__dict__.get("_rdp_warned", ()):
        raise Refused(f"{when} it runs as before its conversion: {reason}")
    return step


# All rows kept


class _Whole:
    """The original with its drop-paths in eval mode, and the converted block that keeps all rows."""

    def __init__(self, block: nn.Module, recipe: Recipe, call: Call):
        self._original, self._converted, self._call = _in_training(block), _in_training(block), call
        install(self._converted, recipe, 0.5)
        _decide(self._converted, Decision())
        for copied in (self._original, self._converted):
            for name, module in copied.named_modules():
                if is_drop_path(name.rpartition(".")[2], module):
                    module.eval()

    def check(self, autocast: str | None) -> None:
        """Two steps. Where the original fails under autocast, nobody will run it so."""
        for seed in SEEDS:
            when = f"in training mode{_under(autocast)} with all rows kept (seed {seed})"
            try:
                expected = _step(self._original, self._call, _called(self._original), seed, autocast)
            except Exception as error:
                if autocast is not None:
                    return
                raise Refused(f"in training mode its own forward raises {type(error).__name__}: {error}") from error
            ours = self._converted
            actual = _ours(ours, when, lambda: _step(ours, self._call, _called(ours), seed, autocast))
            differences = Differences()
            found = (
                differences.between("what it returns", expected.output, actual.output)
                or differences.between("its arguments", expected.inputs, actual.inputs)
                or _of_states(differences, expected.state, actual.state)
            )
            for name, gradient in expected.gradients.items():
                found = found or differences.between(name, gradient, actual.gradients.get(name))
            found = found or _of_generators(expected.generators, actual.generators)
            if found:
                raise Refused(f"{when} {found}")


def _under(autocast: str | None) -> str:
    return "" if autocast is None else " under autocast to bfloat16"


def _of_states(differences: Differences, expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    for name in expected.keys() ^ actual.keys():
        return f"{name} is {'not ' if name in expected else ''}set afterwards"
    for name, value in expected.items():
        found = differences.between(name, value, actual[name])
        if found:
            return f"{found}, afterwards"
    return None


def _of_generators(expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    for name, state in expected.items():
        if repr_of(state) != repr_of(actual[name]):
            return f"the generator of {name} has another state afterwards: it draws other random numbers"
    return None


# Some rows, none, and frozen branches


class _Masked:
    """The original whose drop-paths mask rows, and the converted block under decisions that say the same; dropout is
    off, and other random functions give all rows the same numbers."""

    def __init__(self, block: nn.Module, carved: Carved, recipe: Recipe, call: Call, device: str):
        self._block, self._carved, self._recipe, self._call, self._device = block, carved, recipe, call, device
        self._double, self._tolerance = _castable(block, call)

    def check(self) -> None:
        some, few, none = (1, 0, 1, 1, 0), (0, 0, 1, 0, 0), (0,)
        for what, pattern in {"some rows dropped": some, "all rows but few dropped": few}.items():
            exact = self._compare(what, pattern, "double") if self._double else None
            if pattern is some or not self._double:
                native = self._compare(what, pattern, "native", exact)
                self._compare(what, pattern, "autocast", exact or native)
        native = self._compare("all rows dropped", none, "native")
        self._compare("all rows dropped", none, "autocast", native)
        self._check_frozen()

    def _compare(self, what: str, pattern: tuple[int, ...], setting: str, exact: _Step | None = None) -> _Step | None:
        """`exact`: what the original gave with more digits. Returns what it gives here."""
        when = f"in training mode{_under(self._device if setting == 'autocast' else None)} with {what}"
        expected, given = self._original(pattern, setting, when)
        if expected is None:
            return None
        ours, call = given
        run = _planning(ours, self._carved, pattern)
        actual = self._ours(ours, when, call, run, setting)
        found = Differences(lambda a, b: None).between("what it returns", expected.output, actual.output)
        found = found or self._of_numbers(expected, actual, exact, setting, of_all=pattern != (0,))
        if found:
            raise Refused(f"{when} {found}{_WHY if pattern != (0,) else ''}")
        return expected

    def _original(self, pattern: tuple[int, ...] | None, setting: str, when: str) -> tuple[_Step | None, Any]:
        """The original's step, with all rows kept as they are where there is no pattern; a converted copy and its
        arguments."""
        double = setting == "double"
        call = self._call.map_tensors(lambda t: t.double() if double and t.is_floating_point() else t)
        original, ours = (_in_training(self._block, double) for _ in range(2))
        install(ours, self._recipe, 0.5)
        if pattern is None:
            _silence(original)
        run = _called(original) if pattern is None else _masking(original, self._carved, self._recipe, pattern)
        try:
            with _without_dropout(), _SameForAllRows():
                step = _step(original, call, run, 0, self._device if setting == "autocast" else None)
        except Exception as error:
            if setting == "autocast":
                return None, None
            raise Refused(f"{when} its own forward raises {type(error).__name__}: {error}") from error
        return step, (ours, call)

    def _ours(self, ours: nn.Module, when: str, call: Call, run: Any, setting: str) -> _Step:
        with _without_dropout(), _SameForAllRows():
            autocast = self._device if setting == "autocast" else None
            return _ours(ours, when, lambda: _step(ours, call, run, 0, autocast))

    def _of_numbers(
        self, expected: _Step, actual: _Step, exact: _Step | None, setting: str, of_all: bool = True
    ) -> str | None:
        wanted, got = expected.numbers(of_all), actual.numbers(of_all)
        best = wanted if exact is None else exact.numbers(of_all)
        for name, value in wanted.items():
            ours = got.get(name, value.new_zeros(value.shape))  # no gradient where a branch wasn't run
            if not value.is_floating_point():
                if setting == "double" and not torch.equal(value, ours):
                    return f"{name} differs from the original's"
                continue
            error = relative_difference(best[name], ours)
            budget = self._tolerance
            if setting != "double":
                budget = 2 * relative_difference(best[name], value) + _FLOOR.get(value.dtype, 2e-4)
                if setting == "autocast":
                    budget = max(budget, _FLOOR[torch.bfloat16])
            if not error <= budget:
                return f"{name} differs from the original's by {error:.1e} of its largest element"
        return None

    def _check_frozen(self) -> None:
        """A frozen branch computes what it computes, and leaves all that it has as it is; so does one that is dropped."""
        setting = "double" if self._double else "native"
        when = "in training mode with its branches frozen"
        expected, given = self._original(None, setting, when)
        assert expected is not None
        ours, call = given
        dropped = _in_training(self._block, setting == "double")
        install(dropped, self._recipe, 0.5)
        moved = []
        for block, decision in (ours, Decision(False, frozen=True)), (dropped, Decision(False)):
            before = {name: cloned(b) for name, b in block.named_buffers()}
            run = _planning(block, self._carved, ())
            _decide(block, decision)
            step = self._ours(block, when, call, run, setting)
            moved.append([name for name, b in block.named_buffers() if not _equal(before.get(name), b)])
            if block is ours:
                actual = step
        for name in moved[0]:
            if name not in moved[1]:
                raise Refused(
                    f"its branch changes the buffer {name!r} in training, which a frozen or dropped branch has to leave "
                    "as it is"
                )
        own = {id(p) for _, path in ours.__dict__[CONVERTED] for p in parameters_of(path)}
        for name, parameter in ours.named_parameters():
            gradient = f"the gradient of {name}"
            if id(parameter) in own and expected.gradients.pop(gradient, None) is not None:
                if actual.gradients[gradient] is not None:
                    raise Refused(f"{when} {name} gets a gradient")
        found = self._of_numbers(expected, actual, None, setting, of_all=False)
        if found:
            raise Refused(f"{when} {found}")


_WHY = (
    "; with all rows kept it doesn't, so that in training its branch computes for a sample what depends on the others: "
    "statistics of the batch, or a capacity"
)
_FLOOR = {torch.float32: 2e-5, torch.bfloat16: 4 * 2**-7, torch.float16: 4 * 2**-10}


def _equal(before: Tensor | None, after: Tensor) -> bool:
    return before is not None and before.shape == after.shape and exactly(before, after) is None


class _SameForAllRows(TorchDispatchMode):
    """Random functions give every row the same numbers, however many rows there are and whatever was drawn before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        torch.manual_seed(0)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not isinstance(out, Tensor) or out.dim() == 0:
            return out
        many = out.new_empty((_MANY, *out.shape[1:]))
        torch.manual_seed(0)
        if name in _FILL or (name == "bernoulli_" and not isinstance(args[1], Tensor)):
            func(many, *args[1:], **kwargs)
        elif name in ("rand_like", "randn_like", "randint_like"):
            many = func(many, *args[1:], **kwargs)
        elif name in ("rand", "randn", "randint"):
            many = func(*([_MANY, *a[1:]] if isinstance(a, list) else a for a in args), **kwargs)
        elif name == "bernoulli":
            many = many.uniform_() < args[0]
        else:
            return out
        return out.copy_(many[0].expand_as(out))


_FILL = {"uniform_", "normal_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"}
_MANY = 33  # of few numbers, the last sixteen are made in another way
