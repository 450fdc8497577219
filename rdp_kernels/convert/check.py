"""The self-check of a conversion: on copies, in float64 where the block can be cast, the converted block against the
one it was, whose drop-paths are given fixed masks."""

from __future__ import annotations

import copy
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.spec import row_set
from ..paths.binding import PathBinding, PathModule, StochasticDepth
from ..paths.decision import ROWS, SKIP, Decision
from ..paths.freezing import tensors_of
from ..paths.path import CONVERTED
from .calls import Call, Refused, cloned
from .carve import Carved
from .libraries import is_drop_path
from .observed import Law, known_law_of
from .report import describe
from .sites import mark
from .snapshot import preserved_generators
from .source import install
from .spec import Recipe
from .trace import run_node

SCALE = 1.25
PATTERNS = {"some rows dropped": (1, 0, 1, 1, 0), "all rows dropped": (0,), "no row dropped": (1,)}
_DROPOUTS = {
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, nn.functional.dropout, nn.functional.dropout1d,
    nn.functional.dropout2d, nn.functional.dropout3d, nn.functional.alpha_dropout, nn.functional.feature_alpha_dropout,
}  # fmt: skip


def check(block: nn.Module, carved: Carved, recipe: Recipe, calls: Sequence[Call]) -> None:
    """Raises `Refused` with the first difference that is seen."""
    with preserved_generators():
        _check(_spread(block), carved, recipe, calls)


def _check(block: nn.Module, carved: Carved, recipe: Recipe, calls: Sequence[Call]) -> None:
    _check_inputs_are_left_alone(block, calls[0])
    double, tolerance = precision_of(block, recipe, calls[0])
    for number, (what, pattern) in itertools.product(range(len(calls)), PATTERNS.items()):
        if number and what != "some rows dropped":
            continue
        call = calls[number].map_tensors(lambda t: t.double() if double and t.is_floating_point() else t)
        original, ours = _copy(block, double), _copy(block, double)
        install(ours, recipe, 0.5)
        expected = _run(original, call, _masking(original, carved, recipe, pattern))
        try:
            actual = _run(ours, call, _planning(ours, carved, pattern))
        except Exception as error:
            raise Refused(f"with {what} it raises {describe(error)}") from error
        for reason in ours.__dict__.get("_rdp_warned", ()):
            raise Refused(f"with {what} it runs as before its conversion: {reason}")
        _compare(expected, actual, tolerance, f"with {what}")


def _spread(block: nn.Module) -> nn.Module:
    """A copy with noise on constant parameters: behind a γ or a last norm of zeros a wrong branch would go unseen."""
    copied, generator = copy.deepcopy(block), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in copied.parameters():
            if (
                parameter.is_floating_point()
                and parameter.numel()
                and bool((parameter == parameter.flatten()[0]).all())
            ):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return copied


def _copy(block: nn.Module, double: bool) -> nn.Module:
    """As in training, but for what is random or depends on the other rows: children are in eval mode."""
    copied = copy.deepcopy(block).eval()
    copied = copied.double() if double else copied
    copied.training = True
    for parameter in copied.parameters():
        parameter.grad = None
    return copied


def device_type_of(block: nn.Module, call: Call) -> str:
    """Of the block's first parameter or, where it has none, of the first tensor that it is called with."""
    return next((t.device.type for t in [*block.parameters(), *call.flat()[0]] if isinstance(t, Tensor)), "cpu")


def depends_on_dtype(recipe: Recipe) -> bool:
    """Whether a converted block of this recipe runs as before where its inputs have another dtype."""
    return any(isinstance(wanted, tuple) and wanted[1] is not None for wanted in recipe.inputs or ())


def precision_of(block: nn.Module, recipe: Recipe, call: Call) -> tuple[bool, float]:
    """Whether blocks are compared in float64, and the tolerance, relative to the largest number that is compared."""
    return (False, 2e-4) if depends_on_dtype(recipe) else _castable(block, call)


