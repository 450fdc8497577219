"""Summaries of each command's rows as question → answer, for the table at the end of `all`.

Ranges are from the lowest to the highest over all cases, so that the best case isn't shown alone.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Iterator

from . import drop_path
from .harness import Row, quotient
from .memory import DROP, REUSE
from .op_goals import setting_of
from .op_providers import EAGER, OURS, OURS_EAGER, OURS_NATIVE
from .pairs import BranchFrozen, DropPath, Exact, Naive

Answer = Callable[[list[Row]], str | None]
"""None if the rows don't answer the question."""


def pair_against(provider: str, base: str | None = None) -> Answer:
    """The time of a provider's pair relative to plain's or `base`'s, by mode, with its needed FLOPs."""

    def answer(rows: list[Row]) -> str | None:
        lines = []
        for mode in dict.fromkeys(row["mode"] for row in rows):
            times, needed = [], []
            for case in _cases(row for row in rows if row["mode"] == mode):
                mine, other = case.get(provider), None if base is None else case.get(base)
                if mine is None or (base is not None and other is None):
                    continue
                times.append(mine["ratio_rounds"] / (other["ratio_rounds"] if other else 1))
                needed += [mine["needed_ratio"]] if mine["needed_ratio"] and not base else []
            if times:
                lines.append(f"{mode}: {_range(times)}" + (f", needed FLOPs {_range(needed)}" if needed else ""))
        return "\n".join(lines) or None

    return answer


def ops_against(is_other: Callable[[str], bool]) -> Answer:
    """The speed-up of our fastest provider over another one, by pass."""

    def answer(rows: list[Row]) -> str | None:
        lines = []
        for direction in dict.fromkeys(row["pass"] for row in rows):
            faster = [of for _, of in times_as_fast((row for row in rows if row["pass"] == direction), is_other)]
            if faster:
                lines.append(f"{direction}: {statistics.median(faster):.2f} × as fast ({_range(faster)})")
        return "\n".join(lines) or None

    return answer


def ops_lost(rows: list[Row], most: int = 4) -> str | None:
    """The settings in which ours is slower than another provider by more than a twentieth, the worst first."""
    slower = [(of, where) for where, of in times_as_fast(rows, lambda name: not name.startswith("ours")) if of < 0.95]
    if not slower:
        return "nowhere in these settings" if rows else None
    more = f"\nand {len(slower) - most} more" if len(slower) > most else ""
    return "\n".join(f"{of:.2f} × as fast: {where}" for of, where in sorted(slower)[:most]) + more


def call_time(rows: list[Row]) -> str | None:
    """Host time of our calls in µs and relative to eager's, forward and backward."""
    ours = [r for r in rows if r["provider"] == _fastest(rows) and r["pass"] == "both" and r["ratio_rounds"]]
    if not ours:
        return None
    return f"{_range([r['p50_us'] for r in ours], '.0f')} µs, {_range([r['ratio_rounds'] for r in ours])} of eager"


def kept_bytes(provider: str, iteration: str) -> Answer:
    """Saved bytes and peak of an iteration relative to a plain step's, by mode."""

    def answer(rows: list[Row]) -> str | None:
        lines = []
        for mode in dict.fromkeys(row["mode"] for row in rows):
            those = [r for r in rows if (r["mode"], r["provider"], r["iteration"]) == (mode, provider, iteration)]
            saved, peak = ([r[key] for r in those if r[key] is not None] for key in ("saved_ratio", "peak_ratio"))
            if saved:
                lines.append(f"{mode}: saved {_range(saved)}, peak {_range(peak)}")
        return "\n".join(lines) or None

    return answer


def moved_bytes(provider: str) -> Answer:
    """Moved bytes relative to needed bytes, by pass."""

    def answer(rows: list[Row]) -> str | None:
        lines = []
        for direction in dict.fromkeys(row["pass"] for row in rows):
            those = [row for row in rows if (row["provider"], row["pass"]) == (provider, direction)]
            ratios = [row["bytes_ratio"] for row in those if row["bytes_ratio"] is not None]
            if ratios:
                least = sum(ratio < 1.005 for ratio in ratios)
                lines.append(f"{direction}: {_range(ratios)}, no more than needed in {least} of {len(ratios)}")
        return "\n".join(lines) or None

    return answer


