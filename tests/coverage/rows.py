"""The outcome for each block class: a row of `docs/models.csv`."""

from __future__ import annotations

import csv
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from torch import nn

from .found import Measured
from .measure import measure, quiet
from .models import DROP_PROB, Call, Case

ROWS = 4
"""Samples in training; the model is converted with other numbers of samples."""
OUTCOMES = ("fully", "in part", "refused", "failed")


@dataclass
class Row:
    library: str
    block_class: str
    drop_path: str
    """"yes", or "no": the model has none, and `convert(model, drop_prob=…)` was called."""
    model: str
    outcome: str
    """Of OUTCOMES: all drop-paths that the class calls are converted or nested, some, none; or a check failed."""
    blocks: int
    converted: int
    nested: int
    refused: int
    skips: str
    reasons: str
    batch_norm: str
    foreign_rows: str
    precision: str
    error: str
    failures: str
    not_measured: str
    versions: str

    @property
    def id(self) -> str:
        """The case's id."""
        *_, file, name = self.block_class.split(".")
        return f"{self.library}.{file.removeprefix('modeling_')}.{name}{'-plain' if self.drop_path == 'no' else ''}"


def groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases that share a model."""
    found: dict[int, list[Case]] = {}
    for case in cases:
        found.setdefault(id(case.build), []).append(case)
    return list(found.values())


def measure_group(cases: list[Case]) -> list[Row]:
    """Makes the model of `cases`, measures it once, and returns the row of each class."""
    case = cases[0]
    with quiet():
        model, example = case.make()
        blocks = {case.id: dict(case.blocks(model)) for case in cases}
        measured = measure(model, example, case.example_inputs(ROWS), None if case.drop_path else DROP_PROB)
    return [row_of(case, measured, blocks[case.id]) for case in cases]


def row_of(case: Case, measured: Measured, blocks: dict[str, nn.Module]) -> Row:
    """`blocks`: the instances of the class, by name."""
    paths = [path for path in measured.report if path.block in blocks]
    converted = [path for path in paths if path.refused is None and path.nested is None]
    nested = [path for path in paths if path.nested is not None]
    refused = [path for path in paths if path.refused is not None]
    outcome = "in part" if refused else "fully"
    if not converted and not nested:
        outcome = "refused"
    skips = {f"{path.name}: {', '.join(path.modules) or 'its branch'}": None for path in converted}
    skips |= {f"{path.name}: masks on inside of another branch": None for path in nested}
    reasons = {f"{path.name}: {path.refused}": None for path in refused}
    return Row(
        library=case.library,
        block_class=case.block_class,
        drop_path="yes" if case.drop_path else "no",
        model=name_of(case.build),
        outcome="failed" if measured.failures else outcome,
        blocks=len(blocks),
        converted=len(converted),
        nested=len(nested),
        refused=len(refused),
        skips="; ".join(skips),
        reasons="; ".join(reasons) or ("" if paths else "no drop-path of it is called"),
        batch_norm="yes" if any(path.whole_in_sample_mode for path in converted) else "",
        foreign_rows="yes" if any(path.foreign_rows for path in converted) else "",
        precision=measured.precision,
        error=f"{measured.error:.0e}",
        failures="; ".join(f"{name}: {text}" for name, text in measured.failures.items()),
        not_measured="; ".join(measured.notes),
        versions=", ".join(f"{name} {importlib.metadata.version(name)}" for name in (case.library, "torch")),
    )


def name_of(build: Call) -> str:
    """A model's name in timm, or its class."""
    return str(build.args[0]) if build.target == "timm.create_model" else build.target.rpartition(".")[2]


def summary(rows: Iterable[Row]) -> Iterator[tuple[str, dict[str, int]]]:
    """For each library, and for its models without a drop-path, the number of classes by outcome."""
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        name = row.library if row.drop_path == "yes" else f"{row.library}, without drop-path"
        counts.setdefault(name, dict.fromkeys(OUTCOMES, 0))[row.outcome] += 1
    yield from counts.items()


def write(rows: Iterable[Row], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Row(**{**row, **{name: int(row[name]) for name in ("blocks", "converted", "nested", "refused")}})  # type: ignore[arg-type]
            for row in csv.DictReader(file)
        ]