def _castable(block: nn.Module, call: Call) -> tuple[bool, float]:
    """Whether the block runs in float64, and the tolerance."""
    wide = call.map_tensors(lambda t: t.double() if t.is_floating_point() else t)
    try:
        copied = copy.deepcopy(block).eval().double()
        with torch.no_grad(), _without_dropout(), _Narrow() as narrow:
            copied(*wide.args, **wide.kwargs)
    except Exception:
        return False, 2e-4
    return True, 2e-5 if narrow.seen else 1e-9  # something computes in float32 by itself


def _check_inputs_are_left_alone(block: nn.Module, call: Call) -> None:
    given = call.map_tensors(cloned)
    copied = _copy(block, False)
    _silence(copied)
    with torch.no_grad(), _without_dropout():
        copied(*given.args, **given.kwargs)
    for before, after in zip(call.flat()[0], given.flat()[0], strict=True):
        if isinstance(before, Tensor) and not torch.equal(before, after) and not before.isnan().any():
            raise Refused("its forward changes its own input in place")


def _silence(block: nn.Module) -> None:
    for name, module in block.named_modules():
        if is_drop_path(name.rpartition(".")[2], module) and isinstance(known_law_of(module), Law):
            module.forward = lambda x, *args, **kwargs: x  # type: ignore[method-assign]


# The same masks, for both


def _mask(pattern: tuple[int, ...], path: int, x: Tensor) -> Tensor:
    """Rows that are kept, another selection for each path."""
    turned = pattern[path % len(pattern) :] + pattern[: path % len(pattern)]
    return torch.tensor([turned[row % len(turned)] for row in range(len(x))], dtype=torch.bool, device=x.device)


def _masked(x: Tensor, pattern: tuple[int, ...], path: int | None) -> Tensor:
    if path is None:
        return x
    keep = _mask(pattern, path, x)
    factor = torch.where(keep, SCALE, 0.0).to(x.dtype)
    return x * factor.reshape(-1, *[1] * (x.dim() - 1))


Runner = Callable[[Call], Any]


def called(block: nn.Module) -> Runner:
    """Calls its forward with hooks. What the block's class has around that in a `__call__` of its own is left out:
    transformers' layers checkpoint there, and a recomputation would ask for masks again."""
    return lambda call: nn.Module.__call__(block, *call.args, **call.kwargs)


def _masking(block: nn.Module, carved: Carved, recipe: Recipe, pattern: tuple[int, ...]) -> Runner:
    """Runs the original forward with masks for its drop-paths; where there are none, its graph with them."""
    if any(name is None for name, _ in carved.called):
        return lambda call: _run_marked(block, carved, recipe, pattern, call)
    orders: dict[str, list[int | None]] = {}
    for name, path in carved.called:
        orders.setdefault(str(name), []).append(path)
    _silence(block)
    for name, order in orders.items():
        if all(path is None for path in order):  # as it is in eval mode
            continue
        given = iter(order)
        module = block.get_submodule(name)
        module.forward = lambda x, *_, given=given, **__: _masked(x, pattern, next(given))  # type: ignore[method-assign]
    return called(block)


def _run_marked(block: nn.Module, carved: Carved, recipe: Recipe, pattern: tuple[int, ...], call: Call) -> Any:
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


def _planning(block: nn.Module, carved: Carved, pattern: tuple[int, ...]) -> Runner:
    """Runs the converted forward under decisions that say the same."""
    _silence(block)
    for index, path in enumerate(path for _, path in block.__dict__[CONVERTED]):
        path.binding = PathBinding(_Fixed(pattern, index))
        if path.drop_path is not None:
            path.drop_path.training = True
    return called(block)


