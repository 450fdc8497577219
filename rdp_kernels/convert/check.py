"""The first self-check of a conversion: a converted block against the original, children in eval mode.

Both are copies, in float64 where the block can be cast. The original's drop-paths are given fixed masks, and the
converted block decisions that say the same.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.spec import row_set
from ..paths.binding import PathBinding, PathModule, StochasticDepth
from ..paths.decision import ROWS, SKIP, Decision
from ..paths.freezing import tensors_of
from ..paths.path import CONVERTED
from .calls import BlockCall, Refused, cloned
from .carve import Carved
from .differences import ROUNDINGS, Differences, relative_difference
from .libraries import is_drop_path
from .observed import Law, known_law_of
from .sites import mark
from .snapshot import preserved_generators
from .source import install
from .spec import Recipe
from .step import BlockRunner, Setting, Step, WithoutDropout, called, step_of, step_of_converted
from .trace import run_node

SCALE = 1.25
"""The factor of kept rows."""
PATTERNS = {"some rows dropped": (1, 0, 1, 1, 0), "all rows dropped": (0,), "no row dropped": (1,)}
"""Which rows the first path keeps; longer batches repeat the pattern."""
_IN_FLOAT32, _IN_FLOAT64, _FLOAT32_INSIDE = 2e-4, 1e-9, 2e-5
"""Tolerances relative to the largest element, or to 1 if that is more. A wrong branch or mask is off by far more."""


def check(block: nn.Module, carved: Carved, recipe: Recipe, calls: Sequence[BlockCall]) -> None:
    """Raises `Refused` with the first difference between the converted block and the original."""
    with preserved_generators():
        block = spread(block)
        _check_inputs_are_left_alone(block, calls[0])
        double, tolerance = precision_of(block, recipe, calls[0])
        setting = Setting(dtype=torch.float64 if double else None, children_train=False, random=False)
        for call, (what, pattern) in itertools.product(calls, PATTERNS.items()):
            if call is not calls[0] and what != "some rows dropped":
                continue
            original, ours = setting.copy_of(block), setting.copy_of(block)
            install(ours, recipe, 0.5)
            expected = step_of(original, call, masking(original, carved, recipe, pattern), setting)
            actual = step_of_converted(ours, call, planning(ours, pattern), setting, f"with {what}")
            found = difference_of(expected, actual, setting, tolerance)
            if found or not all(bool(t.isfinite().all()) for t in expected.numbers().values()):
                raise Refused(f"with {what} {found or 'its numbers are infinite or nan, and so can not be compared'}")


def spread(block: nn.Module) -> nn.Module:
    """A copy with noise on constant parameters, as a γ or a last norm of zeros would hide a wrong branch."""
    copied, generator = copy.deepcopy(block), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in copied.parameters():
            numbers = parameter.flatten()
            if parameter.is_floating_point() and len(numbers) and bool((numbers == numbers[0]).all()):
                parameter.add_(0.2 * torch.randn(parameter.shape, device="cpu", generator=generator).to(parameter))
    return copied


def device_type_of(block: nn.Module, call: BlockCall) -> str:
    """The device type of the block's first parameter or, without one, of the first tensor that it is called with."""
    return next((t.device.type for t in [*block.parameters(), *call.flat()[0]] if isinstance(t, Tensor)), "cpu")


def depends_on_dtype(recipe: Recipe) -> bool:
    """Whether a converted block of this recipe runs as before its conversion where its inputs have another dtype."""
    return any(isinstance(wanted, tuple) and wanted[1] is not None for wanted in recipe.inputs or ())


def precision_of(block: nn.Module, recipe: Recipe, call: BlockCall) -> tuple[bool, float]:
    """Whether blocks are compared in float64, and the tolerance relative to the largest number that is compared."""
    return (False, _IN_FLOAT32) if depends_on_dtype(recipe) else _castable(block, call)


def _castable(block: nn.Module, call: BlockCall) -> tuple[bool, float]:
    """Whether the block runs in float64, and the tolerance."""
    wide = call.map_tensors(lambda t: t.double() if t.is_floating_point() else t)
    try:
        copied = copy.deepcopy(block).eval().double()
        with torch.no_grad(), WithoutDropout(), _Narrow() as narrow:
            copied(*wide.args, **wide.kwargs)
    except Exception:
        return False, _IN_FLOAT32
    return True, _FLOAT32_INSIDE if narrow.seen else _IN_FLOAT64


def _check_inputs_are_left_alone(block: nn.Module, call: BlockCall) -> None:
    given = call.map_tensors(cloned)
    copied = Setting(children_train=False).copy_of(block)
    silence(copied)
    with torch.no_grad(), WithoutDropout():
        copied(*given.args, **given.kwargs)
    for before, after in zip(call.flat()[0], given.flat()[0], strict=True):
        if isinstance(before, Tensor) and not torch.equal(before, after) and not before.isnan().any():
            raise Refused("its forward changes its own input in place")


def silence(block: nn.Module) -> None:
    """Makes all drop-paths of a block the identity."""
    for name, module in block.named_modules():
        if is_drop_path(name.rpartition(".")[2], module) and isinstance(known_law_of(module), Law):
            module.forward = lambda x, *args, **kwargs: x  # type: ignore[method-assign]


