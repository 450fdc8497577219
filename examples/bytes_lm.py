"""Trains a byte-level GPT on the Python standard library's source files, by several methods, and compares them:

    python examples/bytes_lm.py                             # plain, drop-path and ResidualDroppath, a few minutes each
    python examples/bytes_lm.py --method all --seeds 3 --equal flops
    python examples/bytes_lm.py --resume --sample 500       # continues a stopped run, then writes some text
    python examples/bytes_lm.py --preset gpu --method plain --compile

All methods start from the same weights and see the same batches in the same order. Losses are in bits per byte; the
validation text is a tenth of the files. `results.csv`, `curves.csv` and `loss.png` are in the folder of the run.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Idle OpenMP threads spin, on a busy machine for far longer than they work.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

from examples.digits.command import LAST, Problem, add_option, add_run_options, begin_run, display
from examples.digits.experiment import Stopped, StopSignals
from examples.digits.storage import Folder, StorageError
from examples.language.data import Text
from examples.language.experiment import BEST, Experiment, is_finished
from examples.language.model import ByteGPT, sample
from examples.language.training import Config
from examples.methods import DROP_PATH, EXACT, METHODS, PLAIN

PRESETS: dict[str, dict[str, Any]] = {
    "cpu": {"depth": 6, "width": 96, "heads": 4, "context": 96, "batch_size": 16, "steps": 800, "learning_rate": 3e-3},
    "gpu": {"depth": 14, "width": 768, "heads": 12, "context": 1024, "batch_size": 32, "steps": 20_000}
    | {"learning_rate": 6e-4, "dtype": "bfloat16"},
    "quick": {"depth": 2, "width": 16, "heads": 2, "context": 16, "batch_size": 4, "steps": 20, "learning_rate": 1e-2}
    | {"validation_windows": 8},
}
ABOUT_COMMAND = (*LAST, "save_every", "sample", "temperature")
LIMITS: dict[str, tuple[float, float]] = {
    "drop_prob": (0, 1),
    "seeds": (1, 1000),
    "learning_rate": (0, 10),
    "validation_windows": (1, 1e6),
    "steps": (1, 1e9),
    "train_bytes": (2, 1e12),
}
LIMITS |= dict.fromkeys(("depth", "width", "heads", "context", "batch_size"), (1, 1e5))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "small for CPUs, 100 M parameters for a GPU, or a few seconds to try"
    add_option(parser, "--preset", f"sizes and training settings: {sizes}", "cpu", choices=tuple(PRESETS))
    parser.add_argument("--quick", dest="preset", action="store_const", const="quick", help="--preset quick")
    add_option(parser, "--depth", "number of blocks; each has two paths", type=int)
    add_option(parser, "--width", "channels", type=int)
    add_option(parser, "--heads", "attention heads", type=int)
    add_option(parser, "--context", "number of bytes that the model attends to", type=int)
    chosen = [PLAIN, DROP_PATH, EXACT]
    add_option(parser, "--method", "methods to compare", chosen, nargs="+", choices=(*METHODS, "all"), metavar="METHOD")
    add_option(parser, "--drop-prob", "P(drop) of every path", 0.2, type=float)
    add_option(parser, "--mode", "drop for the whole batch or per sample", "block", choices=("block", "sample"))
    add_option(parser, "--schedule", "change of P(drop) over depth", "constant", choices=("constant", "linear"))
    parser.add_argument("--no-scale", action="store_true", help="don't scale kept branches by 1 / (1 - p)")
    parser.add_argument("--train-rest", action="store_true", help="train the rest in reuse iterations too")
    add_option(parser, "--batch", "batch of a reuse iteration", "same", choices=("same", "next"))
    add_option(parser, "--seeds", "number of seeds", 1, type=int)
    add_option(parser, "--steps", "plain's optimizer steps", type=int)
    add_option(parser, "--equal", "quantity that is equal for all methods", "steps", choices=("steps", "flops"))
    add_option(parser, "--learning-rate", "highest rate, after a warm-up and before a cosine", type=float)
    add_option(parser, "--batch-size", "windows of the text in a batch", type=int)
    add_option(parser, "--validation-windows", "windows that losses are evaluated on", 256, type=int)
    add_option(parser, "--train-bytes", "train on the first N bytes only", type=int, metavar="N")
    add_option(parser, "--dtype", "dtype of the branches, by autocast", "float32", choices=("float32", "bfloat16"))
    parser.add_argument("--compile", action="store_true", help="compile the branches")
    add_option(parser, "--save-every", "seconds between checkpoints", 60.0, type=float)
    add_option(parser, "--sample", "afterwards write N bytes with the model of the lowest loss", type=int, metavar="N")
    add_option(parser, "--temperature", "sampling temperature; 0 takes the likeliest byte", 0.8, type=float)
    add_run_options(parser, "report/bytes-PRESET")
    return parser


def begin(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.Namespace, dict[str, Any] | None, Folder]:
    """Returns the command's options, the run's options, the checkpoint if any, and the folder. Raises `Problem`."""
    parser = build_parser()
    command = parser.parse_args(argv)
    parser.set_defaults(**PRESETS[command.preset])
    options, state, folder = begin_run(
        parser, argv, lambda args: f"bytes-{args.preset}", LIMITS, is_finished, ABOUT_COMMAND
    )
    options.method = [m for m in METHODS if m in options.method or "all" in options.method]  # plain first
    if options.width % options.heads:
        raise Problem(f"argument --heads: must divide --width {options.width}, got {options.heads}")
    if not command.temperature >= 0:
        raise Problem(f"argument --temperature: must be 0 or more, got {command.temperature}")
    return command, options, state, folder


def run(argv: Sequence[str] | None) -> int:
    command, options, state, folder = begin(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    text = Text.load(device, options.train_bytes)
    shortest = min(len(text.train), len(text.validation))
    if options.context >= shortest:
        raise Problem(f"argument --context: must be less than the {shortest} bytes of text, got {options.context}")
    if state is not None and state["text"] != text.sha256:
        raise Problem(f"argument --resume: {folder.path} was trained on another Python's library")
    config = Config(**vars(options) | {"method": tuple(options.method)})
    if not (command.sample and state is not None and is_finished(state)):
        train(config, text, folder, options, state, command.save_every)
    if command.sample:
        best = folder.load_checkpoint(device, BEST)
        model: ByteGPT = config.build_model(0).to(device)
        model.load_state_dict(best["model"])
        written = sample(model, command.sample, command.temperature, best["seed"])
        print(f"Written by {best['method']}, seed {best['seed']}:\n{written.decode(errors='replace')}")
    return 0


def train(
    config: Config,
    text: Text,
    folder: Folder,
    options: argparse.Namespace,
    state: dict[str, Any] | None,
    save_every: float,
) -> None:
    """Runs all remaining trainings, and writes the report."""
    from rich.console import Console

    from examples.language.report import Report

    folder.prepare()
    console = Console()
    size = sum(p.numel() for p in config.build_model(0).parameters())
    console.print(f"{text}; {size:,} parameters", highlight=False)
    with StopSignals() as signals:
        experiment = Experiment(config, text, folder, vars(options), signals, save_every=save_every)
        if state is not None:
            experiment.load_state_dict(state)
        with display(len(experiment.trainings), len(experiment.finished)) as (advance, _):
            experiment.advance = advance
            experiment.run()
    report = Report(vars(options), experiment.finished, text, text.train.device)
    report.write(folder)
    console.print(report.table())
    console.print(f"In {folder.path}: results.csv, curves.csv, loss.png", highlight=False, soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return run(argv)
    except (Problem, StorageError) as problem:
        print(f"bytes_lm.py: error: {problem}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        name = signal.Signals(stopped.number).name
        print(f"{name}: stopped; the checkpoint is written. Continue with --resume")
        return 128 + stopped.number


if __name__ == "__main__":
    sys.exit(main())