def path_overhead(rows: list[Row]) -> str | None:
    """Host time of ours per path and optimizer step, in the longest chain of tiny paths."""
    ours = [row for row in rows if row["network"] == "tiny" and row["overhead_us_per_path"] is not None]
    last = {row["mode"]: row for row in sorted(ours, key=lambda row: row["paths"])}
    lines = [f"{mode}: {r['overhead_us_per_path'] / 2:.0f} µs, with {r['paths']:,} paths" for mode, r in last.items()]
    return "\n".join(lines) or None


def step_overhead(rows: list[Row]) -> str | None:
    """The host time of ours as a share of a step, by network."""
    lines = []
    networks = dict.fromkeys((row["network"], row["batch"]) for row in rows if row["network"] != "tiny")
    for network, batch in networks:
        shares = [r["share"] for r in rows if (r["network"], r["batch"]) == (network, batch) and r["share"] is not None]
        if shares:
            lines.append(f"{network}, batch {batch}: {_range(shares, '.2%')}")
    return "\n".join(lines) or None


def is_compiled(name: str) -> bool:
    return name.startswith(("compiled", "torch.compile"))


def is_peer(name: str) -> bool:
    """Another library's."""
    return not (name == EAGER or name.startswith("ours") or is_compiled(name))


FINDINGS: dict[str, dict[str, Answer]] = {
    "step": {
        "an optimizer step of the exact scheme, plain training = 1": pair_against(Exact.name),
        "… with frozen branches detached": pair_against(BranchFrozen.name),
        "the exact scheme, done naively = 1": pair_against(Exact.name, Naive.name),
        "the exact scheme, masked drop-path = 1": pair_against(Exact.name, DropPath.name),
        "our drop-path alone, timm's = 1": pair_against(drop_path.Ours.name, drop_path.OwnMasks.name),
        "… DINOv2's subset = 1": pair_against(drop_path.Ours.name, drop_path.Subset.name),
        "… timm's compiled = 1": pair_against(drop_path.Ours.name, drop_path.Compiled.name),
        "… the compiled subset = 1": pair_against(drop_path.Ours.name, drop_path.CompiledSubset.name),
    },
    "memory": {
        "a drop iteration, plain training = 1": kept_bytes(Exact.name, DROP),
        "a reuse iteration, exact": kept_bytes(Exact.name, REUSE),
        "… with frozen branches detached": kept_bytes(BranchFrozen.name, REUSE),
    },
    "ops": {
        "our ops against eager torch": ops_against(lambda name: name == EAGER),
        "… against torch.compile": ops_against(is_compiled),
        "… against other libraries'": ops_against(is_peer),
        "where ours is slower": ops_lost,
    },
    "overhead": {"host time of a call, forward and backward": call_time},
    "host": {"host time of a call on a GPU, forward and backward": call_time},
    "scaling": {
        "host time of the scheme per path and step": path_overhead,
        "… as a share of a step": step_overhead,
    },
    "traffic": {
        "bytes that our Triton kernels move, needed = 1": moved_bytes(OURS),
        "… eager torch": moved_bytes(EAGER),
    },
}
"""By command."""


def _cases(rows: Iterable[Row]) -> Iterator[dict[str, Row]]:
    """The measured rows of each case of `step`, by provider."""
    for _, group in itertools.groupby(rows, lambda row: (row["model"], row["mode"], row["p"])):
        yield {row["provider"]: row for row in group if row["ratio_rounds"] is not None}


def times_as_fast(rows: Iterable[Row], is_other: Callable[[str], bool]) -> Iterator[tuple[str, float]]:
    """Yields a setting, and the speed-up of our fastest backend over each of the other providers there."""
    rows = list(rows)
    name = _fastest(rows)
    for (setting, direction), group in itertools.groupby(rows, lambda row: (setting_of(row), row["pass"])):
        case = [row for row in group if not row["unavailable"]]
        for ours, other in itertools.product(case, case):
            if ours["provider"] == name and is_other(other["provider"]):
                on_device = quotient(other["device_ms"], ours["device_ms"])
                faster = on_device or quotient(other["ratio_rounds"], ours["ratio_rounds"])
                if faster is not None:
                    yield f"{setting}, {direction}, {other['provider']}", faster


def _fastest(rows: Iterable[Row]) -> str:
    """Our default backend's row: Triton's on a GPU, the compiled library's on a CPU, else eager's."""
    there = {row["provider"] for row in rows if not row["unavailable"]}
    return next(name for name in (OURS, OURS_NATIVE, OURS_EAGER) if name in there or name == OURS_EAGER)


def _range(values: list[float], spec: str = ".2f") -> str:
    low, high = format(min(values), spec), format(max(values), spec)
    return low if low == high else f"{low} to {high}"