# The same masks for the original and the converted block


def _mask(pattern: tuple[int, ...], path: int, x: Tensor) -> Tensor:
    """The rows that a path keeps, bool. Each path rotates the pattern by its own number."""
    turned = pattern[path % len(pattern) :] + pattern[: path % len(pattern)]
    return torch.tensor([turned[row % len(turned)] for row in range(len(x))], dtype=torch.bool, device=x.device)


def _masked(x: Tensor, pattern: tuple[int, ...], path: int | None) -> Tensor:
    if path is None:
        return x
    keep = _mask(pattern, path, x)
    factor = torch.where(keep, SCALE, 0.0).to(x.dtype)
    return x * factor.reshape(-1, *[1] * (x.dim() - 1))


def masking(block: nn.Module, carved: Carved, recipe: Recipe, pattern: tuple[int, ...]) -> BlockRunner:
    """Runs the original's forward with masks in its drop-paths or, without any, its graph with masks at the marks."""
    if any(name is None for name, _ in carved.called):
        return lambda call: _run_marked(block, carved, recipe, pattern, call)
    orders: dict[str, list[int | None]] = {}
    for name, path in carved.called:
        orders.setdefault(str(name), []).append(path)
    silence(block)
    for name, order in orders.items():
        if all(path is None for path in order):  # it was refused, and stays the identity as in eval mode
            continue
        given = iter(order)
        module = block.get_submodule(name)
        module.forward = lambda x, *_, given=given, **__: _masked(x, pattern, next(given))  # type: ignore[method-assign]
    return called(block)


def _run_marked(block: nn.Module, carved: Carved, recipe: Recipe, pattern: tuple[int, ...], call: BlockCall) -> Any:
    values: dict[Any, Any] = {}
    inputs = iter(recipe.signature.inputs_of(call.args, call.kwargs) or ())
    paths = iter(path for _, path in carved.called)
    for node in carved.reference.nodes:
        if node.op == "placeholder":
            values[node] = next(inputs)
        elif node.target is mark:
            values[node] = _masked(values[node.args[0]], pattern, next(paths))
        else:
            values[node] = run_node(node, block, values)
    return values[node]


def planning(block: nn.Module, pattern: tuple[int, ...]) -> BlockRunner:
    """Runs the converted forward under decisions that keep and drop the rows of the masks."""

    def decision(path: int, x: Tensor) -> Decision:
        keep = _mask(pattern, path, x).cpu()
        count = int(keep.sum())
        if count in (0, len(keep)):
            return Decision(scale=SCALE) if count else Decision(SKIP)
        return Decision(ROWS, row_set(keep, x.device), SCALE)

    return deciding(block, decision)


def deciding(block: nn.Module, decision: Callable[[int, Tensor], Decision]) -> BlockRunner:
    """Runs the converted forward under the decision for each path's index and input."""
    silence(block)
    for index, (_, path) in enumerate(block.__dict__[CONVERTED]):
        path.binding = PathBinding(_Deciding(functools.partial(decision, index)))
        if path.drop_path is not None:
            path.drop_path.training = True
    return called(block)


class _Deciding(StochasticDepth):
    """Decides by a function of the input."""

    def __init__(self, decision: Callable[[Tensor], Decision]):
        self._decision = decision

    def decide(self, module: PathModule, x: Tensor) -> Decision:
        return self._decision(x)


# Outputs and gradients


def but_for_numbers() -> Differences:
    return Differences(lambda a, b: None, requires_grad=False)  # zeros require no gradient


def difference_of(
    expected: Step, actual: Step, setting: Setting, tolerance: float, exact: Step | None = None, buffers: bool = False
) -> str | None:
    """The first difference of outputs, gradients and, if asked for, buffers, in words.

    `exact` is the original's step with more digits. If it is given, outputs may differ from it by twice the error of
    the original's outputs, as both blocks round equally often. Gradients are then compared only with more digits.
    """
    found = but_for_numbers().between("what it returns", *([*tensors_of(step.output)] for step in (expected, actual)))
    if found:
        return found
    wanted, got = expected.numbers(buffers), actual.numbers(buffers)
    best = wanted if exact is None else exact.numbers(buffers)
    for name, like in (got | wanted).items():  # a branch that didn't run has no gradient, which counts as zeros
        value, ours = (numbers.get(name, torch.zeros_like(like)) for numbers in (wanted, got))
        if not value.is_floating_point() or value.numel() == 0:
            if exact is None and not torch.equal(value, ours):
                return f"{name} differs from the original's"
            continue
        if exact is not None:
            if not name.startswith("output"):
                continue
            dtype = torch.bfloat16 if setting.autocast is not None else value.dtype
            tolerance = 2 * relative_difference(best[name], value) + ROUNDINGS * torch.finfo(dtype).eps
        error = relative_difference(best.get(name, value), ours)
        if not error <= tolerance:
            return f"{name} differs from the original's by {error:.1e} of its largest element"
    return None


class _Narrow(TorchDispatchMode):
    """Notes whether anything is computed in less than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            self.seen = self.seen or narrow
        return out
