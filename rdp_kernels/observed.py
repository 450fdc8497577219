"""What a drop-path does, found by running it: how often it drops, samples or whole batches, and how it scales.

`law_of` runs a copy of the module on the CPU, in training and in eval mode, and returns a `Law` or the sentence that
says why there is none. The global generators are left as they were.

Some things can't be seen by running: an object that two modules share, a global that a schedule changes. `drop_code.py`
refuses those.
"""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .drop_code import NoLaw, attributes_of, check_code, is_number

_PROBED = (0.05, 0.3, 0.8)
"""Values of P(drop) at which frequency and scale are compared with the law."""
_ROWS, _PATTERNS = 4096, 256
_SIGMAS = 5.0
_CHI_SQUARED = 45.0
"""Bound for 7 degrees of freedom: independent rows exceed it once in 7 million observations."""
_NO_ATTRIBUTE = "how often it drops follows none of its attributes, so that a schedule's changes would go unseen"


@dataclass(frozen=True)
class Law:
    """What a drop-path does in training: rows are 0 with P(drop), else multiplied. In eval mode it is the identity."""

    kind: type[nn.Module]
    forward: Any
    size: int
    """The number of entries in the `__dict__` of the module that was observed."""
    constants: tuple[tuple[str, Any], ...]
    """Attributes that are no numbers: where one changes, the module is observed anew."""
    attribute: str | None
    """The one that says how often it drops; None where it never does."""
    keeps: bool = False
    """The attribute is P(keep)."""
    mode: str = "sample"
    scale_by_keep: bool = True

    def holds_for(self, module: nn.Module) -> bool:
        """Whether `module` still is what was observed. Asked at each draw."""
        kind, found = type(module), module.__dict__
        if kind is not self.kind or len(found) != self.size or kind.forward is not self.forward:
            return False
        for name, value in self.constants:
            now = found[name] if name in found else getattr(module, name, None)
            if now is not value and (type(now) is not type(value) or now != value):
                return False
        return self.attribute is None or is_number(_number(module, self.attribute))

    def drop_prob(self, module: nn.Module) -> float:
        """P(drop), read from the module as it is now."""
        if self.attribute is None:
            return 0.0
        value = float(_number(module, self.attribute))
        return 1 - value if self.keeps else value

    def __deepcopy__(self, memo: object) -> Law:
        return self

    def __reduce__(self) -> tuple:
        # Functions can't always be pickled. Without one the law doesn't hold, and is looked up again.
        fields = (self.kind, None, self.size, self.constants, self.attribute, self.keeps, self.mode, self.scale_by_keep)
        return Law, fields


_laws: dict[tuple, Law | str] = {}
_drops: dict[tuple, bool | None] = {}


def law_of(module: nn.Module, dims: int) -> Law | str:
    """The law of a drop-path that is called with tensors of `dims` dimensions, or why it has none.

    It doesn't depend on the module's numbers, so that modules which differ in these alone are observed once.
    """
    if type(module) is nn.Identity:
        return Law(nn.Identity, nn.Identity.forward, len(module.__dict__), (), None)
    try:
        key = (*key_of(module), dims)
    except NoLaw as reason:
        return str(reason)
    return _cached(_laws, key, lambda: _observe(module, dims))


def known_law_of(module: nn.Module) -> Law | str:
    """As `law_of`, where nobody says how many dimensions there are."""
    try:
        key = () if type(module) is nn.Identity else key_of(module)
    except NoLaw as reason:
        return str(reason)
    found: Law | str = "it can't be called with a tensor of 2 to 5 dimensions"
    for dims in sorted((3, 4, 2, 5), key=lambda dims: (*key, dims) not in _laws):
        found = law_of(module, dims)
        if isinstance(found, Law):
            return found
    return found


def drops_rows(module: nn.Module) -> bool | None:
    """Whether `module` is seen to set whole rows to zero in training, now or with another number in an attribute.

    False where it is a function of its input instead; None where it is neither, or can't be observed.
    """
    try:
        numbers, _ = attributes_of(module)
        check_code(type(module))
    except NoLaw:
        return None
    return _cached(_drops, key_of(module), lambda: _seen_dropping(module, numbers))


