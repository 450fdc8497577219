"""`python -m benchmarks.gpu.shares FILE`: the expected share of a copy's bandwidth beside the measured one.

FILE is the CSV of `python -m benchmarks ops`. It gets a column with the expected share of each pass of ours. The
kernels of these calls are in Triton's cache, so that only their code is read.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .. import expected
from ..command import shown
from ..harness import Row
from ..op_cases import settings
from ..op_kinds import Setting
from ..op_providers import OURS
from ..output import read_csv, write_csv

LABELS = tuple(Setting("", (), None).labels)
Key = tuple[str, ...]
"""A setting's labels as text, and the pass."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.shares", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="the first setting of --tiny, to see that it runs")
    options = parser.parse_args(arguments)
    rows = read_csv(options.file)
    ours = [row for row in rows if row["provider"] == OURS]
    if options.tiny:
        chosen = settings("cuda", "tiny")[:1]
    else:
        measured = {labels_of(row) for row in ours if row["copy_share"]}
        chosen = [setting for setting in settings("cuda") if labels_of(setting.labels) in measured]
    launches = expected.expected_rows(chosen) if chosen else []
    if not launches:
        print(expected.UNKNOWN if chosen else "no share of ours was measured")
        return 0
    shares = shares_of_passes(launches)
    for row in rows:
        row["expected_share"] = ""
    for row in ours:
        if share := shares.get((*labels_of(row), row["pass"])):
            row["expected_share"] = f"{share:.3f}"
    write_csv(options.file, rows)
    print(*lines_of(ours), sep="\n")
    return 0


def shares_of_passes(launches: list[Row]) -> dict[Key, float]:
    """Returns the expected share of each pass. Its launches come one after the other, each for the bytes of its large
    tensors."""
    passes: dict[Key, list[Row]] = {}
    for row in launches:
        for direction in (row["pass"], "both"):
            passes.setdefault((*labels_of(row), direction), []).append(row)
    return {
        key: sum(row["bytes"] for row in found) / sum(row["bytes"] / row["expected_share"] for row in found)
        for key, found in passes.items()
    }


def lines_of(rows: list[Row]) -> Iterator[str]:
    """Yields a line for each pass that has an expected share, and what all of them amount to."""
    ratios = []
    for row in rows:
        if row["expected_share"]:
            measured, share = (float(row[key]) if row[key] else None for key in ("copy_share", "expected_share"))
            call = f"{row['op']} {row['shape']} {row['dtype']}, {row['kept'] or 'all'} kept, {row['pass']}"
            yield f"{call}: {shown(measured, '.0%')} of a copy measured, {share:.0%} expected"
            ratios += [] if measured is None else [measured / share]
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else "–"
    yield f"measured / expected share of a copy: {spread}"


def labels_of(row: dict[str, Any]) -> Key:
    return tuple("" if row[name] is None else str(row[name]) for name in LABELS)


if __name__ == "__main__":
    sys.exit(main())
