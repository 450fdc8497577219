"""The second self-check of a conversion: copies in training mode, children too, as users run them.

With all rows kept, both blocks run the same operations. Their outputs, the contents of their modules afterwards and the
states of the generators are compared to the bit; gradients may be summed in another order. With some rows or none, and
with frozen branches, dropout is switched off and the original's drop-paths are given masks. Numbers may then differ by
the original's own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..paths.decision import FROZEN, SKIP, Decision
from ..paths.freezing import tensors_of
from ..paths.path import CONVERTED, parameters_of
from .calls import BlockCall, Refused, cloned, quiet
from .carve import Carved
from .check import (
    but_for_numbers,
    deciding,
    depends_on_dtype,
    device_type_of,
    difference_of,
    masking,
    planning,
    precision_of,
    silence,
    spread,
)
from .differences import Differences, rounded
from .libraries import is_drop_path
from .report import describe
from .snapshot import generator_states, moved_generators, preserved_generators, set_seed
from .source import install
from .spec import Recipe
from .step import BlockRunner, Setting, Step, called, state_of, step_of, step_of_converted

SEEDS = (0, 1)
"""The seeds of the steps. There are two, as a single mask of dropout may hide a difference."""


def check_training(block: nn.Module, carved: Carved, recipe: Recipe, call: BlockCall) -> None:
    """Raises `Refused` with the first difference between the converted block and the original."""
    with preserved_generators(), quiet():
        block = spread(block)
        device = device_type_of(block, call)
        settings = [Setting(" under autocast to bfloat16", autocast=device)]
        if not depends_on_dtype(recipe):
            settings.append(Setting(" under autocast to bfloat16, called with bfloat16", torch.bfloat16, device))
        _Whole(block, recipe, call).check([Setting(), *settings])
        _Masked(block, carved, recipe, call).check([replace(setting, random=False) for setting in settings])


def _step_of_original(
    block: nn.Module, call: BlockCall, run: BlockRunner, setting: Setting, when: str, **options: Any
) -> Step | None:
    """A step of the original; None if it fails under autocast, and so can't be used there."""
    try:
        return step_of(block, call, run, setting, **options)
    except Exception as error:
        if setting.autocast is not None:
            return None
        raise Refused(f"{when} its own forward raises {describe(error)}") from error


# All rows kept


class _Whole:
    """Compares the original, its drop-paths in eval mode, with the converted block that keeps all rows."""

    def __init__(self, block: nn.Module, recipe: Recipe, call: BlockCall):
        self._original, self._converted = (Setting().copy_of(block) for _ in range(2))
        self._call = call
        install(self._converted, recipe, 0.5)
        deciding(self._converted, lambda path, x: Decision())
        for copied in (self._original, self._converted):
            for name, module in copied.named_modules():
                if is_drop_path(name.rpartition(".")[2], module):
                    module.eval()

    def check(self, settings: Sequence[Setting]) -> None:
        """Runs the steps on the same two copies, so that each step starts from the state that the step before left.
        Settings with autocast are skipped if the original fails under it."""
        for setting in settings:
            for seed in SEEDS:
                draws = self._check(setting, seed)
                if not draws and setting.autocast is not None:
                    break

    def _check(self, setting: Setting, seed: int) -> bool:
        """Compares one step. Returns whether random numbers were drawn."""
        when = f"in training mode{setting.words} with all rows kept (seed {seed})"
        original, ours = self._original, self._converted
        set_seed(seed)
        before = generator_states()
        expected = _step_of_original(original, self._call, called(original), setting, "in training mode", seed=seed)
        if expected is None:
            return False
        actual = step_of_converted(ours, self._call, called(ours), setting, when, seed=seed)
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
        for name in moved_generators(expected.generators, actual.generators):
            found = found or f"the generator of {name} has another state afterwards: it draws other random numbers"
        if found:
            raise Refused(f"{when} {found}")
        return bool(moved_generators(before, expected.generators))


def _of_gradients(
    name: str, expected: Tensor | None, actual: Tensor | None, setting: Setting, largest: float
) -> str | None:
    """How a gradient differs, in words; None if another order of sums explains the difference. `largest` is the
    largest element of all gradients. Under autocast the tolerance is relative to it: sums of bfloat16 terms may cancel
    out, before a BatchNorm for example, and rounding errors of the terms' size remain."""
    close = rounded(torch.float32) if setting.autocast is None else rounded(torch.bfloat16, largest)
    return Differences(close).between(name, expected, actual)