def drops_now(module: nn.Module) -> float | None:
    """The fraction of rows that a module without a law is seen to drop, as it stands; None where it can't be seen."""
    try:
        numbers, _ = attributes_of(module)
        check_code(type(module))
    except NoLaw:
        return None
    with _undisturbed(type(module)):
        for dims in (3, 4, 2):
            with contextlib.suppress(Exception):
                probe = _Probe(module, dims, numbers)
                return sum(float((probe.run() == 0).flatten(1).all(1).sum()) for _ in range(256)) / (256 * 4)
    return None


def key_of(module: nn.Module) -> tuple:
    """What modules with the same law have in common. Raises `NoLaw`."""
    numbers, constants = attributes_of(module)
    return type(module), type(module).forward, tuple(numbers), tuple((n, type(v), v) for n, v in constants.items())


def kind_of(module: nn.Module) -> int:
    """The same for drop-paths that do the same but for their numbers."""
    try:
        return hash(type(module) if type(module) is nn.Identity else key_of(module))
    except NoLaw:
        return id(module)


def _cached(found: dict, key: tuple, make: Callable[[], Any]) -> Any:
    if key not in found:
        if len(found) >= 256:
            found.clear()
        found[key] = make()
    return found[key]


def _number(module: nn.Module, name: str) -> Any:
    found = module.__dict__
    return found[name] if name in found else getattr(module, name, None)


# Running the module


