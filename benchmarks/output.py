"""Files of rows. Their paths are checked before anything is measured, and they are replaced in one step."""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

Rows = list[dict[str, object]]
DIGITS = 6  # significant digits; timings have fewer


def writable(text: str) -> Path:
    """An argparse type: a path that can be written. An existing file isn't changed."""
    path = Path(text)
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a directory")
        temporary = _temporary(path)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't write {text}: {error.strerror}") from None
    return path


def write_csv(path: Path, rows: Rows) -> None:
    """Writes a line for each row. None and missing columns are empty cells."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    header = dict(zip(columns, columns, strict=True))
    replace(path, _csv([header, *rows], columns))


def append_csv(path: Path, row: dict[str, object], columns: Iterable[str]) -> None:
    """Appends a row to a file that `write_csv` wrote with these columns. If that fails the file stays as it was."""
    size = path.stat().st_size
    try:
        with path.open("ab") as file:
            file.write(_csv([row], list(columns)))
    except OSError:
        os.truncate(path, size)
        raise


def read_csv(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a file that `write_csv` wrote. Values are text."""
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_json(path: Path, rows: Rows) -> None:
    replace(path, (json.dumps(_rounded(rows), indent=1) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Replaces the content of `path` in one step. If that fails, `path` keeps its old content."""
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")  # same folder: os.replace works within one file system


def _csv(rows: Rows, columns: list[str]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(_rounded(rows))
    return text.getvalue().encode()


def _rounded(rows: Rows) -> Rows:
    return [{k: float(f"{v:.{DIGITS}g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