def _of_states(differences: Differences, expected: dict[str, Any], actual: dict[str, Any]) -> str | None:
    for name in expected.keys() ^ actual.keys():
        return f"{name} is {'not ' if name in expected else ''}set afterwards"
    for name, value in expected.items():
        found = differences.between(name, value, actual[name])
        if found:
            return f"{found}, afterwards"
    return None


# Some rows, none, and frozen branches


class _Masked:
    """Compares the original, its drop-paths masking rows, with the converted block under decisions that drop the same
    rows. Dropout is off, and other random functions give all rows the same numbers."""

    def __init__(self, block: nn.Module, carved: Carved, recipe: Recipe, call: BlockCall):
        self._block, self._carved, self._recipe, self._call = block, carved, recipe, call
        double, self._tolerance = precision_of(block, recipe, call)
        self._exact = Setting(dtype=torch.float64 if double else None, random=False)

    def check(self, settings: Sequence[Setting]) -> None:
        """Compares all patterns in each of `settings`, which use autocast, and then the frozen branches."""
        some, few, none = (1, 0, 1, 1, 0), (0, 0, 1, 0, 0), (0,)
        tensors = [*self._block.parameters(), *tensors_of(self._call.flat()[0])]
        if len({t.dtype for t in tensors if t.is_floating_point()}) > 1:  # float64 would hide promotions between them
            settings = [Setting(random=False), *settings]
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
        setting: Setting,
        exact: Step | None = None,
        backward: bool = True,
    ) -> Step | None:
        """Compares one pattern of kept rows. `exact` is the original's step with more digits, if it is known. Returns
        the original's step; None if the original fails under autocast."""
        when = f"in training mode{setting.words} with {what}"
        expected = self._original(pattern, setting, when, backward)
        if expected is None:
            return None
        ours = self._converted(setting)
        actual = step_of_converted(ours, self._call, planning(ours, pattern), setting, when, backward=backward)
        found = but_for_numbers().between("what it returns", expected.output, actual.output)
        found = found or difference_of(expected, actual, setting, self._tolerance, exact, buffers=pattern != (0,))
        if found:
            raise Refused(f"{when} {found}{_WHY if exact is None and pattern != (0,) else ''}")
        return expected

    def _converted(self, setting: Setting) -> nn.Module:
        ours = setting.copy_of(self._block)
        install(ours, self._recipe, 0.5)
        return ours

    def _original(
        self, pattern: tuple[int, ...] | None, setting: Setting, when: str, backward: bool = True
    ) -> Step | None:
        """The original's step, unmasked if `pattern` is None. Returns None if it fails under autocast."""
        original = setting.copy_of(self._block)
        if pattern is None:
            silence(original)
        run = called(original) if pattern is None else masking(original, self._carved, self._recipe, pattern)
        return _step_of_original(original, self._call, run, setting, when, backward=backward)

    def _check_frozen(self) -> None:
        """Raises `Refused` if a frozen branch computes something else than a branch that learns, if it changes its own
        state, or if its parameters get gradients."""
        when = "in training mode with its branches frozen"
        expected = self._original(None, self._exact, when)
        assert expected is not None
        frozen, dropped = self._converted(self._exact), self._converted(self._exact)
        before = _tensors_held(frozen)
        actual = self._decided(frozen, Decision(FROZEN), when)
        after = _tensors_held(frozen)
        self._decided(dropped, Decision(SKIP), when)
        moved = _changed(before, after) - _changed(before, _tensors_held(dropped))
        if moved:  # an attribute is state of the branch only if a second call changes it again
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
            learns = id(parameter) in own and expected.gradients.pop(gradient, None) is not None
            if learns and actual.gradients[gradient] is not None:
                raise Refused(f"{when} {name} gets a gradient")
        found = difference_of(expected, actual, self._exact, self._tolerance)
        if found:
            raise Refused(f"{when} {found}")

    def _decided(self, ours: nn.Module, decision: Decision, when: str) -> Step:
        run = deciding(ours, lambda path, x: decision)
        return step_of_converted(ours, self._call, run, self._exact, when)


def _tensors_held(block: nn.Module) -> dict[str, list[Tensor]]:
    """Copies of the tensors in parameters, buffers and other attributes, by the names that reasons use."""
    return {name: [cloned(t) for t in tensors_of(value)] for name, value in state_of(block).items()}


def _changed(before: dict[str, list[Tensor]], after: dict[str, list[Tensor]]) -> set[str]:
    return {name for name, value in after.items() if Differences().between("", before.get(name, []), value)}


_WHY = (
    "; it doesn't with all rows kept, so in training the branch computes from the other samples too: statistics of the "
    "batch, or a capacity"
)
