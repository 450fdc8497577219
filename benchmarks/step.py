"""`python -m benchmarks step`: the cost of a pair of training steps, ours against plain, drop-path and naive.

Times are those of a pair of steps (forward, backward, AdamW) on the same plans. "needed" counts FLOPs that no
implementation of the same work can leave out, as a ratio to plain training's FLOPs. "time / needed" is the time ratio
of a provider divided by that.

vit and resnet are our own networks. The others are timm's, and are converted for ours. With --drop-path, two steps of
ordinary drop-path at p = 0.4 are compared too: timm's, DINOv2's and ours without a scheme. On a GPU this is the
default.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from rich.console import Console
from rich.table import Table

from . import command, drop_path
from .cases import BF16, DTYPES, MODELS, MODES, PROBS, step_case
from .command import shown
from .drop_path import drop_path_case
from .harness import Row, Session, quotient
from .machine import Device
from .pairs import BranchFrozen, Exact, Naive
from .pass_tables import Columns

FULL_TURNS, FEW_TURNS = 12, 3
ABOVE_NEEDED = {"block": 1.08, "sample": 1.15}  # targets of the exact scheme on the ViT: time ratio / needed ratio
OF_NAIVE = {Exact.name: 0.75, BranchFrozen.name: 0.66}  # share of naive's time: ViT, block mode, p = 0.5
OF_PLAIN = {(Exact.name, 0.1): 0.84, (Exact.name, 0.3): 0.79, (Exact.name, 0.5): 0.73, (BranchFrozen.name, 0.3): 0.69}
"""Targets on GPUs relative to plain's time: ViT-B, block mode, batch 128, bf16."""

DROP_PATHS = NONE, EAGER, COMPILED = ("none", "eager", "compiled")
OURS_DROP_PATH = (drop_path.Ours.name, drop_path.OursCompiled.name)
OTHERS_DROP_PATH = (drop_path.Compiled.name, drop_path.CompiledSubset.name)

