"""`python -m benchmarks scaling`: the cost of the plan and our Python code, by the number of paths and against a step.

This is host time of a pair of iterations, forward and backward, on a network whose branches compute almost nothing.
"plain" runs `x + f(x)` twice. "by hand" runs the two iterations with all decisions made beforehand. "plan" draws,
opens and closes the iterations and calls no path. "ours" does everything. The overhead is the time of "ours" minus the
faster of "plain" and "by hand". "calls" counts the function calls of a pair in Python and C, the same in every run. The
command uses one thread, and every path has p = 0.3.

The second table shows the overhead as a share of a pair of plain training steps, for real networks with as many paths.
All times are those of the fastest turns: the host does the same in each turn, and other processes only add time.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from examples.models import ViT

from . import command, library_models
from .cases import MODES, Config, own
from .command import shown
from .harness import Case, Check, Provider, Row, Session, quotient
from .library_models import library
from .machine import Device
from .overhead import HostDevice
from .pairs import Plain
from .tiny_paths import BOUND, BY_HAND, OURS, PLAIN, PLAN, calls_of, path_case

PATHS = {"full": (12, 24, 48, 100, 300, 1000), "quick": (24, 100), "tiny": (8, 16)}
FULL_TURNS, FEW_TURNS, STEP_TURNS = 12, 3, 2
MOST_OF_A_STEP, MOST_GROWTH = 0.01, 1.5
"""The goals: the share of a step of ViT-S at batch 32, and the time per path at 1,000 paths relative to 100 paths."""


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "scaling", help="overhead by the number of paths", description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help=f"default: {' '.join(MODES)}")
    parser.add_argument("--paths", nargs="+", type=command.count, help=f"default: {' '.join(map(str, PATHS['full']))}")
    turns = f"pairs of each provider; default: {FULL_TURNS}, and {STEP_TURNS} of real networks"
    command.add_options(
        parser, turns, f"few paths, one network, {FEW_TURNS} turns", f"few paths, a tiny network, {FEW_TURNS} turns"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes. An interrupt keeps the rows so far."""
    if not command.has_device(options.device):
        return 2
    console, kind = Console(width=command.WIDTH), options.device
    counts = sorted(options.paths or PATHS[options.size])
    turns = options.turns or (FULL_TURNS if options.size == "full" else FEW_TURNS)
    cases = [command.one(path_case, mode, count, turns, kind) for mode in options.mode for count in counts]
    host = HostDevice.of(kind)
    rows, code = command.measured(
        console, cases, len(options.mode) * len(counts) * turns,
        lambda on_round: Session(host, turns, on_round, flops=False, more=calls_of), one_threaded=True,
    )  # fmt: skip
    if code != 130:
        networks = [n for n in NETWORKS[options.size] if n.paths in counts]
        steps, device = min(turns, STEP_TURNS), StepDevice.of(kind)
        others, step_code = command.measured(
            console, [command.one(step_case, network, device.device) for network in networks], len(networks) * steps,
            lambda on_round: Session(device, steps, on_round, flops=False), options.size == "tiny",
        )  # fmt: skip
        rows, code = rows + others, step_code or code
    rows = shares_of(rows)
    if rows:
        console.print(path_table(rows), step_table(rows), command.machine_line(rows[0]), sep="\n")
        if options.size == "full":
            console.print(*verdicts_of(rows), sep="\n")
    return code if command.written(options, rows) else 1


# Real networks


class StepDevice(Device):
    """A device without measured bandwidth."""

    def copy_rate(self) -> float:
        return math.nan


@dataclass(frozen=True)
class Network:
    """A vision transformer of `depth` blocks of two paths, each `width` wide."""

    name: str
    depth: int
    width: int
    config: Config

    @property
    def paths(self) -> int:
        return 2 * self.depth

    @property
    def labels(self) -> dict[str, Any]:
        return {
            "network": self.name, "depth": self.depth, "width": self.width, "batch": self.config.batch,
            "paths": self.paths, "mode": "",
        }  # fmt: skip


