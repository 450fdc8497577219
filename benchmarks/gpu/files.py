"""The files that a visit writes beside those of its steps. A full disk loses only the data that doesn't fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..harness import Row, told
from ..output import read_csv, write_csv

LOG_OF_A_STEP = 1 << 20
"""Characters."""


class Files:
    """Writes files, and keeps in `unwritten` by name why one couldn't be written: a full disk, or an existing file that
    isn't ours."""

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
    """Appends the output of one step to the visit's log, up to a limit."""

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
    """Removes the rows of an earlier run of this step, so that they aren't taken for this run's. Raises `OSError`."""
    others = rows_of_other_steps(path, step)
    if others:
        write_csv(path, others)
    else:
        path.unlink(missing_ok=True)