Probs = dict[str, tuple[float, ...]]
EVERY: Probs = dict.fromkeys(MODES, PROBS)
DEFAULTS: dict[str, dict[str, Probs]] = {
    "cpu": {"vit": EVERY, "resnet": EVERY, "vit-s": {"block": (0.3,), "sample": (0.3,)}},
    "cuda": {
        "vit": {"block": (0.3,), "sample": (0.3,)},
        "resnet": {"block": (0.3,)},
        "vit-s": {"block": (0.3,)},
        "vit-b": {"block": PROBS, "sample": (0.3,)},
        "convnext-t": {"block": (0.3,)},
        "swin-t": {"block": (0.3,)},
        "resnet-50": {"block": (0.3,)},
    },
    "quick": {"vit": {"block": (0.3,), "sample": (0.3,)}, "resnet": {"block": (0.3,)}},
    "tiny": {
        "vit": {"block": (0.5,), "sample": (0.5,)},
        "resnet": {"block": (0.5,), "sample": (0.5,)},
        "vit-s": {"sample": (0.5,)},
        "convnext-t": {"block": (0.5,)},
        "swin-t": {"block": (0.5,)},
        "resnet-50": {"block": (0.5,)},
    },
}
"""The models, modes and p's that are measured by default."""


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "step", help="a pair of training steps", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    default = "default: a choice for the device"
    parser.add_argument("--model", nargs="+", choices=MODELS, help=default)
    parser.add_argument("--mode", nargs="+", choices=MODES, help=default)
    parser.add_argument("--prob", nargs="+", type=probability, metavar="P", help=f"P(drop); {default}")
    parser.add_argument("--batch", type=command.count, help="images; default: each network's own")
    parser.add_argument("--dtype", choices=DTYPES, help="bf16 by autocast; default: bf16 on cuda, else float32")
    parser.add_argument(
        "--drop-path",
        choices=DROP_PATHS,
        help=f"drop-path too, on {' and '.join(drop_path.MODELS)}, eager or also compiled; "
        "default: compiled on cuda, on vit-b",
    )
    turns, quick = f"pairs of each provider; default: {FULL_TURNS}", f"half of the images, p = 0.3, {FEW_TURNS} turns"
    command.add_options(parser, turns, quick, f"tiny networks, p = 0.5, {FEW_TURNS} turns")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes. An interrupt keeps the rows so far."""
    if not command.has_device(options.device):
        return 2
    console = Console(width=command.WIDTH)
    turns = options.turns or (FULL_TURNS if options.size == "full" else FEW_TURNS)
    key = options.device if options.size == "full" else options.size
    choices = choices_of(key, options.model, options.mode, options.prob)
    autocast = DTYPES[options.dtype or ("bf16" if options.device == "cuda" else "float32")]
    size, device = options.size, Device.of(options.device)
    if autocast:
        device = replace(device, dtype=torch.bfloat16)
    further = drop_path_models(options.drop_path, options.device, dict.fromkeys(model for model, _, _ in choices))
    compiled = options.drop_path != EAGER
    makers = [command.one(step_case, size, *choice, turns, device, options.batch, autocast) for choice in choices]
    makers += [
        command.one(drop_path_case, size, model, turns, device, options.batch, autocast, compiled) for model in further
    ]
    rows, code = command.measured(
        console,
        makers,
        (len(choices) + len(further)) * turns,
        lambda on_round: Session(device, turns, on_round),
        options.size == "tiny",
        lambda rows: command.write_rows(options, rows),
    )
    if rows:
        verdicts = VERDICTS[options.device](rows) if options.size == "full" else []
        console.print(table_of(rows), *notes_of(rows), *verdicts, sep="\n")
    return code if command.written(options, rows) else 1


def choices_of(
    key: str,
    models: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    probs: Sequence[float] | None = None,
) -> list[tuple[str, str, float]]:
    """Yields model, mode and p of each case: the requested ones, else those of `DEFAULTS[key]`. Models and modes that
    are missing there use all values."""
    defaults, every = DEFAULTS[key], {"tiny": PROBS[-1:], "quick": PROBS[1:2]}.get(key, PROBS)
    choices = []
    for model in models or defaults:
        of_model = defaults.get(model, dict.fromkeys(MODES, every))
        for mode in modes or of_model:
            choices += [(model, mode, p) for p in probs or of_model.get(mode, every)]
    return choices


def drop_path_models(asked: str | None, device: str, models: Iterable[str]) -> list[str]:
    """Returns those of `models` that have a case of drop-path. On a CPU compiling takes minutes, so it must be
    requested there."""
    default = ("vit-b",) if device == "cuda" else ()
    wanted = {None: default, NONE: ()}.get(asked, drop_path.MODELS)
    return [model for model in models if model in wanted]


COLUMNS: Columns = {
    "p50 ms": ("p50_ms", ".1f"),
    "min ms": ("min_ms", ".1f"),
    "time": ("ratio_rounds", ".3f"),
    "needed": ("needed_ratio", ".3f"),
    "time / needed": ("above_needed", ".2f"),
    "% of peak": ("flop_share", ".0%"),
}


def table_of(rows: list[Row]) -> Table:
    title = "A pair of steps (forward, backward, AdamW); time and needed FLOPs as ratios to plain"
    return case_table(
        [row | {"above_needed": above_needed(row)} for row in rows], COLUMNS, title, _machine_line(rows[0])
    )


def case_table(
    rows: list[Row], columns: Columns, title: str, caption: str, labels: Sequence[str] = ("provider",)
) -> Table:
    """Returns a table with the providers of each case below each other. `labels` are keys of the text columns."""
    table = Table(title=title, caption=caption)
    for name in labels:
        table.add_column(name, no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right")
    for case, group in itertools.groupby(rows, case_of):
        table.add_section()
        table.add_row(f"[bold]{case}[/bold]")
        for row in group:
            first, *others = (row[key] for key in labels)
            table.add_row(f"  {first}", *others, *(shown(row[key], spec) for key, spec in columns.values()))
    return table


def notes_of(rows: list[Row]) -> Iterator[str]:
    """Yields why providers were not measured, each reason once."""
    missing = [row for row in rows if row["unavailable"]]
    for reason in dict.fromkeys(row["unavailable"] for row in missing):
        cases = dict.fromkeys(f"{row['model']} {row['mode']}" for row in missing if row["unavailable"] == reason)
        names = dict.fromkeys(row["provider"] for row in missing if row["unavailable"] == reason)
        yield f"– {', '.join(cases)}: no {', '.join(names)}: {reason}"


def cpu_verdicts(rows: list[Row]) -> Iterator[str]:
    """Yields the targets of our own ViT that `rows` allow to check, with the measured values."""
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


def gpu_verdicts(rows: list[Row]) -> Iterator[str]:
    """Yields the targets of timm's ViT-B in bf16 that measured rows allow to check."""
    asked = [row for row in rows if (row["model"], row["batch"], row["dtype"]) == ("vit-b", 128, BF16)]
    asked = [row for row in asked if row["ratio_rounds"] is not None]
    for row in asked:
        target = OF_PLAIN.get((row["provider"], row["p"]))
        if (row["work"], row["mode"]) == ("scheme", "block") and target is not None:
            what = f"{case_of(row)}: {row['provider']} takes {row['ratio_rounds']:.3f} of plain"
            yield f"{what}, {_verdict(row['ratio_rounds'], target)}"
    by_name = {row["provider"]: row for row in asked if row["work"] == "drop-path"}
    for name, other in itertools.product(OURS_DROP_PATH, OTHERS_DROP_PATH):
        if name in by_name and other in by_name:
            ratio = by_name[name]["ratio_rounds"] / by_name[other]["ratio_rounds"]
            yield f"{case_of(by_name[name])}: {name} takes {ratio:.3f} of {other}, {_verdict(ratio, 1.0)}"


VERDICTS = {"cpu": cpu_verdicts, "cuda": gpu_verdicts}


def above_needed(row: Row) -> float | None:
    """Returns time / needed FLOPs, both as ratios to plain."""
    return quotient(row["ratio_rounds"], row["needed_ratio"])


def case_of(row: Row) -> str:
    """Returns the name of a row's case. Rows of `memory` have no column `work`, as all are of the scheme."""
    case = f"{row['model']} {row['mode']} p={row['p']}"
    return f"{case} drop-path" if row.get("work") == "drop-path" else case


def _verdict(value: float, target: float) -> str:
    return f"target {target}: {'met' if value <= target else 'MISSED'}"


def _machine_line(row: Row) -> str:
    peaks = f"peak {row['ceiling_gflops']:.0f} GFLOP/s, {row['ceiling_gbs']:.0f} GB/s"
    return f"{command.machine_line(row)}, {peaks}"


def probability(text: str) -> float:
    """An argparse type."""
    wanted = f"must be a number between 0.01 and 0.99, got {text!r}"  # at smaller p hardly any plan drops
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(wanted) from None
    if not 0.01 <= value <= 0.99:
        raise argparse.ArgumentTypeError(wanted)
    return value
