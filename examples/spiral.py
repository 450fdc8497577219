"""Trains small residual networks on two spirals, many seeds at once, and redraws the four figures of arXiv 2411.09475:

    python examples/spiral.py                        # six methods, 12 seeds, depth 32 and depth 6: about 2 minutes
    python examples/spiral.py --drop-prob 0.5 --seeds 24
    python examples/spiral.py --study --out report/spiral-study     # every setting of docs/evidence.md: about an hour
    python examples/spiral.py --study --resume --out report/spiral-study

The methods of a setting start from the same weights and see the same points. Each network has its own points.
`results.csv` in the folder of the run has a row for each method, setting and seed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

from benchmarks.machine import Device, facts
from examples.digits.storage import Folder, StorageError
from examples.intervals import Estimate
from examples.methods import PLAIN
from examples.spirals.study import BASE, Case, demonstration, run_all, study
from examples.spirals.training import Setting

RESULTS = "results.csv"
QUICK = {"depth": 8, "width": 16, "points": 60, "steps": 40}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, text: str, **kwargs: Any) -> None:
        value = getattr(BASE, name.replace("-", "_"))
        parser.add_argument(f"--{name}", help=f"{text} (default: {value})", default=value, **kwargs)

    add("depth", "paths of a network", type=int)
    add("width", "width of the residual", type=int)
    add("layers", "layers of a branch", type=int, choices=(1, 2))
    add("points", "points of the training set", type=int)
    add("noise", "standard deviation of a point's coordinates", type=float)
    add("drop-prob", "P(drop) of every path", type=float)
    add("mode", "drop for a network's whole batch or per sample", choices=("block", "sample"))
    add("schedule", "change of P(drop) over depth", choices=("constant", "linear"))
    add("learning-rate", "Adam's first learning rate; it follows a cosine to 0", type=float)
    add("steps", "optimizer steps of plain training", type=int)
    add("equal", "quantity that is equal for all methods", choices=("steps", "flops", "updates"))
    parser.add_argument("--seeds", type=int, default=12, help="number of networks of each kind (default: 12)")
    parser.add_argument("--first-seed", type=int, default=0, help="the lowest seed (default: 0)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: number of CPUs)")
    parser.add_argument("--study", action="store_true", help="all settings of docs/evidence.md, without figures")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these settings of the study")
    parser.add_argument("--quick", action="store_true", help="tiny networks and a few steps, to see that it runs")
    parser.add_argument("--out", type=Path, help="folder of the run (default: report/spiral)")
    parser.add_argument("--resume", action="store_true", help="keep existing results, and run the missing ones")
    parser.add_argument("--overwrite", action="store_true", help="start again even if there are results")
    return parser


LOWEST = {"depth": 1, "width": 1, "points": 4, "steps": 1, "seeds": 1, "first_seed": 0, "workers": 1}


def main(argv: Sequence[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    for name, low in LOWEST.items():
        if getattr(args, name) < low:
            parser.error(f"argument --{name.replace('_', '-')}: must be at least {low}, got {getattr(args, name)}")
    if not 0 <= args.drop_prob <= 1:
        parser.error(f"argument --drop-prob: must be in [0, 1], got {args.drop_prob}")
    if args.only and not args.study:
        parser.error("argument --only: needs --study")
    setting = replace(BASE, **{f.name: getattr(args, f.name) for f in fields(Setting) if hasattr(args, f.name)})
    cases = study(setting) if args.study else demonstration(setting)
    if args.only:
        names = dict.fromkeys(case.study for case in cases)
        if unknown := [name for name in args.only if name not in names]:
            parser.error(f"argument --only: no setting is called {unknown[0]!r}; there are: {', '.join(names)}")
        cases = [case for case in cases if case.study in args.only]
    seeds = list(range(args.first_seed, args.first_seed + args.seeds))
    folder = Folder(args.out or Path("report") / "spiral", mark=RESULTS)
    try:
        folder.prepare()
        rows = read_rows(folder)
        if rows and not (args.resume or args.overwrite):
            parser.error(f"argument --out: {folder.path} holds results: give --resume, --overwrite or another --out")
        rows = [] if args.overwrite else rows
        return run(cases, seeds, args.workers, folder, rows, figures=not args.study)
    except StorageError as error:
        print(f"spiral.py: error: argument --out: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; finished cases are in {folder.path}: continue with --resume", file=sys.stderr)
        return 130


def run(
    cases: list[Case], seeds: list[int], workers: int, folder: Folder, rows: list[dict[str, Any]], figures: bool
) -> int:
    """Runs the cases that are missing in `rows`, writes all files and prints a table."""
    done = {(*_key(row), int(row["seed"])) for row in rows}
    console, machine = Console(), facts(Device.of("cpu")) | {"threads": 1}
    missing = [case for case in cases if not all((*_key(_texts(case)), seed) in done for seed in seeds)]
    portraits = {}
    with bars(console, missing) as watch:
        for case, (new, portrait) in run_all(missing, seeds, workers, watch):
            rows = [row for row in rows if (*_key(row), int(row["seed"])) not in {(*_key(new[0]), s) for s in seeds}]
            rows += [{**machine, **_as_text(row)} for row in new]
            folder.write(RESULTS, _csv(rows))
            portraits[case] = portrait
    if portraits and figures:
        from examples.spirals.figures import draw_all

        for name, image in draw_all(portraits).items():
            folder.write(name, image)
    console.print(results_table(rows, cases, len(seeds)))
    console.print(f"Results: {folder.path}", highlight=False, soft_wrap=True)
    return 0


@contextlib.contextmanager
def bars(console: Console, cases: list[Case]) -> Iterator[Any]:
    """Shows a bar for the whole run, and one for each running case."""
    columns = (BarColumn(bar_width=10), TimeRemainingColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, refresh_per_second=2) as progress:
        overall = progress.add_task("all", total=100 * len(cases))
        tasks = [progress.add_task(case.label, total=100, visible=False) for case in cases]

        def watch(shares: list[float]) -> None:
            progress.update(overall, completed=round(100 * sum(shares)))
            for task, share in zip(tasks, shares, strict=True):
                progress.update(task, completed=round(100 * share), visible=0 < share < 1)

        yield watch


def results_table(rows: list[dict[str, Any]], cases: list[Case], seeds: int) -> Table:
    table = Table(
        title="Two spirals",
        caption=f"Mean ± 95 % interval over {seeds} seeds, in %. FLOPs: of a step, as a ratio to plain training. "
        "- plain: difference of the accuracies, seed by seed. Removed: without a quarter of the paths, random ones.",
        caption_justify="left",
    )
    for heading in ("setting", "method", "FLOPs", "accuracy", "- plain", "removed", "rebound"):
        table.add_column(heading, justify="left" if heading in ("setting", "method") else "right")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(_key(row), []).append(row)
    plain: dict[str, list[float]] = {}
    for case in cases:
        group = sorted(groups.get(_key(_texts(case)), []), key=lambda row: int(row["seed"]))
        if not group:
            continue
        values = {k: [float(row[k]) for row in group] for k in ("accuracy", "accuracy_without_quarter", "rebound")}
        if case.method == PLAIN:
            plain[case.study] = values["accuracy"]
        base = plain.get(case.study)
        against = Estimate.of_difference(values["accuracy"], base).percent() if base and case.method != PLAIN else "–"
        cells = [Estimate.of(values["accuracy"]).percent(), against]
        cells += [Estimate.of(values["accuracy_without_quarter"]).percent(), Estimate.of(values["rebound"]).text()]
        table.add_row(case.study, case.method, f"{float(group[0]['needed_ratio']):.2f}", *cells)
    return table


# Rows of results.csv


def read_rows(folder: Folder) -> list[dict[str, Any]]:
    path = folder.path / RESULTS
    if not path.exists():
        return []
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))


def _csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _as_text(row: dict[str, Any]) -> dict[str, str]:
    return {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in row.items()}


def _texts(case: Case) -> dict[str, str]:
    return _as_text({"study": case.study, **asdict(case.setting), "method": case.method})


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    """Returns the values that identify a row's case, without its seed."""
    return tuple(_as_text({k: row[k] for k in ("study", *(f.name for f in fields(Setting)), "method")}).values())


if __name__ == "__main__":
    sys.exit(main())
