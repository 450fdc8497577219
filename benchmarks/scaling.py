"""`python -m benchmarks scaling`: what the plan and our Python cost, by the number of paths, and as a share of a step.

Host time of a pair of iterations, forward and backward, on a network whose branches do next to nothing: "plain" runs
`x + f(x)` twice, "by hand" the two iterations with every decision made beforehand, "plan" draws, opens and closes them
without a path being called, "ours" does all of it. The overhead is ours beyond the faster of the first two; "calls" are
the function calls of a pair, Python's and C's, and the same in every run. One thread; every path drops with p = 0.3.

The second table sets the overhead of as many paths against a pair of plain training steps of real networks. All times
are those of the fastest turns: what the host does is the same in each, and whatever else the machine does adds to it.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.models import ViT

from . import command, library_models
from .cases import MODES, SEED, Config, own
from .command import shown
from .harness import Case, Check, Provider, Row, Session, quotient
from .library_models import library
from .machine import Device
from .overhead import HostDevice
from .pairs import Exact, Plain
from .textbook import largest_difference, state_after

PATHS = {"full": (12, 24, 48, 100, 300, 1000), "quick": (24, 100), "tiny": (8, 16)}
DROP_PROB, BATCH, WIDTH = 0.3, 10, 2  # in sample mode every path is mixed: 7 of 10 rows are kept
FULL_TURNS, FEW_TURNS, STEP_TURNS = 12, 3, 2
BOUND = 1e-10
PLAIN, BY_HAND, PLAN, OURS = Plain.name, "by hand", "plan", Exact.name
MOST_OF_A_STEP, MOST_GROWTH = 0.01, 1.5
"""The goals: of a step of ViT-S at batch 32; of the time per path at 1,000 paths to that at 100."""


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
    """Measures, prints and writes. An interrupt ends it with what there is so far."""
    if not command.has_device(options.device):
        return 2
    console, kind = Console(width=command.WIDTH), options.device
    counts = sorted(options.paths or PATHS[options.size])
    turns = options.turns or (FULL_TURNS if options.size == "full" else FEW_TURNS)
    cases = (path_case(mode, count, turns, kind) for mode in options.mode for count in counts)
    host = HostDevice.of(kind)
    rows, code = command.measured(
        console, cases, len(options.mode) * len(counts) * turns,
        lambda on_round: Session(host, turns, on_round, flops=False, more=calls_of), one_threaded=True,
    )  # fmt: skip
    if code != 130:
        networks = [n for n in NETWORKS[options.size] if n.paths in counts]
        steps, device = min(turns, STEP_TURNS), StepDevice.of(kind)
        others, step_code = command.measured(
            console, (step_case(network, device.device) for network in networks), len(networks) * steps,
            lambda on_round: Session(device, steps, on_round, flops=False), options.size == "tiny",
        )  # fmt: skip
        rows, code = rows + others, step_code or code
    rows = shares_of(rows)
    if rows:
        console.print(path_table(rows), step_table(rows), command.machine_line(rows[0]), sep="\n")
        if options.size == "full":
            console.print(*verdicts_of(rows), sep="\n")
    return code if command.written(options, rows) else 1


# A network of paths that do next to nothing


class Tiny(nn.Module):
    """`x · weight`: one op each way, and a weight that can learn; with as many modules as an MLP and its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(nn.Identity() for _ in range(3))
        self.weight = nn.Parameter(torch.full((WIDTH,), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def constant(self, x: Tensor) -> Tensor:
        return x * self.weight.detach()


def tiny_paths(count: int) -> rdp.ResidualSequence:
    return rdp.ResidualSequence(*(rdp.ResidualBranch(Tiny()) for _ in range(count)))


@dataclass(frozen=True)
class ByHand:
    """The iterations of one plan as one would write them for it alone: what each path does is known beforehand."""

    x: Tensor
    branches: list[Tiny]
    keep: list[Tensor | bool]
    """For each path whether it is kept or, where some rows are, the rows that are and those that aren't."""

    @classmethod
    def of(cls, paths: rdp.ResidualSequence, x: Tensor, plan: rdp.PathPlan) -> ByHand:
        kept = [_rows(keep, x.device) if keep.dim() else bool(keep) for keep in plan.keep]
        return cls(x, [path.fn for path in paths], kept)

    def pair(self) -> Iterator[None]:
        x, scale = self.x, 1 / (1 - DROP_PROB)
        for branch, keep in zip(self.branches, self.keep, strict=True):
            if keep is True:
                x = torch.add(x, branch(x), alpha=scale)
            elif keep is not False:
                x = x.index_add(0, keep[0], branch(x.index_select(0, keep[0])), alpha=scale)
        x.sum().backward()
        yield
        x = self.x
        for branch, keep in zip(self.branches, self.keep, strict=True):
            if isinstance(keep, bool):
                x = x + (branch.constant(x) if keep else branch(x))
            else:
                frozen, learning = (x.index_select(0, rows) for rows in keep)
                x = x.index_add(0, keep[0], branch.constant(frozen)).index_add(0, keep[1], branch(learning))
        x.sum().backward()
        yield


def _rows(keep: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return keep.nonzero().flatten().to(device), (~keep).nonzero().flatten().to(device)


class Ways:
    """The ways to run a pair on `count` paths, each on a network of its own."""

    def __init__(self, mode: str, count: int, turns: int, device: torch.device, dtype: torch.dtype = torch.float32):
        generator = torch.Generator().manual_seed(SEED)
        self.x = torch.randn(BATCH, WIDTH, generator=generator, dtype=dtype).to(device)
        self.plain_paths, self.paths = (tiny_paths(count).to(device, dtype) for _ in range(2))
        self.scheme, twin = (
            rdp.ResidualDropPath(paths, DROP_PROB, mode=mode, sampling="fixed", seed=SEED)
            for paths in (self.paths, tiny_paths(count))
        )
        self.plans = []
        for _ in range(turns):
            with twin.drop_iteration(BATCH) as plan:
                self.plans.append(plan)
        self._by_hand = [ByHand.of(self.plain_paths, self.x, plan) for plan in self.plans]

    def plain(self) -> Iterator[None]:
        for _ in range(2):
            x = self.x
            for path in self.plain_paths:
                x = x + path.fn(x)
            x.sum().backward()
            yield

    def by_hand(self, turn: int) -> Iterator[None]:
        return self._by_hand[turn % len(self.plans)].pair()

    def ours(self, plan: rdp.PathPlan | None = None) -> Iterator[None]:
        """Of a plan that is drawn, unless it is given."""
        for _ in self.scheme.iterations(BATCH, plan=plan):
            self.paths(self.x).sum().backward()
            yield

    def verify(self, name: str) -> Check:
        """The gradients after each backward: by hand as ours, and plain as an inference."""
        plan = self.plans[0]
        if name == PLAIN:
            wanted, got = state_after(self.paths.eval(), self._inferred()), state_after(self.plain_paths, self.plain())
            self.paths.train()
        elif name == PLAN:
            return Check(0.0 if list(self.scheme.iterations(BATCH)) == ["drop", "reuse"] else math.inf, BOUND)
        else:
            wanted = state_after(self.plain_paths, self.by_hand(0))
            got = state_after(self.paths, self.ours(plan))
        return Check(largest_difference(wanted, got), BOUND)

    def _inferred(self) -> Iterator[None]:
        for _ in range(2):
            self.paths(self.x).sum().backward()
            yield


def path_case(mode: str, count: int, turns: int, kind: str) -> Case:
    """A turn is a pair of iterations on `count` paths."""
    device = torch.device(kind)
    ways = Ways(mode, count, turns, device)
    runs: dict[str, Callable[[int], Iterable[object]]] = {
        PLAIN: lambda turn: ways.plain(),
        BY_HAND: ways.by_hand,
        PLAN: lambda turn: ways.scheme.iterations(BATCH),
        OURS: lambda turn: ways.ours(),
    }

    def provider(name: str) -> Provider:
        def run(turn: int) -> None:
            for _ in runs[name](turn):
                for path in ways.paths if name in (OURS, PLAN) else ways.plain_paths:
                    path.fn.weight.grad = None

        return Provider(name, run, verify=lambda: Ways(mode, count, 1, device, torch.float64).verify(name))

    labels = {"network": "tiny", "depth": None, "width": WIDTH, "batch": BATCH, "paths": count, "mode": mode}
    return Case(labels, "pair of iterations", PLAIN, [provider(name) for name in runs])


def calls_of(provider: Provider) -> Row:
    """How many functions a turn calls."""
    return {"calls": count_calls(lambda: provider.run(0))}


def count_calls(run: Callable[[], object]) -> int:
    """Function calls of `run()`, Python's and those from Python to C."""
    count = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.disable()  # what it finalises would count too
    sys.setprofile(called)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count


# Real networks


class StepDevice(Device):
    """On which nothing is about bandwidth."""

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
    """Those of `step`, on 64 tokens."""
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


# What is made of it

_LEFT_OUT = ("flop", "_gb", "_share", "needed", "counted", "ratio")


def shares_of(rows: list[Row]) -> list[Row]:
    """With the overhead of ours, and a row for each real network and mode with its share of a pair of steps."""
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
    table = Table(title="Host time of a pair of iterations on paths that do next to nothing, in ms")
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
    """The goals, of the rows that are there, with what was measured."""
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
