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
    """Raised by `convert` with `strict=True` if a path is refused.

    The message names each refused path and the reason. The model is as before.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc, self.drop_path, self.calls = nn.Linear(8, 8), rdp.DropPath(0.1), 0
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return x + self.drop_path(self.fc(x))
        >>> try:
        ...     rdp.convert(nn.Sequential(Block()), strict=True, example_inputs=torch.randn(4, 8))
        ... except rdp.ConversionError as error:
        ...     print(error)
        0.drop_path (Block): its forward sets 'calls'
    """


@dataclass(frozen=True)
class PathReport:
    """One path that `convert` found, converted or refused.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        >>> report = rdp.convert(layer, drop_prob=0.2, example_inputs=torch.randn(4, 5, 8))
        >>> for path in report:
        ...     print(path.name, path.drop_prob, path.what)
        add_dropout1 0.2 skips self_attn, dropout1
        add_dropout2 0.2 skips linear1, dropout, linear2, dropout2
    """

    block: str
    """The name of the block in the model; empty for the model itself."""
    block_class: str
    """The name of the block's class."""
    name: str
    """The path's name in its block. It is its drop-path's name, or is made from the last module of its branch."""
    drop_prob: float
    """P(drop). It is nan if it isn't known, as for some refused drop-paths."""
    refused: str | None = None
    """Why the path stays as it was; None if it was converted."""
    nested: str | None = None
    """The path whose branch contains this drop-path, which masks its input there as before; None if there is none."""
    whole_in_sample_mode: bool = False
    """Whether the branch runs on the whole batch and is masked in sample mode, because it has a BatchNorm."""
    foreign_rows: bool = False
    """Whether rows aren't samples but windows or patches. The path is then decided for the whole batch."""
    modules: tuple[str, ...] = ()
    """The modules that aren't called when the branch is skipped, named within the block."""
    already: bool = False
    """Whether an earlier call converted the path."""
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
    """One block in which `convert` found no path.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.fc = nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return self.fc(x)
        >>> report = rdp.convert(Block(), drop_prob=0.2, example_inputs=torch.randn(4, 8))
        >>> report.without_paths[0].reason
        'no add in its own forward'
    """

    block: str
    """The name of the block in the model; empty for the model itself."""
    block_class: str
    """The name of the block's class."""
    reason: str
    """Why the block has no path."""
    inside: str | None = None
    """The path whose branch contains the block; None if there is none."""


@dataclass
class ConversionReport:
    """The result of `convert`, with a row for each path.

    `print(report)` shows a table of the paths, drawn by rich if that is installed, then the notes and the summary.
    Iterating over the report gives its rows. A row has `block`, `name`, `drop_prob`, `what` (what is skipped, or why
    nothing is) and `refused` (the reason, or None).

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        >>> report = rdp.convert(layer, drop_prob=0.2, example_inputs=torch.randn(4, 5, 8))
        >>> [path.name for path in report.converted]
        ['add_dropout1', 'add_dropout2']
        >>> report.refused, report.summary()
        ([], '2 paths in 1 blocks converted')
    """

    rows: list[PathReport] = field(default_factory=list)
    """The paths in registration order of their blocks, converted or not."""
    notes: list[str] = field(default_factory=list)
    """Notes on blocks without a path, on shared blocks and on earlier conversions."""
    without_paths: list[BlockReport] = field(default_factory=list)
    """The blocks in which no path was found. Blocks without a drop-path are searched only if `drop_prob` is given."""

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
        """The paths that stay as they were, each with the reason."""
        return [row for row in self.rows if row.refused is not None]

    def __iter__(self) -> Iterator[PathReport]:
        return iter(self.rows)

    def summary(self) -> str:
        """Counts the paths that were converted, had been converted before, or were refused.

        Returns:
            One line, such as "24 paths in 12 blocks converted".
        """
        blocks = len({row.block for row in self.converted})
        text = f"{len(self.converted)} paths in {blocks} blocks converted"
        text += f", {len(self.already)} converted already" if self.already else ""
        return text + (f", {len(self.refused)} refused" if self.refused else "")

    def note_blocks(self) -> None:
        """Adds a note for each class of blocks without a path, and each reason."""
        found = Counter((b.block_class, b.reason) for b in self.without_paths)
        self.notes += [f"no path in {kind} ({count}): {reason}" for (kind, reason), count in found.items()]

    def __str__(self) -> str:
        cells = [(r.block or "(the model)", r.block_class, r.name, f"{r.drop_prob:.3f}", r.what) for r in self.rows]
        header = ("block", "class", "path", "p", "what")
        return "\n".join([*table(header, cells), *self.notes, self.summary()])


def describe(error: BaseException) -> str:
    """The type of an error, and the first line of its message or, if it has none, the user's code that raised it."""
    message = str(error).strip()
    if message:
        return f"{type(error).__name__}: {message.splitlines()[0]}"
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if not os.path.abspath(frame.filename).startswith(_NOT_THE_USERS)] or frames
    if not theirs:
        return type(error).__name__
    return f"{type(error).__name__} in {theirs[-1].name} ({theirs[-1].filename}:{theirs[-1].lineno})"
