"""Measures cases. The providers of a case do the same work; they are verified first and then timed in turn.

    session = Session(Device.of("cpu"), turns=12)
    for case in cases:
        session.measure(case)
    session.rows

No provider of a case is timed before all of them have passed their checks. A round gives each provider one turn, so
that a busy machine slows all of them. The order changes from round to round. The turn that counts FLOPs is the warm-up.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rdp_kernels.estimate.meters import Flops

from .machine import Ceilings, Device, facts

CEILINGS_EVERY = 5.0  # seconds
CPU = torch.device("cpu")
Row = dict[str, Any]
"""The values of one provider in one case: a line of the CSV. Absent values are None."""


class CheckFailed(Exception):
    """A provider computes something else than it should. No provider of its case is timed."""


@dataclass(frozen=True)
class Check:
    """The largest `error` against the float64 reference, and its `bound`."""

    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # NaN fails this


@dataclass(frozen=True)
class Capture:
    """A provider's turns as a CUDA graph.

    Args:
        runs: a function for each set of inputs, which runs a turn and returns tensors.
        check: checks the results of the first function.
        kept: tensors that belong to the inputs. A result that shares memory with one of them is not new.
    """

    runs: Sequence[Callable[[], tuple[Tensor, ...]]]
    check: Callable[[tuple[Tensor, ...]], Check]
    kept: Sequence[Tensor] = ()


def _never(*_: object) -> Any:
    raise AssertionError("an unavailable provider is neither verified nor run")


@dataclass(frozen=True)
class Provider:
    """One way to do the work of a case.

    Args:
        run: `run(turn)` is timed. Turns count from 0 for every provider, and equal turns mean equal inputs.
        verify: compares with the float64 reference.
        needed_flop: FLOPs of a turn (mean over all turns) that no implementation of this work can leave out.
        needed_bytes: likewise, bytes read from and written to memory.
        minimal: the provider claims to do only the needed FLOPs, which is checked over all turns. Other providers do
            the same FLOPs in each turn, and only those of the first are counted.
        period: after so many turns the FLOPs of a minimal provider repeat; None: never.
        compiled: compiled by torch.compile, so that its FLOPs can't be counted.
        unavailable: why the provider can't run here.
        columns: further columns of its row.
        capture: the work of a CUDA graph, for times of the device alone.
    """

    name: str
    run: Callable[[int], object]
    verify: Callable[[], Check]
    needed_flop: float | None = None
    needed_bytes: float | None = None
    minimal: bool = False
    period: int | None = None
    compiled: bool = False
    unavailable: str | None = None
    columns: Row = field(default_factory=dict)
    capture: Capture | None = None

    def __post_init__(self) -> None:
        if self.minimal and not self.needed_flop:
            raise ValueError(f"needed_flop must be given for the minimal provider {self.name!r}")

    @classmethod
    def missing(cls, name: str, reason: str) -> Provider:
        """Returns a provider that can't run here. Its row says why."""
        return cls(name, _never, _never, unavailable=reason)


@dataclass(frozen=True)
class Case:
    """Work that several providers do.

    Args:
        labels: columns that distinguish its rows from other cases', for example model, mode and p.
        unit: the work of one turn, in words.
        baseline: the provider that ratios refer to. It must be available if any is.
    """

    labels: dict[str, Any]
    unit: str
    baseline: str
    providers: list[Provider]

    def __post_init__(self) -> None:
        names = [provider.name for provider in self.available]
        if names and self.baseline not in names:
            raise ValueError(f"baseline must be one of the available providers {names}, got {self.baseline!r}")

    @property
    def available(self) -> list[Provider]:
        return [provider for provider in self.providers if provider.unavailable is None]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.labels.items())

    def verify(self) -> Check:
        """Returns the check that comes closest to its bound. Raises `CheckFailed` if one doesn't pass."""
        checks = []
        for provider in self.available:
            try:
                check = provider.verify()
            except Exception as error:
                raise CheckFailed(f"{self}: {provider.name!r} raises {told(error)}") from error
            if not check.passed:
                raise CheckFailed(
                    f"{self}: {provider.name!r} differs from the float64 reference by {check.error:.1e}, "
                    f"its bound is {check.bound:.1e}"
                )
            checks.append(check)
        return max(checks, key=lambda check: check.error / check.bound)

    def count_flop(self, turns: int, device: torch.device = CPU) -> dict[str, float]:
        """Returns the mean FLOPs of each provider's turns. Raises `CheckFailed` if a minimal provider doesn't do
        exactly the needed FLOPs. On a GPU it warns instead: there, attention kernels compute the scores again in the
        backward, and this is counted."""
        counted = {}
        for provider in self.available:
            if provider.compiled:
                provider.run(0)  # warm-up; counting warms up the others
                continue
            differ = min(turns, provider.period or turns) if provider.minimal else 1
            counts = [_count(provider, turn, device) for turn in range(differ)]
            counted[provider.name] = statistics.mean(counts)
            needed = provider.needed_flop
            if provider.minimal and not abs(counted[provider.name] - needed) <= 1e-9 * needed:
                differs = f"{self}: {provider.name!r} does {counted[provider.name]:.10g} FLOPs, it needs {needed:.10g}"
                if device.type != "cuda":
                    raise CheckFailed(differs)
                print(f"warning: {differs}", file=sys.stderr)
        return counted

    def warm_up(self) -> dict[str, float]:
        """Runs a turn of each provider without counting. Returns no counts."""
        for provider in self.available:
            provider.run(0)
        return {}