def own_vit(depth: int = 12, width: int = 192, batch: int = 16) -> Network:
    """Returns the network of `step`, on 64 tokens."""
    return Network("vit", depth, width, Config(own(ViT, 32, 4, 3, 10, width, depth, width // 48), batch))


HAS_TIMM = library_models.missing() is None
SMALL = Network(
    "timm vit-s" if HAS_TIMM else "vit of ViT-S's size",
    12,
    384,
    Config(partial(library, "vit-s") if HAS_TIMM else own(ViT, 224, 16, 3, 1000, 384, 12, 6), batch=32, image=224),
)
NETWORKS = {
    "full": (
        *(own_vit(depth=depth) for depth in (6, 12, 24)),
        *(own_vit(width=width) for width in (96, 384)),
        *(own_vit(batch=batch) for batch in (4, 64)),
        SMALL,
    ),
    "quick": (own_vit(),),
    "tiny": (Network("vit", 4, 64, Config(own(ViT, 16, 4, 3, 10, 64, 4, 4), batch=8, image=16)),),
}


def step_case(network: Network, device: torch.device) -> Case:
    """A turn is a pair of plain training steps."""
    trainer = network.config.trainer(Plain, "block", device)

    def verify() -> Check:
        with torch.no_grad():
            logits = trainer.model(trainer.images)
        return Check(0.0 if logits.isfinite().all() else math.inf, BOUND)

    provider = Provider(PLAIN, run=lambda turn: trainer.train(None), verify=verify)
    return Case(network.labels, "pair of steps", PLAIN, [provider])


# Evaluation

_LEFT_OUT = ("flop", "_gb", "_share", "needed", "counted", "ratio")


def shares_of(rows: list[Row]) -> list[Row]:
    """Returns rows with the overhead of ours, and a row for each real network and mode with its share of a pair of
    steps."""
    times = {(row["mode"], row["paths"], row["provider"]): row["min_ms"] for row in rows if row["network"] == "tiny"}
    overheads = {
        (mode, paths): time - min(times[mode, paths, PLAIN], times[mode, paths, BY_HAND])
        for (mode, paths, provider), time in times.items()
        if provider == OURS
    }
    result = []
    for row in rows:
        row = {key: value for key, value in row.items() if not any(part in key for part in _LEFT_OUT)}
        row = row | {"calls": row.get("calls"), "overhead_ms": None, "overhead_us_per_path": None, "share": None}
        tiny = row["network"] == "tiny"
        for (mode, paths), overhead in overheads.items():
            if paths != row["paths"] or (tiny and mode != row["mode"]):
                continue
            known = {"overhead_ms": overhead, "overhead_us_per_path": 1e3 * overhead / paths}
            if not tiny:
                result.append(row | {"mode": mode} | known | {"share": quotient(overhead, row["min_ms"])})
            else:
                result.append(row | (known if row["provider"] == OURS else {}))
    return result


def path_table(rows: list[Row]) -> Table:
    table = Table(title="Host time of a pair of iterations on tiny paths, in ms")
    for name in (
        "mode",
        "paths",
        PLAIN,
        BY_HAND,
        PLAN,
        "ours",
        "overhead",
        "µs a path",
        "plan µs a path",
        "calls a path",
    ):
        table.add_column(name, justify="left" if name == "mode" else "right")
    tiny = [row for row in rows if row["network"] == "tiny"]
    for (mode, paths), group in itertools.groupby(tiny, lambda row: (row["mode"], row["paths"])):
        of = {row["provider"]: row for row in group}
        times = [shown(of[name]["min_ms"], ".2f") for name in (PLAIN, BY_HAND, PLAN, OURS)]
        ours, plan = of[OURS], of[PLAN]
        per_path = [ours["overhead_us_per_path"], 1e3 * plan["min_ms"] / paths, quotient(ours["calls"], paths)]
        table.add_row(
            mode, f"{paths:,}", *times, shown(ours["overhead_ms"], ".2f"), *(shown(value, ".1f") for value in per_path)
        )
    return table


def step_table(rows: list[Row]) -> Table:
    table = Table(title="The overhead of as many paths as a share of a pair of plain steps (forward, backward, AdamW)")
    for name in ("network", "depth", "width", "batch", "mode", "pair ms", "overhead ms", "share"):
        table.add_column(name, justify="left" if name in ("network", "mode") else "right")
    for row in rows:
        if row["network"] != "tiny":
            labels = (str(row[name]) for name in ("network", "depth", "width", "batch", "mode"))
            cells = (("min_ms", ",.1f"), ("overhead_ms", ".2f"), ("share", ".2%"))
            table.add_row(*labels, *(shown(row[key], spec) for key, spec in cells))
    return table


def verdicts_of(rows: list[Row]) -> Iterator[str]:
    """Yields the goals that `rows` allow to check, with the measured values."""
    for row in rows:
        if (row["network"], row["batch"]) == (SMALL.name, SMALL.config.batch):
            met = "met" if row["share"] <= MOST_OF_A_STEP else "MISSED"
            what = f"{row['network']}, batch {row['batch']}, {row['mode']} mode"
            yield f"{what}: {row['share']:.2%} of a step, target {MOST_OF_A_STEP:.0%}: {met}"
    per_path = {(row["mode"], row["paths"]): row["overhead_us_per_path"] for row in rows if row["provider"] == OURS}
    for mode in MODES:
        if {(mode, 100), (mode, 1000)} <= per_path.keys():
            growth = per_path[mode, 1000] / per_path[mode, 100]
            met = "met" if growth <= MOST_GROWTH else "MISSED"
            yield f"a path among 1,000, {mode} mode: {growth:.2f} of one among 100, target {MOST_GROWTH}: {met}"
