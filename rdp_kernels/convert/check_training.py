"""The second self-check of a conversion: on copies in training mode, children too, as users run them.

With all rows kept the same operations run in both, so that what is returned, what is left on modules and the generators
are compared to the bit, and gradients but for the order of sums. With some rows or none, and with the branches frozen,
dropout is switched off, the original's drop-paths are given masks, and numbers are compared within the error that the
original has itself.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..paths.binding import PathBinding, PathModule, StochasticDepth
from ..paths.decision import FROZEN, SKIP, Decision
from ..paths.freezing import tensors_of
from ..paths.path import CONVERTED, parameters_of
from .calls import Call, Refused, cloned
from .carve import Carved
from .check import (
    SameForAllRows,
    _masking,
    _planning,
    _silence,
    _spread,
    _without_dropout,
    called,
    depends_on_dtype,
    device_type_of,
    precision_of,
    set_seed,
)
from .differences import ROUNDINGS, Differences, relative_difference, rounded
from .libraries import is_drop_path
from .report import describe
from .snapshot import generator_states, preserved_generators, repr_of
from .source import install
from .spec import Recipe

SEEDS = (0, 1)
_OWN = {"_parameters", "_buffers", "_modules", "forward", "training"}


def check_training(block: nn.Module, carved: Carved, recipe: Recipe, call: Call) -> None:
    """Raises `Refused` with the first difference that is seen."""
    with preserved_generators(), _quiet():
        block = _spread(block)
        device = device_type_of(block, call)
        settings = [_Setting(" under autocast to bfloat16", autocast=device)]
        if not depends_on_dtype(recipe):
            settings.append(_Setting(" under autocast to bfloat16, called with bfloat16", torch.bfloat16, device))
        _Whole(block, recipe, call).check([_Setting(), *settings])
        _Masked(block, carved, recipe, call).check(settings)


@dataclass(frozen=True)
class _Setting:
    """How a step is run.

    Args:
        words: what reasons say of it.
        dtype: of the inputs and, where it is float64, of the block; None for their own.
        autocast: the device type of an autocast to bfloat16, or None.
    """

    words: str = ""
    dtype: torch.dtype | None = None
    autocast: str | None = None

    def copy_of(self, block: nn.Module) -> nn.Module:
        copied = copy.deepcopy(block)
        copied = copied.double() if self.dtype == torch.float64 else copied
        copied.train()
        for module in copied.modules():
            if isinstance(module, nn.SyncBatchNorm):  # it would wait for other ranks, and needs a GPU
                module.__class__ = _Local  # type: ignore[assignment]
        return copied

    def inputs(self, call: Call) -> Call:
        return call.map_tensors(lambda t: t.to(self.dtype) if self.dtype and t.is_floating_point() else t)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self.autocast is None else torch.autocast(self.autocast, torch.bfloat16)


class _Local(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


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


def _step(
    block: nn.Module, call: Call, run: Callable[[Call], Any], setting: _Setting, seed: int = 0, backward: bool = True
) -> _Step:
    for parameter in block.parameters():
        parameter.grad = None
    given = setting.inputs(call).map_tensors(
        lambda t: cloned(t).requires_grad_() if t.is_floating_point() else cloned(t)
    )
    leaves = {f"the gradient of input {i}": t for i, t in enumerate(given.flat()[0]) if _learns(t)}
    passed = given.map_tensors(lambda t: t.clone() if t.requires_grad else t)  # not leaves: works in place
    set_seed(seed)
    with torch.enable_grad():
        with setting.context():
            output = run(passed)
        learning = [t for t in tensors_of(output) if t.is_floating_point() and t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        weights = [(torch.rand(t.shape, generator=generator) + 0.5).to(t) for t in learning]
        if learning and backward:
            torch.autograd.backward(learning, weights)
    leaves |= {f"the gradient of {name}": p for name, p in block.named_parameters() if p.requires_grad}
    gradients = {name: t.grad for name, t in leaves.items()}
    return _Step(output, gradients, (passed.args, passed.kwargs), _state_of(block), generator_states())


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


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
            state[f"the attribute {prefix + attribute!r}"] = (
                len(value) if hooks and hasattr(value, "__len__") else value
            )
    return state


class _Decided(StochasticDepth):
    """Always decides the same."""

    def __init__(self, decision: Decision):
        self._decision = decision

    def decide(self, module: PathModule, x: Tensor) -> Decision:
        return self._decision


def _decide(block: nn.Module, decision: Decision) -> None:
    for _, path in block.__dict__[CONVERTED]:
        path.binding = PathBinding(_Decided(decision))


def _ours(ours: nn.Module, when: str, run: Callable[[], _Step]) -> _Step:
    """The converted block's step. Raises `Refused` where it doesn't run, or runs as before its conversion."""
    try:
        step = run()
    except Exception as error:
        raise Refused(f"{when} it raises {describe(error)}") from error
    for reason in ours.__dict__.get("_rdp_warned", ()):
        raise Refused(f"{when} it runs as before its conversion: {reason}")
    return step


# All rows kept


class _Whole:
    """The original with its drop-paths in eval mode, and the converted block that keeps all rows."""

    def __init__(self, block: nn.Module, recipe: Recipe, call: Call):
        self._original, self._converted = (_Setting().copy_of(block) for _ in range(2))
        self._call = call
        install(self._converted, recipe, 0.5)
        _decide(self._converted, Decision())
        for copied in (self._original, self._converted):
            for name, module in copied.named_modules():
                if is_drop_path(name.rpartition(".")[2], module):
                    module.eval()

    def check(self, settings: Sequence[_Setting]) -> None:
        """Steps one after the other, so that what one leaves behind is there in the next. Where the original fails
        under autocast, nobody will run it so."""
        for setting in settings:
            for seed in SEEDS:
                draws = self._check(setting, seed)
                if not draws and setting.autocast is not None:
                    break

    def _check(self, setting: _Setting, seed: int) -> bool:
        """Whether random numbers were drawn."""
        when = f"in training mode{setting.words} with all rows kept (seed {seed})"
        original, ours = self._original, self._converted
        set_seed(seed)
        before = generator_states()
        try:
            expected = _step(original, self._call, called(original), setting, seed)
        except Exception as error:
            if setting.autocast is not None:
                return False
            raise Refused(f"in training mode its own forward raises {describe(error)}") from error
        actual = _ours(ours, when, lambda: _step(ours, self._call, called(ours), setting, seed))
        differences = Differences()
        found = (
            differences.between("what it returns", expected.output, actual.output)
            or differences.between("its arguments afterwards", expected.inputs, actual.inputs)
            or _of_states(differences, expected.state, actual.state)
        )
        gradients = [g for g in expected.gradients.values() if g is not None and g.numel()]
        largest = max((float(g.abs().max()) for g in gradients), default=0.0)
        for name, gradient in expected.gradients.items():
            found = found or _of_gradients(name, gradient, actual.gradients.get(name), setting, largest)
        found = found or _of_generators(expected.generators, actual.generators)
        if found:
            raise Refused(f"{when} {found}")
        return _of_generators(before, expected.generators) is not None


def _of_gradients(
    name: str, expected: Tensor | None, actual: Tensor | None, setting: _Setting, largest: float
) -> str | None:
    """Autograd may sum in another order. Where it rounds to bfloat16 and sums cancel out, as before a BatchNorm, what
    remains is noise of the size of the terms: there `largest` counts, the largest element of all gradients."""
    if setting.autocast is None:
        return Differences(rounded(torch.float32)).between(name, expected, actual)
    return Differences(rounded(torch.bfloat16, largest)).between(name, expected, actual)


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

    def __init__(self, block: nn.Module, carved: Carved, recipe: Recipe, call: Call):
        self._block, self._carved, self._recipe, self._call = block, carved, recipe, call
        double, self._tolerance = precision_of(block, recipe, call)
        self._exact = _Setting(dtype=torch.float64 if double else None)

    def check(self, settings: Sequence[_Setting]) -> None:
        """`settings`: under autocast."""
        some, few, none = (1, 0, 1, 1, 0), (0, 0, 1, 0, 0), (0,)
        dtypes = {t.dtype for t in [*self._block.parameters(), *self._call.flat()[0]] if _is_float(t)}
        if len(dtypes) > 1:  # which float64 would hide
            settings = [_Setting(), *settings]
        for pattern, what in (some, "some rows dropped"), (none, "all rows dropped"):
            exact = self._compare(pattern, what, self._exact)
            for number, setting in enumerate(settings):
                self._compare(pattern, what, setting, exact, backward=number == 0 and pattern is some)
        self._compare(few, "all rows but few dropped", self._exact, backward=False)
        self._check_frozen()

    def _compare(
        self,
        pattern: tuple[int, ...],
        what: str,
        setting: _Setting,
        exact: _Step | None = None,
        backward: bool = True,
    ) -> _Step | None:
        """`exact`: what the original gave with more digits. Returns what it gives here."""
        when = f"in training mode{setting.words} with {what}"
        expected = self._original(pattern, setting, when, backward)
        if expected is None:
            return None
        ours = self._converted(setting)
        actual = self._run(ours, when, _planning(ours, self._carved, pattern), setting, backward)
        differences = Differences(lambda a, b: None, requires_grad=False)  # the zeros of a dropped branch don't
        found = differences.between("what it returns", expected.output, actual.output)
        found = found or self._of_numbers(expected, actual, exact, setting, with_buffers=pattern != (0,))
        if found:
            raise Refused(f"{when} {found}{_WHY if exact is None and pattern != (0,) else ''}")
        return expected

    def _converted(self, setting: _Setting) -> nn.Module:
        ours = setting.copy_of(self._block)
        install(ours, self._recipe, 0.5)
        return ours

    def _original(
        self, pattern: tuple[int, ...] | None, setting: _Setting, when: str, backward: bool = True
    ) -> _Step | None:
        """The original's step; without a pattern nothing is masked. None where it fails under autocast."""
        original = setting.copy_of(self._block)
        if pattern is None:
            _silence(original)
        run = called(original) if pattern is None else _masking(original, self._carved, self._recipe, pattern)
        try:
            with _without_dropout(), SameForAllRows():
                return _step(original, self._call, run, setting, backward=backward)
        except Exception as error:
            if setting.autocast is not None:
                return None
            raise Refused(f"{when} its own forward raises {describe(error)}") from error

    def _run(self, ours: nn.Module, when: str, run: Any, setting: _Setting, backward: bool = True) -> _Step:
        with _without_dropout(), SameForAllRows():
            return _ours(ours, when, lambda: _step(ours, self._call, run, setting, backward=backward))

    def _of_numbers(
        self, expected: _Step, actual: _Step, exact: _Step | None, setting: _Setting, with_buffers: bool
    ) -> str | None:
        """Where the original is known with more digits, outputs may differ from it by twice what the original's do
        here, which has rounded as often; gradients are then left to those who compute with these digits."""
        wanted, got = expected.numbers(with_buffers), actual.numbers(with_buffers)
        best = wanted if exact is None else exact.numbers(with_buffers)
        for name, value in wanted.items():
            ours = got.get(name, value.new_zeros(value.shape))  # no gradient where a branch wasn't run
            if not value.is_floating_point():
                if exact is None and not torch.equal(value, ours):
                    return f"{name} differs from the original's"
                continue
            error = relative_difference(best[name], ours)
            budget = self._tolerance
            if exact is not None:
                if not name.startswith("output"):
                    continue
                dtype = torch.bfloat16 if setting.autocast is not None else value.dtype
                budget = 2 * relative_difference(best[name], value) + ROUNDINGS * torch.finfo(dtype).eps
            if not error <= budget:
                return f"{name} differs from the original's by {error:.1e} of its largest element"
        return None

    def _check_frozen(self) -> None:
        """A frozen branch computes what it computes, and leaves what it has as it is; so does one that is dropped."""
        when = "in training mode with its branches frozen"
        expected = self._original(None, self._exact, when)
        assert expected is not None
        frozen, dropped = self._converted(self._exact), self._converted(self._exact)
        before = _tensors_held(frozen)
        actual = self._decided(frozen, Decision(FROZEN), when)
        after = _tensors_held(frozen)
        self._decided(dropped, Decision(SKIP), when)
        moved = _changed(before, after) - _changed(before, _tensors_held(dropped))
        if moved:  # an attribute that a call sets is no state of the branch, one that goes on moving is
            self._decided(frozen, Decision(FROZEN), when)
            again = _changed(after, _tensors_held(frozen))
            for name in sorted(moved):
                if name in again or not name.startswith("the attribute"):
                    raise Refused(
                        f"its branch changes {name} in training, and a frozen branch has to leave it as it is"
                    )
        own = {id(p) for _, path in frozen.__dict__[CONVERTED] for p in parameters_of(path)}
        for name, parameter in frozen.named_parameters():
            gradient = f"the gradient of {name}"
            if id(parameter) in own and expected.gradients.pop(gradient, None) is not None:
                self._refuse_gradient(actual.gradients[gradient], f"{when} {name}")
        found = self._of_numbers(expected, actual, None, self._exact, with_buffers=False)
        if found:
            raise Refused(f"{when} {found}")

    @staticmethod
    def _refuse_gradient(gradient: Tensor | None, what: str) -> None:
        if gradient is not None:
            raise Refused(f"{what} gets a gradient")

    def _decided(self, ours: nn.Module, decision: Decision, when: str) -> _Step:
        run = _planning(ours, self._carved, ())
        _decide(ours, decision)
        return self._run(ours, when, run, self._exact)


def _tensors_held(block: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of the tensors in parameters, buffers and other attributes."""
    return {name: [cloned(t) for t in tensors_of(value)] for name, value in _state_of(block).items()}


def _changed(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
    return {name for name, value in after.items() if Differences().between("", before.get(name, []), value)}


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


_WHY = (
    "; with all rows kept it doesn't, so that in training its branch computes for a sample what depends on the others: "
    "statistics of the batch, or a capacity"
)
