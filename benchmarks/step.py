"""`python -m benchmarks step`: what a pair of training steps costs, ours against plain, drop-path and naive.

Times are of a pair of steps (forward, backward, AdamW) on the same plans. "needed" counts FLOPs that no implementation
of the same work can leave out, as a ratio to plain training's; "time / needed" is how far above that a provider is.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from . import command
from .cases import MODELS, MODES, PROBS, step_case
from .command import shown
from .harness import Row, Session, quotient
from .machine import Device
from .pairs import BranchFrozen, Exact, Naive

FULL_TURNS, QUICK_TURNS = 12, 3
ABOVE_NEEDED = {"block": 1.08, "sample": 1.15}  # target of the exact scheme on the ViT: time ratio / needed ratio
OF_NAIVE = {Exact.name: 0.75, BranchFrozen.name: 0.66}  # of the naive pair's time: ViT, block mode, p = 0.5


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "step", help="a pair of training steps", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=MODELS, default=MODELS, help=f"default: {' '.join(MODELS)}")
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help=f"default: {' '.join(MODES)}")
    parser.add_argument("--prob", nargs="+", type=probability, metavar="P", help="of dropping; default: 0.1 0.3 0.5")
    parser.add_argument("--batch", type=command.count, help="images; default: each network's own")
    turns, quick = f"pairs of each provider; default: {FULL_TURNS}", f"tiny networks, p = 0.5, {QUICK_TURNS} turns"
    command.add_options(parser, turns, f"{quick}: does it run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes. An interrupt ends it with what there is so far."""
    if not command.has_device(options.device):
        return 2
    console = Console(width=command.WIDTH)
    probs = options.prob or (PROBS[-1:] if options.quick else PROBS)
    turns = options.turns or (QUICK_TURNS if options.quick else FULL_TURNS)
    choices = list(itertools.product(options.model, options.mode, probs))
    size, device = "quick" if options.quick else "full", Device.of(options.device)
    cases = (step_case(size, *choice, turns, device, options.batch) for choice in choices)
    rows, code = command.measured(
        console, cases, len(choices) * turns, lambda on_round: Session(device, turns, on_round), options.quick
    )
    if rows:
        console.print(table_of(rows), *notes_of(rows), *([] if options.quick else verdicts_of(rows)), sep="\n")
    return code if command.written(options, rows) else 1


COLUMNS: dict[str, tuple[str, str]] = {
    "p50 ms": ("p50_ms", ".1f"),
    "min ms": ("min_ms", ".1f"),
    "time": ("ratio_rounds", ".3f"),
    "needed": ("needed_ratio", ".3f"),
    "time / needed": ("above_needed", ".2f"),
    "% of peak": ("flop_share", ".0%"),
}


def table_of(rows: list[Row]) -> Table:
    table = Table(
        title="A pair of steps (forward, backward, AdamW); time and needed FLOPs as ratios to plain",
        caption=_machine_line(rows[0]),
    )
    table.add_column("provider", no_wrap=True)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for case, group in itertools.groupby(rows, case_of):
        table.add_section()
        table.add_row(f"[bold]{case}[/bold]")
        for row in group:
            values = row | {"above_needed": above_needed(row)}
            cells = (shown(values[key], spec) for key, spec in COLUMNS.values())
            table.add_row(f"  {row['provider']}", *cells)
    return table


def notes_of(rows: list[Row]) -> Iterator[str]:
    """Why providers were not measured, each reason once."""
    missing = [row for row in rows if row["unavailable"]]
    for reason in dict.fromkeys(row["unavailable"] for row in missing):
        cases = dict.fromkeys(f"{row['model']} {row['mode']}" for row in missing if row["unavailable"] == reason)
        names = dict.fromkeys(row["provider"] for row in missing if row["unavailable"] == reason)
        yield f"– {', '.join(cases)}: no {', '.join(names)}: {reason}"


def verdicts_of(rows: list[Row]) -> Iterator[str]:
    """The targets, of the rows that are there, with what was measured."""
    vit = {(row["mode"], row["p"], row["provider"]): row for row in rows if row["model"] == "vit"}
    for (mode, p, provider), row in vit.items():
        if provider == Exact.name:
            above, target = above_needed(row), ABOVE_NEEDED[mode]
            yield f"vit {mode} p={p}: {provider} takes {above:.3f} × its needed FLOPs, {_verdict(above, target)}"
    for provider, target in OF_NAIVE.items():
        row, naive = (vit.get(("block", 0.5, name)) for name in (provider, Naive.name))
        if row and naive:
            rounds, low = (row[key] / naive[key] for key in ("ratio_rounds", "min_ms"))
            what = f"vit block p=0.5: {provider} takes {rounds:.3f} (min {low:.3f}) of naive"
            yield f"{what}, {_verdict(max(rounds, low), target)}"


def above_needed(row: Row) -> float | None:
    """Time over needed FLOPs, both as ratios to plain."""
    return quotient(row["ratio_rounds"], row["needed_ratio"])


def case_of(row: Row) -> str:
    return f"{row['model']} {row['mode']} p={row['p']}"


def _verdict(value: float, target: float) -> str:
    return f"target {target}: {'met' if value <= target else 'MISSED'}"


def _machine_line(row: Row) -> str:
    peaks = f"peak {row['ceiling_gflops']:.0f} GFLOP/s, {row['ceiling_gbs']:.0f} GB/s"
    return f"{command.machine_line(row)}, {peaks}"


def probability(text: str) -> float:
    """An argparse type."""
    wanted = f"must be a number between 0.01 and 0.99, got {text!r}"  # so rare a drop would never give enough plans
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(wanted) from None
    if not 0.01 <= value <= 0.99:
        raise argparse.ArgumentTypeError(wanted)
    return value
