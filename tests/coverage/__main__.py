"""`python -m tests.coverage [LIBRARY …]`: converts a small model for every block class of the libraries and checks that
it computes what the original does. Exits with 1 if a goal is missed or a check fails."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from examples.libraries import LIBRARIES, installed

from .markdown import render
from .models import cases
from .rows import OUTCOMES, Row, groups, measure_group, read, summary, write

GOALS = {"timm": 112, "torchvision": 7, "transformers": 41}
"""Classes with a drop-path that must be converted fully."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.coverage", description=__doc__)
    parser.add_argument("libraries", nargs="*", metavar="LIBRARY", help=f"of {', '.join(LIBRARIES)} (all)")
    parser.add_argument("-k", metavar="SUBSTRING", default="", help="only cases whose id has it: timm.swin")
    parser.add_argument("--csv", type=Path, help="where to write what was found")
    parser.add_argument("--markdown", type=Path, help="where to write it for readers")
    parser.add_argument("--no-run", action="store_true", help="take what --csv holds, and write --markdown anew")
    options = parser.parse_args(arguments)
    if options.no_run:
        options.markdown.write_text(render(read(options.csv)), encoding="utf-8")
        return 0
    wrong = set(options.libraries) - set(LIBRARIES)
    if wrong:
        parser.error(f"no such library: {', '.join(sorted(wrong))}")
    torch.set_num_threads(1)
    rows: list[Row] = []
    for library in options.libraries or LIBRARIES:
        if not installed(library):
            print(f"{library} is not installed", file=sys.stderr)
            return 1
        for group in groups(case for case in cases(library) if options.k in case.id):
            start = time.perf_counter()
            rows += measure_group(group)
            for row in rows[-len(group) :]:
                print(f"{time.perf_counter() - start:6.1f} s  {row.id}: {row.outcome} {row.failures}", file=sys.stderr)
    if not rows:
        print(f"no case has {options.k!r} in its id", file=sys.stderr)
        return 1
    if options.csv:
        write(rows, options.csv)
    if options.markdown:
        options.markdown.write_text(render(rows), encoding="utf-8")
    _print_summary(rows)
    return _verdict(rows, whole=not options.k)


def _print_summary(rows: list[Row]) -> None:
    lines = [(name, sum(counts.values()), *counts.values()) for name, counts in summary(rows)]
    header = ("library", "classes", *OUTCOMES)
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in (header, *lines):
            print("  ".join(f"{cell!s:>10}" for cell in line))
        return
    table = Table(*header)
    for line in lines:
        table.add_row(*map(str, line))
    Console().print(table)


def _verdict(rows: list[Row], whole: bool) -> int:
    failed = [row for row in rows if row.outcome == "failed"]
    for row in failed:
        print(f"failed: {row.id}: {row.failures}")
    missed = False
    for name, counts in summary(rows):
        goal = GOALS.get(name, sum(counts.values()))  # without a drop-path: all
        if whole and counts["fully"] < goal:
            print(f"{name}: {counts['fully']} classes fully, {goal} are wanted")
            missed = True
    return 1 if failed or missed else 0


if __name__ == "__main__":
    sys.exit(main())
