"""`python -m benchmarks ops`: each op and its passes, ours against eager torch, compiled torch and other libraries.

The other libraries are xFormers, flash-attn, Liger, timm and torchvision, if they are installed and have such an op.
timm and torchvision draw their masks within the measured time.

GB/s count the bytes that the op needs, for every provider: each needed byte of the big tensors once. "of copy" is the
share of the bandwidth that a copy reaches in the same run. "bytes" is what a provider moves by its formula, as a ratio
to the needed bytes. "/eager" and "/compiled" are ratios of times. On a GPU all of these are from times of the device
alone (replays of a CUDA graph) if there are any.
"""

from __future__ import annotations

import argparse
import itertools
from collections import Counter
from collections.abc import Iterator
from functools import partial

from rich.console import Console
from rich.table import Table

from . import command
from .harness import Row, Session, quotient, scaled
from .machine import Device
from .op_cases import OPS, PASSES, op_cases, settings
from .op_goals import Goal, case_of, cpu_goals, goals
from .op_providers import EAGER
from .pass_tables import Columns, pass_tables
from .replay import device_time

FULL_TURNS, FEW_TURNS = 12, 3


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "ops", help="each op by itself", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--op", nargs="+", choices=OPS, default=list(OPS), metavar="OP", help=f"some of {', '.join(OPS)}"
    )
    parser.add_argument("--pass", nargs="+", choices=PASSES, default=PASSES, dest="passes", help="default: all")
    compiled = "leave out the formula compiled by torch, which takes longer to compile than everything else to run"
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help=compiled)
    turns = f"turns of each provider; default: {FULL_TURNS}"
    command.add_options(parser, turns, f"a few settings, {FEW_TURNS} turns", f"tiny tensors, {FEW_TURNS} turns")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, prints and writes. An interrupt keeps the rows so far."""
    if not command.has_device(options.device):
        return 2
    console = Console(width=command.WIDTH)
    turns = options.turns or (FULL_TURNS if options.size == "full" else FEW_TURNS)
    device, chosen = Device.of(options.device), settings(options.device, options.size, options.op)
    with device.work_stream():
        rows, code = command.measured(
            console,
            [partial(op_cases, setting, device, options.passes, compiled=options.compiled) for setting in chosen],
            len(chosen) * len(options.passes) * turns,
            lambda on_round: Session(
                device, turns, on_round, flops=False, more=lambda provider: device_time(device, provider, turns)
            ),
            options.size == "tiny",
            lambda rows: command.write_rows(options, compared(rows)),
        )
    rows = compared(rows)
    if rows:
        console.print(*tables_of(rows), command.machine_line(rows[0]), *notes_of(rows), sep="\n")
        if options.size == "full":
            reached = goals(rows) if options.device == "cuda" else cpu_goals(rows)
            console.print(*verdicts_of(reached), sep="\n")
    return code if command.written(options, rows) else 1


def compared(rows: list[Row]) -> list[Row]:
    """Returns rows with GB/s and ratios to the comparators of the same case, without the FLOP columns."""
    result = []
    for _, group in itertools.groupby(rows, case_of):
        case = [_filled(row) for row in group]
        eager, compiled = (next((row for row in case if is_it(row)), None) for is_it in (_is_eager, _is_compiled))
        for row in case:
            rate = quotient(scaled(row["needed_gb"] or None, 1e3), _milliseconds(row))
            result.append(
                row
                | {
                    "gbs": rate,
                    "copy_share": quotient(rate, row["ceiling_gbs"]),
                    "to_eager": _time_ratio(row, eager),
                    "to_compiled": _time_ratio(row, compiled),
                    "bytes_ratio": quotient(row["moved_gb"], row["needed_gb"]),
                }
            )
    return result


def _filled(row: Row) -> Row:
    """Gives every row the same columns, including rows that couldn't be measured."""
    row = row | {key: row.get(key, nothing) for key, nothing in _MEASURED_HERE.items()}
    return {key: value for key, value in row.items() if "flop" not in key and key not in _OF_STEPS}


_MEASURED_HERE = {"moved_gb": None, "device_ms": None, "no_device_ms": ""}
_OF_STEPS = ("needed_ratio", "counted_ratio", "byte_share")


def _is_eager(row: Row) -> bool:
    return row["provider"] == EAGER


def _is_compiled(row: Row) -> bool:
    return row["provider"].startswith(("compiled", "torch.compile"))


def _milliseconds(row: Row) -> float | None:
    return row["p50_ms"] if row["device_ms"] is None else row["device_ms"]


def _time_ratio(row: Row, other: Row | None) -> float | None:
    """Returns the ratio of device times if both rows have them, else of `ratio_rounds`."""
    if other is None:
        return None
    ratio = quotient(row["device_ms"], other["device_ms"])
    return quotient(row["ratio_rounds"], other["ratio_rounds"]) if ratio is None else ratio


COLUMNS: Columns = {
    "p50 ms": ("p50_ms", ".3f"),
    "device ms": ("device_ms", ".4f"),
    "GB/s": ("gbs", ".1f"),
    "of copy": ("copy_share", ".0%"),
    "/eager": ("to_eager", ".2f"),
    "/compiled": ("to_compiled", ".2f"),
    "bytes": ("bytes_ratio", ".2f"),
}


def tables_of(rows: list[Row]) -> Iterator[Table]:
    """Leaves out the column of device times if no row has one."""
    columns = {name: how for name, how in COLUMNS.items() if name != "device ms" or any(row[how[0]] for row in rows)}
    return pass_tables(rows, columns)


def notes_of(rows: list[Row]) -> Iterator[str]:
    """Yields the ceiling, and why providers were not measured or have no device time, each reason once."""
    yield f"a copy of more than the cache holds: {rows[0]['ceiling_gbs']:.1f} GB/s"
    for column, what in (("unavailable", "no"), ("no_device_ms", "no device time of")):
        reasons = Counter((row["provider"], row[column]) for row in rows if row[column])
        for (provider, reason), count in reasons.items():
            yield f"– {what} {provider} in {count} cases: {reason}"


def verdicts_of(reached: list[Goal]) -> Iterator[str]:
    """Yields each goal with the number of rows that meet it, and the rows that don't."""
    for goal, group in itertools.groupby(sorted(reached, key=lambda goal: goal.goal), lambda goal: goal.goal):
        all_of_it = list(group)
        missed = [each for each in all_of_it if not each.met]
        yield f"{goal}: {'met' if not missed else 'MISSED'}, {len(all_of_it) - len(missed)} of {len(all_of_it)}"
        for each in missed:
            yield f"  {'not measured' if each.measured is None else f'{each.measured:.2f}'}  {each.where}"
