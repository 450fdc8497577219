"""Shared by the examples that train networks: runs that can be resumed, errors in one line, a progress bar."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.digits.storage import Folder

LAST = ("out", "resume", "overwrite")  # options of the command, not of its run


class Problem(Exception):
    """An error that the user can fix. The message says how, in one line."""


def add_option(parser: argparse.ArgumentParser, name: str, text: str, default: Any = None, **kwargs: Any) -> None:
    text = text if default is None else f"{text} (default: {default})"
    parser.add_argument(name, help=text, default=default, **kwargs)


def add_run_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds --out, --resume and --overwrite. `default` describes the default of --out."""
    parser.add_argument("--out", type=Path, help=f"folder of the run (default: {default})")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--overwrite", action="store_true", help="start again even if the folder has an unfinished run")


def begin_run(
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
    default_out: Callable[[argparse.Namespace], str],
    limits: Mapping[str, tuple[float, float]],
    finished: Callable[[dict[str, Any]], bool] = lambda state: (
        state["epochs"][-1]["epoch"] >= state["options"]["epochs"]
    ),
    about_command: Collection[str] = LAST,
) -> tuple[argparse.Namespace, dict[str, Any] | None, Folder]:
    """Returns the options, the checkpoint to continue from, if any, and the folder. Raises `Problem`.

    Args:
        default_out: returns the run's folder if --out isn't given.
        limits: lowest and highest value of options.
        finished: returns whether the run of a checkpoint is finished.
        about_command: options of the command, not of its run.
    """
    args = parser.parse_args(argv)
    folder = Folder(args.out or Path("report") / default_out(args))
    state = None
    if folder.has_checkpoint() and not args.overwrite:
        state = folder.load_checkpoint(torch.device("cpu"))
        saved = state.get("options")
        if not isinstance(saved, dict) or saved.keys() != vars(args).keys() - set(about_command):
            raise Problem(f"argument --out: {folder.path} holds the run of another example")
        if args.resume:
            parser.set_defaults(**saved)  # options that aren't given have the run's values
            args = parser.parse_args(argv)
            for name, value in saved.items():
                if getattr(args, name) != value:
                    option = f"argument {name.replace('_', '-')}: the run in {folder.path} has {value!r}"
                    raise Problem(f"{option}, got {getattr(args, name)!r}: leave it out, or name another --out")
        elif not finished(state):
            raise Problem(f"{folder.path} holds an unfinished run: give --resume, --overwrite or another --out")
        else:
            state = None
    options = argparse.Namespace(**{name: value for name, value in vars(args).items() if name not in about_command})
    for name, (low, high) in limits.items():
        if (value := getattr(options, name)) is not None and not low <= value <= high:
            raise Problem(f"argument --{name.replace('_', '-')}: must be in [{low:g}, {high:g}], got {value}")
    return options, state, folder


@contextlib.contextmanager
def display(total: int, done: int) -> Iterator[tuple[Callable, Callable[[str], None]]]:
    """Yields a function that advances a bar (if rich is installed), and one that prints a line."""
    if importlib.util.find_spec("rich") is None:
        yield lambda **_: None, print
        return
    from rich.progress import Progress

    with Progress(refresh_per_second=4) as bar:
        task = bar.add_task("", total=total, completed=done)
        yield partial(bar.update, task, advance=1), partial(bar.console.print, highlight=False, soft_wrap=True)