class _Fixed(StochasticDepth):
    """Decides by a pattern of rows."""

    def __init__(self, pattern: tuple[int, ...], path: int):
        self._pattern, self._path = pattern, path

    def decide(self, module: PathModule, x: Tensor) -> Decision:
        keep = _mask(self._pattern, self._path, x).cpu()
        count = int(keep.sum())
        if count in (0, len(keep)):
            return Decision(scale=SCALE) if count else Decision(SKIP)
        return Decision(ROWS, row_set(keep, x.device), SCALE)


# Outputs and gradients


def _run(block: nn.Module, call: Call, runner: Runner) -> dict[str, Tensor]:
    given = call.map_tensors(lambda t: cloned(t).requires_grad_() if t.is_floating_point() else cloned(t))
    inputs = {f"input {i}": t for i, t in enumerate(given.flat()[0]) if isinstance(t, Tensor) and t.requires_grad}
    set_seed(0)
    with _without_dropout(), SameForAllRows(), torch.enable_grad():
        out = runner(given.map_tensors(lambda t: t.clone() if t.requires_grad else t))  # not leaves: works in place
        outputs = [t for t in tensors_of(out) if t.is_floating_point()]
        learning = [t for t in outputs if t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.rand(t.shape, generator=generator, dtype=t.dtype).to(t.device) + 0.5 for t in learning]
        if learning:
            torch.autograd.backward(learning, weights)
    found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    found |= {f"the gradient of {name}": _gradient(t) for name, t in inputs.items()}
    return found | {f"the gradient of {name}": _gradient(p) for name, p in block.named_parameters() if p.requires_grad}


def _gradient(x: Tensor) -> Tensor:
    return torch.zeros_like(x) if x.grad is None else x.grad


def _compare(expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float, when: str) -> None:
    if expected.keys() != actual.keys():
        raise Refused(f"{when} it returns {list(actual)} instead of {list(expected)}")
    for name, value in expected.items():
        ours = actual[name]
        if value.shape != ours.shape or value.dtype != ours.dtype:
            raise Refused(
                f"{when} {name} is {list(ours.shape)} {ours.dtype} instead of {list(value.shape)} {value.dtype}"
            )
        if value.numel() == 0:
            continue
        largest = max(1.0, float(value.abs().max()))
        difference = float((value - ours).abs().max()) / largest
        if not difference <= tolerance:
            raise Refused(f"{when} {name} differs from the original's by {difference:.1e} of its largest element")


class _Narrow(TorchDispatchMode):
    """Sees whether anything is computed in less than float64."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(out):
            narrow = isinstance(value, Tensor) and value.is_floating_point() and value.dtype != torch.float64
            self.seen = self.seen or narrow
        return out


class _without_dropout(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is nn.functional.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            kwargs |= {"dropout_p": 0.0} if len(args) <= 4 else {}
        return func(*args, **kwargs)


class SameForAllRows(TorchDispatchMode):
    """Random functions give every row the same numbers, however many rows there are and whatever was drawn before."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        _seed_torch(0)
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if not isinstance(out, Tensor) or out.dim() == 0:
            return out
        many = out.new_empty((_MANY, *out.shape[1:]))
        _seed_torch(0)
        if name in _FILL or (name == "bernoulli_" and not isinstance(args[1], Tensor)):
            func(many, *args[1:], **kwargs)
        elif name in ("rand_like", "randn_like", "randint_like"):
            many = func(many, *args[1:], **kwargs)
        elif name in ("rand", "randn", "randint"):
            many = func(*([_MANY, *a[1:]] if isinstance(a, list) else a for a in args), **kwargs)
        elif name == "bernoulli":
            return out.copy_(many.uniform_()[0] < args[0])
        else:
            return out
        return out.copy_(many[0].expand_as(out))


_FILL = {"uniform_", "normal_", "exponential_", "random_", "geometric_", "cauchy_", "log_normal_"}
_MANY = 33  # of few numbers, the last sixteen are made in another way


def set_seed(seed: int) -> None:
    """Of the global generators. `torch.manual_seed` would also leave a seed for a CUDA that isn't initialised yet."""
    _seed_torch(seed)
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _seed_torch(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
