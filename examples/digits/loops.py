"""Shared by the examples that use other libraries' training loops: data, command line, missing libraries."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from examples.libraries import import_torchvision


@contextlib.contextmanager
def needs(*libraries: str) -> Iterator[None]:
    """Wraps imports, and exits with one line if a library is missing. Also makes torchvision importable if its compiled
    library doesn't match torch's build, as the libraries import it if it is installed."""
    try:
        if importlib.util.find_spec("torchvision") is not None:
            import_torchvision()
        yield
    except ImportError as error:
        script = Path(sys.argv[0]).name
        raise SystemExit(f"{script}: error: {error}; needed: pip install {' '.join(libraries)}") from error


def data(options: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns images `[N, 1, 8, 8]` and labels `[N]` to train on, then those to test with."""
    from examples.digits.data import Digits  # needs scikit-learn

    found = Digits.load(torch.device("cpu"))
    some = slice(256 if options.quick else None)
    return found.train_images[some], found.train_labels[some], found.test_images, found.test_labels


def command(
    description: str | None,
    train: Callable[[argparse.Namespace], float],
    argv: Sequence[str] | None,
    **flags: str,
) -> int:
    """Runs `train` with the command line's options. `train` returns the accuracy on the test images."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10, help="passes through the data")
    parser.add_argument("--drop-prob", type=float, default=0.2)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one epoch on 256 images")
    for name, meaning in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=meaning)
    options = parser.parse_args(argv)
    for name, (low, high) in {"epochs": (1, 1e6), "drop_prob": (0, 1), "lr": (0, 1e3), "seed": (0, 2**31 - 1)}.items():
        if not low <= getattr(options, name) <= high:
            parser.error(f"argument --{name.replace('_', '-')}: must be in [{low}, {high:g}]")
    if options.quick:
        options.epochs = 1
    torch.manual_seed(options.seed)
    print(f"accuracy on the test images: {train(options):.1%}")
    return 0