class _Probe:
    """A copy of the module that can be called and given other numbers."""

    def __init__(self, module: nn.Module, dims: int, numbers: dict[str, Any]):
        self.dims, self.numbers = dims, numbers
        self.copy = object.__new__(type(module))
        # Shallow: the attributes are numbers and constants, and hooks may hold anything.
        self.copy.__dict__ |= {name: _on_cpu(value) for name, value in module.__dict__.items()}
        for name, value in nn.Module().__dict__.items():
            if isinstance(value, dict):
                self.copy.__dict__[name] = value
        self.copy.__dict__["_buffers"] = {name: _on_cpu(value) for name, value in module._buffers.items()}

    def x(self, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """Without zeros."""
        generator = torch.Generator().manual_seed(seed)
        size = (rows, *[3, 2, 2, 2, 2][: self.dims - 1])
        x = torch.rand(size, generator=generator) - 0.5
        return (x + x.sign().mul(0.5)).to(dtype)

    def run(self, x: Tensor | None = None, training: bool = True) -> Any:
        self.copy.training = training
        return self.copy.forward(self.x(4) if x is None else x)

    @contextlib.contextmanager
    def having(self, name: str, value: float) -> Iterator[float]:
        """Another number in an attribute, as its type has it."""
        place = self.copy._buffers if name in self.copy._buffers else self.copy.__dict__
        missing = object()
        before, kind = place.get(name, missing), self.numbers[name]
        place[name] = _like(kind, value)
        try:
            yield float(place[name])
        finally:
            if before is missing:
                del place[name]
            else:
                place[name] = before

    def factors(self, x: Tensor, tolerance: float = 1e-5) -> Tensor:
        """What a call multiplies each row by, float32 `[rows]`. Raises `NoLaw` where it does something else."""
        out = self.run(x)
        if not isinstance(out, Tensor):
            raise NoLaw(f"it returns a {type(out).__name__} in training")
        if out.shape != x.shape or out.dtype != x.dtype:
            raise NoLaw(
                f"it makes {list(out.shape)} {_short(out.dtype)} of {list(x.shape)} {_short(x.dtype)} in training"
            )
        ratio = (out.detach().float() / x.detach().float()).flatten(1)
        first = ratio[:, :1]
        if bool(((ratio == 0) != (first == 0)).any()):
            raise NoLaw("it drops parts of a row")
        if not bool(((ratio - first).abs() <= tolerance * first.abs()).all()):
            raise NoLaw("what it returns in training is not its input times a mask and a constant")
        return first[:, 0]

    def masks(self, calls: int, rows: int = 4, seed: int | None = None, x: Tensor | None = None) -> Tensor:
        """Which rows are kept, bool `[calls, rows]`, by their first numbers."""
        if seed is not None:
            _seed(seed)
        x = self.x(rows) if x is None else x
        return torch.stack([self.run(x).detach().flatten(1)[:, 0] != 0 for _ in range(calls)])


def _on_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _like(kind: Any, value: float) -> Any:
    if isinstance(kind, Tensor):
        return torch.full(kind.shape, value, dtype=kind.dtype if kind.is_floating_point() else torch.float32)
    if hasattr(kind, "dtype") and kind.dtype.kind == "f":  # numpy's
        return (kind * 0 + value).astype(kind.dtype)
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs too
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


@contextlib.contextmanager
def _undisturbed(kind: type) -> Iterator[None]:
    """Puts the global generators and what a class has back, and keeps the surroundings' contexts out."""
    of_classes = [(cls, dict(vars(cls))) for cls in kind.__mro__ if not cls.__module__.startswith("torch.")]
    numpy = sys.modules.get("numpy")
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.device("cpu") if torch.get_default_device().type != "cpu" else contextlib.nullcontext(),  # slow
            torch.autocast("cpu", enabled=False),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            _seed(0)
            yield
    finally:
        for cls, before in of_classes:
            for name in [name for name, value in vars(cls).items() if before.get(name) is not value]:
                setattr(cls, name, before[name]) if name in before else delattr(cls, name)
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


# What is looked at


def _observe(module: nn.Module, dims: int) -> Law | str:
    try:
        check_code(type(module))
        numbers, constants = attributes_of(module)
        with _undisturbed(type(module)):
            probe = _Probe(module, dims, numbers)
            _check_it_stands_still(probe)
            attribute, keeps = _governing(probe)
            law = {"attribute": attribute, "keeps": keeps}
            if attribute is not None:
                law |= _mode_and_scale(probe, attribute, keeps)
                _check_others(probe, attribute)
        kind = type(module)
        return Law(kind, kind.forward, len(module.__dict__), tuple(constants.items()), **law)
    except NoLaw as reason:
        return str(reason)
    except Exception as error:
        return f"it raises {type(error).__name__} when it is tried on a tensor of {dims} dimensions: {error}"


def _check_it_stands_still(probe: _Probe) -> None:
    """Calls leave the module, its class and the input as they are; eval is the identity."""
    kind, x = type(probe.copy), probe.x(4)
    required = [p for p in list(inspect.signature(kind.forward).parameters.values())[1:]
                if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
    if len(required) != 1:
        raise NoLaw(f"its forward takes {len(required)} arguments, so that it does more than to drop")
    for training in (False, True, True):
        probe.copy.training = training
        before, of_class, given = _state(probe.copy), dict(vars(kind)), x.clone()
        out = probe.run(given, training)
        after = _state(probe.copy)
        changed = [name for name in before | after if not _same(before.get(name), after.get(name))]
        changed += [n for n, v in of_class.items() if not n.startswith("__") and vars(kind).get(n) is not v]
        if changed:
            raise NoLaw(f"a call changes its attribute {changed[0]!r}")
        if not torch.equal(given, x):
            raise NoLaw("it changes its input in place")
        if not training:
            _check_identity(out, x, "in eval mode")


def _check_identity(out: Any, x: Tensor, when: str) -> None:
    if not isinstance(out, Tensor) or out.dtype != x.dtype or not torch.equal(out, x):
        raise NoLaw(f"{when} it isn't the identity")


def _state(module: nn.Module) -> dict[str, Any]:
    return {
        name: (value, value._version if isinstance(value, Tensor) else 0)
        for name, value in {**module.__dict__, **module._buffers}.items()
    }


def _same(before: Any, after: Any) -> bool:
    if before is None or after is None:
        return False
    return before[1] == after[1] and (before[0] is after[0] or (is_number(before[0]) and before[0] == after[0]))


def _governing(probe: _Probe) -> tuple[str | None, bool]:
    """The number that P(drop), or P(keep), follows. None where it never drops."""
    if not probe.numbers:
        if bool(probe.masks(64).all()):
            _check_identity(probe.run(), probe.x(4), "in training, where it doesn't drop,")
            return None, False
        raise NoLaw(_NO_ATTRIBUTE)
    found, reasons = [], []
    for name in probe.numbers:
        try:
            seen = []
            for value in (0.1, 0.9):
                with probe.having(name, value):
                    probe.factors(probe.x(16))
                    seen.append(1 - float(probe.masks(64, rows=32).float().mean()))
        except NoLaw as reason:
            reasons.append(reason)
            continue
        except Exception:  # a number that can't be a probability
            continue
        for keeps, expected in ((False, (0.1, 0.9)), (True, (0.9, 0.1))):
            if all(abs(fraction - wanted) < 0.2 for fraction, wanted in zip(seen, expected, strict=True)):
                found.append((name, keeps))
    if len(found) > 1:
        raise NoLaw(f"how often it drops follows {' and '.join(repr(name) for name, _ in found)}")
    if not found:
        raise reasons[0] if reasons else NoLaw(_NO_ATTRIBUTE)
    return found[0]


def _mode_and_scale(probe: _Probe, attribute: str, keeps: bool) -> dict[str, Any]:
    def at(drop_prob: float) -> contextlib.AbstractContextManager[float]:
        return probe.having(attribute, 1 - drop_prob if keeps else drop_prob)

    with at(0.5):
        probe.factors(probe.x(64))
        _check_generators(probe)
        mode = _mode(probe)
        _check_gradient(probe)
        _check_dtypes(probe)
    with at(0.0):
        _check_identity(probe.run(), probe.x(4), "in training, where it doesn't drop,")
    scales = []
    for wanted in (*_PROBED, *_present(probe, attribute, keeps)):
        with at(wanted) as value:
            p = 1 - value if keeps else value
            _check_identity(probe.run(training=False), probe.x(4), "in eval mode")
            scales.append(_scale(probe, p))
            # The scale tells P(drop) to many digits; without one more has to be counted.
            rows, calls = (_ROWS, 1) if mode == "sample" else (1, _PATTERNS)
            kept = probe.masks(calls if scales[0] == 0.0 else 8 * calls, rows).float()
            if abs(1 - float(kept.mean()) - p) > _SIGMAS * (p * (1 - p) / kept.numel()) ** 0.5 + 1e-6:
                raise NoLaw(f"it drops {1 - float(kept.mean()):.3f} of what it is given where {attribute!r} is {value:g}")
    if len(set(scales)) > 1:
        raise NoLaw("it scales by 1 / (1 - p) at some rates only")
    return {"mode": mode, "scale_by_keep": scales[0] != 1.0}


def _present(probe: _Probe, attribute: str, keeps: bool) -> list[float]:
    value = float(probe.numbers[attribute])
    return [1 - value if keeps else value] if 0.0 < value < 0.95 else []


def _scale(probe: _Probe, p: float) -> float:
    """1.0 where kept rows stay as they are, 0.0 where they are divided by P(keep)."""
    for _ in range(200):
        factors = probe.factors(probe.x(64))
        if (factors != 0).any():
            break
    else:
        raise NoLaw(f"it keeps nothing where it should drop with a probability of {p:g}")
    (scale, *others) = factors[factors != 0].unique().tolist()
    for name, wanted in ((1.0, 1.0), (0.0, 1 / (1 - p))):
        if all(abs(s - wanted) <= 1e-5 * wanted for s in (scale, *others)):
            return name
    raise NoLaw(f"it multiplies what it keeps by {scale:.4g} where P(drop) is {p:g}, neither by 1 / (1 - p) nor by 1")


def _mode(probe: _Probe) -> str:
    """At P(drop) = 0.5."""
    kept = probe.masks(_PATTERNS, rows=3)
    mode = "block" if bool((kept == kept[:, :1]).all()) else "sample"
    codes = (kept.long() * torch.tensor([1, 2, 4])).sum(1)
    counts, expected = torch.bincount(codes, minlength=8).double(), _PATTERNS / 8
    if mode == "sample" and float(((counts - expected) ** 2).sum()) / expected > _CHI_SQUARED:
        raise NoLaw("whether it drops a row depends on the others of its batch, or on the row's place")
    if mode == "block" and len(probe.factors(probe.x(64)).unique()) > 1:
        raise NoLaw("it drops a small batch whole and a large one in parts")
    alone = 1 - float(probe.masks(_PATTERNS // 2, rows=1).float().mean())
    if not 0.25 < alone < 0.75:
        raise NoLaw(f"it drops a sample that comes alone with a probability of {alone:.2f} instead of 0.50")
    return mode


def _check_generators(probe: _Probe) -> None:
    """The mask comes from the global generators alone."""
    masks = probe.masks(32, seed=1)
    if not torch.equal(probe.masks(32, seed=1), masks):
        raise NoLaw("it draws from something else than the global generators")
    if torch.equal(probe.masks(32, seed=2), masks):
        raise NoLaw("it drops the same, whatever the global generators' seed")
    if not torch.equal(probe.masks(32, seed=1, x=probe.x(4, seed=1)), masks):
        raise NoLaw("what it drops depends on the numbers in its input")
    with torch.no_grad():
        if not torch.equal(probe.masks(32, seed=1), masks):
            raise NoLaw("what it drops depends on torch.no_grad()")
    with torch.autocast("cpu", torch.bfloat16):
        probe.factors(probe.x(4))
        if not torch.equal(probe.masks(32, seed=1), masks):
            raise NoLaw("what it drops depends on autocast")
    if not torch.equal(probe.masks(32, seed=1, x=probe.x(4).requires_grad_()), masks):
        raise NoLaw("what it drops depends on whether its input requires a gradient")


def _check_gradient(probe: _Probe) -> None:
    x = probe.x(64).requires_grad_()
    for _ in range(4):
        x.grad = None
        _seed(3)
        factors = probe.factors(x)
        _seed(3)
        out = probe.run(x)
        (out * probe.x(64, seed=2)).sum().backward()
        wanted = probe.x(64, seed=2) * factors.reshape(-1, *[1] * (x.dim() - 1))
        if x.grad is None or not torch.allclose(x.grad, wanted, rtol=1e-5, atol=1e-6):
            raise NoLaw("its gradient isn't what it multiplies its input by")


def _check_dtypes(probe: _Probe) -> None:
    factors = probe.factors(probe.x(64))
    for dtype in (torch.bfloat16, torch.float16):
        others = probe.factors(probe.x(64, dtype=dtype), tolerance=2e-2)
        both = [f[f != 0].max() for f in (factors, others) if (f != 0).any()]
        if len(both) == 2 and not torch.allclose(*both, rtol=2e-2):
            raise NoLaw(f"it scales {_short(dtype)} in another way than float32")


def _check_others(probe: _Probe, attribute: str) -> None:
    """No other number changes anything."""
    with probe.having(attribute, 0.5):
        _seed(4)
        expected = [probe.run(probe.x(16)) for _ in range(8)]
        for name, number in probe.numbers.items():
            values = {0.0, 0.5, 1.0, -1.0, 1e9, float(number) + 1, float(number) / 2} if name != attribute else ()
            for value in values:
                with probe.having(name, value):
                    try:
                        _seed(4)
                        same = all(torch.equal(out, probe.run(probe.x(16))) for out in expected)
                    except Exception:
                        same = False
                if not same:
                    raise NoLaw(f"its attribute {name!r} changes what it does too, besides {attribute!r}")


def _seen_dropping(module: nn.Module, numbers: dict[str, Any]) -> bool | None:
    with _undisturbed(type(module)):
        for dims in (3, 4, 2):
            probe = _Probe(module, dims, numbers)
            settings = [contextlib.nullcontext(), *(probe.having(name, 0.5) for name in numbers)]
            seen = []
            for setting in settings:
                with contextlib.suppress(Exception), setting:
                    seen.append(_rows_dropped(probe))
            if any(s == "dropped" for s in seen):
                return True
            if seen and all(s == "a function" for s in seen):
                return False
    return None


def _rows_dropped(probe: _Probe) -> str:
    x, outs = probe.x(8), []
    for _ in range(32):
        outs.append(out := probe.run(x))
        zero = (out == 0).flatten(1)
        if out.shape != x.shape or not bool((zero == zero[:, :1]).all()):
            return "no drop-path"
        if zero.any():
            return "dropped"
    same = all(torch.equal(out, outs[0]) for out in outs)
    return "a function" if same and not torch.equal(outs[0], x) else "nothing"
