"""What a visit writes beside its steps: a disk that is full costs nothing but what doesn't fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..harness import Row, told
from ..output import read_csv, write_csv

LOG_OF_A_STEP = 1 << 20
"""Characters."""


class Files:
    """Writes, and remembers in `unwritten` why a file couldn't be written, by its name: a full disk, or an older file
    of that name that isn't ours."""

    def __init__(self) -> None:
        self.unwritten: dict[str, str] = {}

    def write(self, path: Path, write: Callable[[Path], object]) -> None:
        try:
            write(path)
        except OSError as error:
            self.unwritten[path.name] = error.strerror or str(error)
        except Exception as error:
            self.unwritten[path.name] = told(error)


class StepLog:
    """What one step prints, at the end of the visit's log, as far as there is room for it."""

    def __init__(self, files: Files, path: Path):
        self._files, self._path, self._left = files, path, LOG_OF_A_STEP

    def add(self, line: str) -> None:
        if self._left <= 0:
            return
        self._left -= len(line) + 1
        text = f"{line}\n" if self._left > 0 else f"{line}\n... the rest of this step is left out\n"
        self._files.write(self._path, lambda path: append(path, text))


def append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def rows_of_other_steps(path: Path, step: str) -> list[Row]:
    return [row for row in read_csv(path) if row.get("step") != step] if path.exists() else []


def forget(path: Path, step: str) -> None:
    """Removes the rows of an earlier run of this step: they must not pass for this one's. Raises `OSError`."""
    others = rows_of_other_steps(path, step)
    if others:
        write_csv(path, others)
    else:
        path.unlink(missing_ok=True)