class Session:
    """Measures cases on one device and collects their `rows`.

    Args:
        turns: the number of turns of each provider.
        on_round: called after every round.
        flops: whether FLOPs are counted and compared with their ceiling.
        more: returns further columns of a provider's row, measured after the rounds.
    """

    def __init__(
        self,
        device: Device,
        turns: int,
        on_round: Callable[[], object] = lambda: None,
        flops: bool = True,
        more: Callable[[Provider], Row] = lambda provider: {},
    ):
        self.device, self.turns, self.on_round, self.flops, self.more = device, turns, on_round, flops, more
        self._facts, self._ceilings = facts(device), self._measure_ceilings()
        self._ceilings_at = time.monotonic()
        self._rows: list[Row] = []

    @property
    def rows(self) -> list[Row]:
        """All rows, with shares of the same ceilings: the highest that were measured."""
        return [self._facts | row | self._shares(row) for row in self._rows]

    def measure(self, case: Case) -> None:
        """Verifies, counts and times `case`. If it is interrupted while timing, the complete rounds are kept."""
        if not case.available:
            self._rows += [self._row(case, provider, [], {}) for provider in case.providers]
            return
        case.verify()
        self._raise_ceilings()
        counted = case.count_flop(self.turns, self.device.device) if self.flops else case.warm_up()
        rounds: list[dict[str, float]] = []
        more: dict[str, Row] = {}
        try:
            for turn in range(self.turns):
                rounds.append(self._round(case, turn))
                self.on_round()
            for provider in case.available:
                more[provider.name] = self.more(provider)
        finally:
            if rounds:
                rows = [self._row(case, provider, rounds, counted) for provider in case.providers]
                self._rows += [row | more.get(row["provider"], {}) for row in rows]

    def _raise_ceilings(self) -> None:
        """Measures the ceilings again every few seconds, as other programs may have lowered the last ones."""
        if time.monotonic() - self._ceilings_at >= CEILINGS_EVERY:
            self._ceilings = self._ceilings.or_higher(self._measure_ceilings())
            self._ceilings_at = time.monotonic()

    def _measure_ceilings(self) -> Ceilings:
        return self.device.ceilings() if self.flops else Ceilings(0.0, self.device.copy_rate())

    def _round(self, case: Case, turn: int) -> dict[str, float]:
        """Returns the milliseconds of one turn of each provider."""
        return {
            provider.name: self.device.milliseconds(lambda provider=provider: provider.run(turn))
            for provider in turn_order(case.available, turn)
        }

    def _row(self, case: Case, provider: Provider, rounds: list[dict[str, float]], counted: dict[str, float]) -> Row:
        base = next(p for p in case.providers if p.name == case.baseline)
        row = {"unit": case.unit} | case.labels | {"provider": provider.name}
        times, base_times = ([a_round.get(name) for a_round in rounds] for name in (provider.name, base.name))
        measured = provider.unavailable is None
        row |= {"turns": len(rounds) if measured else 0}
        row |= summary(times, base_times) if measured else dict.fromkeys(SUMMARY)
        flop = counted.get(provider.name)
        return row | {
            "needed_gflop": scaled(provider.needed_flop, 1e-9),
            "counted_gflop": scaled(flop, 1e-9),
            "needed_gb": scaled(provider.needed_bytes, 1e-9),
            "needed_ratio": quotient(provider.needed_flop, base.needed_flop),
            "counted_ratio": quotient(flop, counted.get(base.name)),
            "unavailable": provider.unavailable or "",
            **provider.columns,
        }

    def _shares(self, row: Row) -> Row:
        """Returns the ceilings, and the shares of them that the median turn reaches by its needed FLOPs and bytes."""
        gflops, gbs = self._ceilings.flops / 1e9, self._ceilings.bytes / 1e9
        return {
            "ceiling_gflops": gflops,
            "ceiling_gbs": gbs,
            "flop_share": quotient(quotient(scaled(row["needed_gflop"], 1e3), gflops), row["p50_ms"]),
            "byte_share": quotient(scaled(row["needed_gb"], 1e3 / gbs), row["p50_ms"]),
        }


def turn_order(providers: list[Provider], turn: int) -> list[Provider]:
    """Rotates by one each round and reverses every other round, so that no provider always follows the same one."""
    start = turn % len(providers)
    order = providers[start:] + providers[:start]
    return order[::-1] if turn % 2 else order


SUMMARY = ("min_ms", "p20_ms", "p50_ms", "p80_ms", "ratio_p50", "ratio_min", "ratio_rounds")


def summary(times: list[float], base_times: list[float]) -> dict[str, float]:
    """Summarises a provider's turns. `ratio_rounds` is the median of each round's ratio to the baseline. It is the
    steadiest ratio on a machine whose speed drifts."""
    p20, p50, p80 = torch.tensor(times, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    ratio_rounds = statistics.median(mine / base for mine, base in zip(times, base_times, strict=True))
    ratios = (p50 / statistics.median(base_times), min(times) / min(base_times), ratio_rounds)
    return dict(zip(SUMMARY, (min(times), p20, p50, p80, *ratios), strict=True))


def scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def quotient(value: float | None, by: float | None) -> float | None:
    """Returns None if either is unknown, or `by` is 0."""
    return value / by if value is not None and by else None


def told(error: BaseException) -> str:
    """Formats an exception in one line: its name and the start of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ": ".join([type(error).__name__, " ".join(lines[:2])] if lines else [type(error).__name__])


def _count(provider: Provider, turn: int, device: torch.device) -> int:
    with Flops(device) as flops:
        provider.run(turn)
    return flops.read()
