"""The report of a conversion, which prints as a table."""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from .._utils.table import table

_NOT_THE_USERS = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, __file__))


class ConversionError(ValueError):
    """`convert(strict=True)` refused something. The model is as it was."""


@dataclass(frozen=True)
class PathReport:
    """One path that was found, converted or refused."""

    block: str
    block_class: str
    name: str
    drop_prob: float
    """nan if it isn't known, as for some refused drop-paths."""
    refused: str | None = None
    """Why the path stays as it was; None if it was converted."""
    nested: str | None = None
    """The path in whose branch it lies. There it goes on masking its input as before."""
    whole_in_sample_mode: bool = False
    foreign_rows: bool = False
    modules: tuple[str, ...] = ()
    already: bool = False
    """Whether an earlier call converted it."""
    side_products: tuple[str, ...] = ()
    """Attributes that a forward of the branch sets on its modules, named within the block. Their values come from the
    last call in which the branch ran, and from the rows that it ran on. A skipped branch doesn't change them."""

    @property
    def what(self) -> str:
        """What is skipped, or why nothing is."""
        if self.refused is not None:
            return f"refused: {self.refused}"
        if self.nested is not None:
            return f"inside the branch of {self.nested}: masks there as before"
        skipped = f"skips {', '.join(self.modules)}" if self.modules else "skips its branch"
        if self.whole_in_sample_mode:
            skipped += "; BatchNorm: skipped in block mode, run whole and masked in sample mode"
        if self.foreign_rows:
            skipped += "; its rows aren't samples: decided for the whole batch"
        if self.side_products:
            skipped += f"; sets {', '.join(self.side_products)}: of its last run and the rows of that"
        return f"converted already; {skipped}" if self.already else skipped


@dataclass(frozen=True)
class BlockReport:
    """One block in which `convert` found no path."""

    block: str
    block_class: str
    reason: str
    inside: str | None = None
    """The path in whose branch the block lies, if any."""


@dataclass
class ConversionReport:
    """What `convert` did, path by path, in registration order. `str(report)` is a table, drawn by rich if installed.

    `without_paths` lists the blocks in which it found no path; the table groups them by class and reason.
    """

    rows: list[PathReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    without_paths: list[BlockReport] = field(default_factory=list)

    @property
    def converted(self) -> list[PathReport]:
        """The paths that this call converted."""
        return [row for row in self.rows if row.refused is None and row.nested is None and not row.already]

    @property
    def already(self) -> list[PathReport]:
        """The paths that earlier calls converted."""
        return [row for row in self.rows if row.already]

    @property
    def refused(self) -> list[PathReport]:
        return [row for row in self.rows if row.refused is not None]

    def __iter__(self) -> Iterator[PathReport]:
        return iter(self.rows)

    def summary(self) -> str:
        blocks = len({row.block for row in self.converted})
        text = f"{len(self.converted)} paths in {blocks} blocks converted"
        text += f", {len(self.already)} converted already" if self.already else ""
        return text + (f", {len(self.refused)} refused" if self.refused else "")

    def note_blocks(self) -> None:
        """Adds a note for each class of blocks without a path and each reason."""
        found = Counter((b.block_class, b.reason) for b in self.without_paths)
        self.notes += [f"no path in {kind} ({count}): {reason}" for (kind, reason), count in found.items()]

    def __str__(self) -> str:
        cells = [(r.block or "(the model)", r.block_class, r.name, f"{r.drop_prob:.3f}", r.what) for r in self.rows]
        header = ("block", "class", "path", "p", "what")
        return "\n".join([*table(header, cells), *self.notes, self.summary()])


def describe(error: BaseException) -> str:
    """The type of an error, and the first line of its message or, without one, the user's code that raised it."""
    message = str(error).strip()
    if message:
        return f"{type(error).__name__}: {message.splitlines()[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not os.path.abspath(frame.filename).startswith(_NOT_THE_USERS)] or frames
    if not theirs:
        return type(error).__name__
    return f"{type(error).__name__} in {theirs[-1].name} ({theirs[-1].filename}:{theirs[-1].lineno})"
