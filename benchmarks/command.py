"""Shared by the commands that measure: options, the loop over cases with a progress bar, and the files of rows."""

from __future__ import annotations

import argparse
import contextlib
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import plots
from .harness import Case, CheckFailed, Row, Session
from .machine import one_thread
from .output import writable, write_csv, write_json
from .plot_style import SUFFIXES, NothingToPlot, plottable

WIDTH = 100
NO_GPU = "this machine, or this torch, has no cuda device"


def add_options(parser: argparse.ArgumentParser, turns: str, quick: str, tiny: str) -> None:
    """Adds the common options. `turns`, `quick` and `tiny` are the help texts of these options."""
    parser.add_argument("--turns", type=count, help=turns)
    add_sizes(parser, quick, tiny)
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda; default: cpu")
    add_files(parser)
    name = parser.prog.split()[-1]
    if name in plots.FIGURES:
        more = "".join(f", and PATH{ending} beside it" for ending in plots.FIGURES[name] if ending)
        text = f"draw the rows to this file, as {', '.join(SUFFIXES)}{more}"
        parser.add_argument("--plot", type=plottable, metavar="PATH", help=text)
    parser.set_defaults(command=name)


def add_files(parser: argparse.ArgumentParser) -> None:
    """Adds --json and --csv."""
    parser.add_argument("--json", type=writable, metavar="PATH", help="write the rows to this file")
    parser.add_argument("--csv", type=writable, metavar="PATH", help="write the rows to this file too")


def add_sizes(parser: argparse.ArgumentParser, quick: str, tiny: str) -> None:
    """Adds `--quick` and `--tiny` with these help texts. `options.size` is `"full"`, `"quick"` or `"tiny"`."""
    sizes = parser.add_mutually_exclusive_group()
    for size, text in (("quick", quick), ("tiny", f"{tiny}, to see that it runs")):
        sizes.add_argument(f"--{size}", dest="size", action="store_const", const=size, default="full", help=text)


Makes = Callable[[], Iterable[Case]]


def one(make: Callable[..., Case], *arguments: Any) -> Makes:
    """Returns a maker of a single case for `measured`."""
    return lambda: [make(*arguments)]


def measured(
    console: Console,
    makers: Iterable[Makes],
    rounds: int,
    make_session: Callable[[Callable[[], None]], Session],
    one_threaded: bool = False,
    keep: Callable[[list[Row]], object] = lambda rows: None,
) -> tuple[list[Row], int]:
    """Returns the rows of all cases, and an exit code. A case that fails its check, raises or can't be made is reported
    and left out. An interrupt ends the loop and keeps the rows so far.

    Args:
        makers: functions that make cases. If one raises, the next one runs.
        rounds: the number of rounds of all cases together.
        make_session: makes the session from a function that advances the bar.
        one_threaded: whether to use one thread, for tensors so small that a second thread would only wait.
        keep: called with all rows after each case, so that they can be written before the next case hangs.
    """
    code, session = 0, None

    @contextlib.contextmanager
    def told_of() -> Iterator[None]:
        nonlocal code
        try:
            yield
        except CheckFailed as error:
            print(f"not timed: {error}", file=sys.stderr)
            code = 1
        except Exception:
            traceback.print_exc()
            code = 1

    try:
        with told_of(), _progress(rounds) as on_round, one_thread() if one_threaded else contextlib.nullcontext():
            session = make_session(on_round)
            for make in makers:
                with told_of():
                    for case in make():
                        with told_of():
                            session.measure(case)
                        keep(session.rows)
    except KeyboardInterrupt:
        console.print("Interrupted.")
        code = 130
    return [] if session is None else session.rows, code


def write_rows(options: argparse.Namespace, rows: list[Row]) -> list[str]:
    """Writes the requested files of rows. Returns a message for each file that couldn't be written."""
    failed = []
    for path, write in ((options.csv, write_csv), (options.json, write_json)):
        try:
            if path is not None and rows:
                write(path, rows)
        except OSError as error:
            failed.append(f"can't write {path}: {error.strerror}; what was there is kept")
    return failed


def written(options: argparse.Namespace, rows: list[Row]) -> bool:
    """Writes the requested files. Prints why a file can't be written, and then returns False."""
    failed = write_rows(options, rows)
    for line in failed:
        print(line, file=sys.stderr)
    complete = not failed
    path = getattr(options, "plot", None)
    try:
        if path is not None and rows:
            plots.write(options.command, rows, path)
    except (OSError, NothingToPlot) as error:
        print(f"can't draw {path}: {error}", file=sys.stderr)
        complete = False
    return complete


def has_device(kind: str) -> bool:
    """Returns whether the device is available. Prints a message if it isn't."""
    if kind == "cuda" and not torch.cuda.is_available():
        print(f"--device cuda: {NO_GPU}", file=sys.stderr)
        return False
    return True


def shown(value: float | None, spec: str) -> str:
    return "–" if value is None else format(value, spec)


def machine_line(row: Row) -> str:
    return f"{row['device']}, {row['threads']} threads, torch {row['torch']}, {row['commit']}"


def count(text: str) -> int:
    """An argparse type."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def folder(text: str) -> Path:
    """An argparse type: a folder, or a path where one can be made."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder, got {text!r}")
    return path


def device(text: str) -> str:
    """An argparse type. `has_device` checks later whether the device is available."""
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    return text


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Shows a bar with the time left on stderr. Yields a function that advances it."""
    columns = (TextColumn("round"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("left"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=total)
        yield lambda: progress.advance(task)
