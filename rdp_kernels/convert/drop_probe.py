"""Runs a copy of a drop-path on the CPU, in training and in eval mode, to find out what it does."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .drop_code import NoLaw, is_number
from .snapshot import preserved_generators, set_seed

_PROBED = (0.05, 0.3, 0.8)
"""Values of P(drop) at which frequency and scale are compared with the law."""
_ROWS, _PATTERNS = 4096, 256
"""The numbers of rows in one call, and of calls, that are counted. A frequency then has an error of 0.01 to 0.03."""
_SIGMAS = 5.0
"""How far a frequency may be off. A correct drop-path is further off once in 2 million observations."""
_CHI_SQUARED = 45.0
"""Bound for 7 degrees of freedom: independent rows exceed it once in 7 million observations."""
_NO_ATTRIBUTE = "how often it drops follows none of its attributes, so that a schedule's changes would go unseen"


class Probe:
    """A copy of the module that can be called and can be given other numbers."""

    def __init__(self, module: nn.Module, dims: int, numbers: dict[str, Any]):
        self.dims, self.numbers = dims, numbers
        self.copy = object.__new__(type(module))
        # The copy is shallow, as the attributes are numbers and constants. It has no hooks, as these may hold anything.
        self.copy.__dict__ |= {name: _on_cpu(value) for name, value in module.__dict__.items()}
        for name, value in nn.Module().__dict__.items():
            if isinstance(value, dict):
                self.copy.__dict__[name] = value
        self.copy.__dict__["_buffers"] = {name: _on_cpu(value) for name, value in module._buffers.items()}

    def x(self, rows: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
        """A random input without zeros."""
        generator = torch.Generator().manual_seed(seed)
        size = (rows, *[3, 2, 2, 2, 2][: self.dims - 1])
        x = torch.rand(size, generator=generator) - 0.5
        return (x + x.sign().mul(0.5)).to(dtype)

    def run(self, x: Tensor | None = None, training: bool = True) -> Any:
        self.copy.training = training
        return self.copy.forward(self.x(4) if x is None else x)

    @contextlib.contextmanager
    def having(self, name: str, value: float) -> Iterator[float]:
        """Puts another number into an attribute, in the type that the attribute has."""
        place: dict[str, Any] = self.copy._buffers if name in self.copy._buffers else self.copy.__dict__
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
        """The factor by which a call multiplies each row, float32 `[rows]`. Raises `NoLaw` if it does anything else."""
        out = self.run(x)
        if not isinstance(out, Tensor):
            raise NoLaw(f"it returns a {type(out).__name__} in training")
        if out.shape != x.shape or out.dtype != x.dtype:
            raise NoLaw(
                f"it returns {list(out.shape)} {_short(out.dtype)} for {list(x.shape)} {_short(x.dtype)} in training"
            )
        ratio = (out.detach().float() / x.detach().float()).flatten(1)
        first = ratio[:, :1]
        if bool(((ratio == 0) != (first == 0)).any()):
            raise NoLaw("it drops parts of a row")
        if not bool(((ratio - first).abs() <= tolerance * first.abs()).all()):
            raise NoLaw("what it returns in training is not its input times a mask and a constant")
        return first[:, 0]

    def masks(self, calls: int, rows: int = 4, seed: int | None = None, x: Tensor | None = None) -> Tensor:
        """Which rows the calls keep, bool `[calls, rows]`, judged by the first number of each row."""
        if seed is not None:
            set_seed(seed)
        x = self.x(rows) if x is None else x
        return torch.stack([self.run(x).detach().flatten(1)[:, 0] != 0 for _ in range(calls)])


def _on_cpu(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _like(kind: Any, value: float) -> Any:
    if isinstance(kind, Tensor):
        return torch.full(kind.shape, value, dtype=kind.dtype if kind.is_floating_point() else torch.float32)
    if hasattr(kind, "dtype") and kind.dtype.kind == "f":  # of numpy
        return (kind * 0 + value).astype(kind.dtype)
    return value


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextlib.contextmanager
def undisturbed(kind: type) -> Iterator[None]:
    """Restores the global generators and the attributes of a class at the end, and disables the caller's contexts."""
    of_classes = [(cls, dict(vars(cls))) for cls in kind.__mro__ if not cls.__module__.startswith("torch.")]
    try:
        with (
            preserved_generators(),
            torch.device("cpu") if torch.get_default_device().type != "cpu" else contextlib.nullcontext(),  # slow
            torch.autocast("cpu", enabled=False),
            torch.inference_mode(False),
            torch.enable_grad(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            set_seed(0)
            yield
    finally:
        for cls, before in of_classes:
            for name in [name for name, value in vars(cls).items() if before.get(name) is not value]:
                setattr(cls, name, before[name]) if name in before else delattr(cls, name)


# What is observed


def seen_in(probe: Probe) -> tuple[str | None, bool, str, bool]:
    """The `attribute`, `keeps`, `mode` and `scale_by_keep` of a drop-path's `Law`. Raises `NoLaw` if it does anything
    else than drop rows at the rate in one of its attributes."""
    _check_it_stands_still(probe)
    attribute, keeps = _governing(probe)
    if attribute is None:
        return None, False, "sample", True
    mode, scale_by_keep = _mode_and_scale(probe, attribute, keeps)
    _check_others(probe, attribute)
    return attribute, keeps, mode, scale_by_keep


def rows_dropped(probe: Probe) -> str:
    """Returns "dropped" if whole rows are dropped, "no drop-path" if parts of rows or the shape change, "a function" if
    the input is always changed in the same way, and "nothing" otherwise."""
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


def _check_it_stands_still(probe: Probe) -> None:
    """Raises `NoLaw` if a call changes the module, its class or its input, or isn't the identity in eval mode."""
    kind, x = type(probe.copy), probe.x(4)
    required = [p for p in list(inspect.signature(kind.forward).parameters.values())[1:]
                if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]  # fmt: skip
    if len(required) != 1:
        raise NoLaw(f"its forward takes {len(required)} arguments, so it does more than drop")
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


def _governing(probe: Probe) -> tuple[str | None, bool]:
    """The name of the number that P(drop) follows, and whether the number is P(keep); None if it never drops."""
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
        except Exception:  # the number can't be a probability
            continue
        for keeps, expected in ((False, (0.1, 0.9)), (True, (0.9, 0.1))):
            if all(abs(fraction - wanted) < 0.2 for fraction, wanted in zip(seen, expected, strict=True)):
                found.append((name, keeps))
    if len(found) > 1:
        raise NoLaw(f"how often it drops follows {' and '.join(repr(name) for name, _ in found)}")
    if not found:
        raise reasons[0] if reasons else NoLaw(_NO_ATTRIBUTE)
    return found[0]


def _mode_and_scale(probe: Probe, attribute: str, keeps: bool) -> tuple[str, bool]:
    def at(drop_prob: float) -> contextlib.AbstractContextManager[float]:
        return probe.having(attribute, 1 - drop_prob if keeps else drop_prob)

    with at(0.5):
        _check_it_stands_still(probe)
        probe.factors(probe.x(64))
        _check_generators(probe)
        mode = _mode(probe)
        _check_gradient(probe)
        for dtype in (torch.bfloat16, torch.float16):
            if _scale(probe, 0.5, dtype, 1e-2) != _scale(probe, 0.5):
                raise NoLaw(f"it scales {_short(dtype)} in another way than float32")
    with at(0.0):
        _check_identity(probe.run(), probe.x(4), "in training, where it doesn't drop,")
    now, scales = float(probe.numbers[attribute]), []
    present = [1 - now if keeps else now] if 0.0 < now < 0.95 else []
    for wanted in (*_PROBED, *present):
        with at(wanted) as value:
            p = 1 - value if keeps else value
            _check_identity(probe.run(training=False), probe.x(4), "in eval mode")
            scales.append(_scale(probe, p))
            # The scale shows P(drop) to many digits. Without a scale, more rows have to be counted.
            rows, calls = (_ROWS, 1) if mode == "sample" else (1, _PATTERNS)
            kept = probe.masks(calls if scales[0] == 0.0 else 8 * calls, rows).float()
            if abs(1 - float(kept.mean()) - p) > _SIGMAS * (p * (1 - p) / kept.numel()) ** 0.5 + 1e-6:
                raise NoLaw(
                    f"it drops {1 - float(kept.mean()):.3f} of what it is given where {attribute!r} is {value:g}"
                )
    if len(set(scales)) > 1:
        raise NoLaw("it scales by 1 / (1 - p) at some rates only")
    return mode, scales[0] != 1.0


def _scale(probe: Probe, p: float, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> float:
    """Returns 1.0 if kept rows stay as they are, and 0.0 if they are divided by P(keep). Raises `NoLaw` otherwise."""
    for _ in range(200):  # at P(drop) = 0.8 a correct drop-path keeps nothing in all of them once in 10¹⁹
        factors = probe.factors(probe.x(64, dtype=dtype), tolerance)
        if (factors != 0).any():
            break
    else:
        raise NoLaw(f"it keeps nothing where it should drop with a probability of {p:g}")
    (scale, *others) = factors[factors != 0].unique().tolist()
    for name, wanted in ((1.0, 1.0), (0.0, 1 / (1 - p))):
        if all(abs(s - wanted) <= tolerance * wanted for s in (scale, *others)):
            return name
    raise NoLaw(f"it multiplies what it keeps by {scale:.4g} where P(drop) is {p:g}, neither by 1 / (1 - p) nor by 1")


def _mode(probe: Probe) -> str:
    """The mode: "sample" if single samples are dropped, "block" if whole batches are. P(drop) must be 0.5."""
    kept = probe.masks(_PATTERNS, rows=3)
    mode = "block" if bool((kept == kept[:, :1]).all()) else "sample"
    if mode == "sample":
        many = probe.masks(16, rows=255)
        counts = many.double().sum(1)
        # χ² with 15 degrees of freedom: independent rows are outside of the bounds once in 2 million observations.
        spread = float(((counts - counts.mean()) ** 2).sum()) / (255 / 4)
        if not (_independent(kept) and _independent(many.reshape(-1, 3)) and 1 < spread < 60):
            raise NoLaw("whether it drops a row depends on the others of its batch, or on the row's place")
    if mode == "block" and len(probe.factors(probe.x(64)).unique()) > 1:
        raise NoLaw("it drops a small batch whole and a large one in parts")
    alone = 1 - float(probe.masks(_PATTERNS // 2, rows=1).float().mean())
    if not 0.25 < alone < 0.75:
        raise NoLaw(f"it drops a sample that comes alone with a probability of {alone:.2f} instead of 0.50")
    return mode


def _independent(kept: Tensor) -> bool:
    """Whether the 8 patterns of three rows, bool `[n, 3]`, are equally frequent, by a χ² test."""
    counts, expected = torch.bincount((kept.long() * torch.tensor([1, 2, 4])).sum(1), minlength=8), len(kept) / 8
    return float(((counts - expected) ** 2).sum()) / expected < _CHI_SQUARED


def _check_generators(probe: Probe) -> None:
    """Raises `NoLaw` if the mask depends on anything else than the global generators."""
    masks = probe.masks(32, seed=1)
    if not torch.equal(probe.masks(32, seed=1), masks):
        raise NoLaw("it draws from something else than the global generators")
    if torch.equal(probe.masks(32, seed=2), masks):
        raise NoLaw("it drops the same, whatever the global generators' seed")
    surroundings: dict[str, tuple[contextlib.AbstractContextManager[Any], Tensor]] = {
        "the numbers in its input": (contextlib.nullcontext(), probe.x(4, seed=1)),
        "torch.no_grad()": (torch.no_grad(), probe.x(4)),
        "autocast": (torch.autocast("cpu", torch.bfloat16), probe.x(4)),
        "whether its input requires a gradient": (contextlib.nullcontext(), probe.x(4).requires_grad_()),
    }
    for what, (context, x) in surroundings.items():
        with context:
            if not torch.equal(probe.masks(32, seed=1, x=x), masks):
                raise NoLaw(f"what it drops depends on {what}")
    with torch.autocast("cpu", torch.bfloat16):
        probe.factors(probe.x(4))


def _check_gradient(probe: Probe) -> None:
    x = probe.x(64).requires_grad_()
    for seed in range(6):
        x.grad = None
        set_seed(seed)
        factors = probe.factors(x)
        set_seed(seed)
        out = probe.run(x)
        if not out.requires_grad and not factors.any():
            continue  # new zeros, which don't depend on the input
        (out * probe.x(64, seed=2)).sum().backward()
        wanted = probe.x(64, seed=2) * factors.reshape(-1, *[1] * (x.dim() - 1))
        if x.grad is None or not torch.allclose(x.grad, wanted, rtol=1e-5, atol=1e-6):
            raise NoLaw("its gradient isn't what it multiplies its input by")


def _check_others(probe: Probe, attribute: str) -> None:
    """Raises `NoLaw` if another number than `attribute` changes what the module does."""
    with probe.having(attribute, 0.5):
        set_seed(4)
        expected = [probe.run(probe.x(16)) for _ in range(8)]
        for name, number in probe.numbers.items():
            values = {0.0, 0.5, 1.0, -1.0, 1e9, float(number) + 1, float(number) / 2} if name != attribute else ()
            for value in values:
                with probe.having(name, value):
                    try:
                        set_seed(4)
                        same = all(torch.equal(out, probe.run(probe.x(16))) for out in expected)
                    except Exception:
                        same = False
                if not same:
                    raise NoLaw(f"its attribute {name!r} changes what it does too, besides {attribute!r}")
