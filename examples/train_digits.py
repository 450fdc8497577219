"""Trains a small residual network on scikit-learn's handwritten digits by six methods, and reports cost and accuracy:

    python examples/train_digits.py --model resnet --seeds 5
    python examples/train_digits.py --resume              # continues a run that was stopped or killed

All methods start from the same weights, see the batches in the same order and take the same number of optimizer steps.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import statistics
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

# Idle OpenMP threads spin, on a busy machine for far longer than they work.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

from benchmarks.machine import Device
from examples.digits.data import BATCH_SIZE, Digits
from examples.digits.experiment import Experiment, Stopped, StopSignals
from examples.digits.report import Report
from examples.digits.storage import Folder, StorageError
from examples.digits.training import NETWORKS, Config, Training
from examples.methods import FREEZE_BN, METHODS, PLAIN


class ProgressDisplay:
    """Bars for the whole run and for each method."""

    def __init__(self, progress: Progress, seeds: int, steps: int):
        self._progress, self._steps = progress, steps
        self._run = progress.add_task("all", total=seeds * steps * len(METHODS))
        self._tasks = {method: progress.add_task(method, total=steps) for method in METHODS}

    def begin(self, seed: int, steps_done: int) -> None:
        self._progress.update(self._run, completed=(seed * self._steps + steps_done) * len(METHODS))
        self._progress.update(self._run, description=f"seed {seed}")
        for method, task in self._tasks.items():
            self._progress.update(task, completed=steps_done, description=method)

    def counting(self, method: str) -> None:
        self._progress.update(self._run, description=f"counting FLOPs: {method}")

    def stepped(self, method: str, training: Training) -> None:
        record = training.record
        tested = f", accuracy {record.curve[-1]['accuracy']:.1%}" if record.curve else ""
        text = f"{method}: loss {statistics.fmean(record.losses[-20:]):.3f}{tested}"
        self._progress.update(self._tasks[method], advance=1, description=text)
        self._progress.update(self._run, advance=1, description=f"seed {training.seed}")

    def analysing(self, method: str) -> None:
        self._progress.update(self._run, description=f"removing branches: {method}")


def results_table(report: Report) -> Table:
    seeds, quarter = report.config.seeds, f"{max(report.summaries[PLAIN].removed)} removed"
    caption = (
        f"{report.settings['optimizer steps']} optimizer steps each; "
        + (f"mean ± 95 % interval over {seeds} seeds. " if seeds > 1 else "one seed. ")
        + f"{quarter}: accuracy without that many random branches. "
        + "Time (median) and FLOPs per step are ratios to plain."
    )
    title = f"Handwritten digits, {report.test_set}: {report.config.network.kind.__name__}, {report.config.mode} mode"
    table = Table(title=title, caption=caption, caption_justify="left")
    rows = [
        {name: row[name] for name in ("method", "accuracy, %", quarter, "worst reuse loss", "time", "FLOPs")}
        for row in report.rows()
    ]
    for heading in rows[0]:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for row in rows:
        table.add_row(*row.values())
    return table


def next_ideas(config: Config) -> str:
    ideas = {
        "--model resnet": "a BatchNorm ResNet" if config.model != "resnet" and config.mode == "block" else "",
        "--model mlp": "a residual MLP" if config.model != "mlp" else "",
        "--mode sample": "masks for each sample" if config.mode == "block" and config.model != "resnet" else "",
        "--drop-prob 0.5": "cheaper steps, stronger regularisation" if config.drop_prob < 0.5 else "",
        "--epochs 60": "a longer training" if config.epochs < 60 else "",
        "--seeds 10": "narrower intervals" if config.seeds < 10 else "",
    }
    return "\n  ".join(
        [
            "Try next, as options of examples/train_digits.py or in `make demo ARGS=...`:",
            *(f"{option:16} {what}" for option, what in ideas.items() if what),
        ]
    )


# Options


def number(kind: type, wanted: str, valid: Callable[[float], bool]) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not valid(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return convert


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Config()

    def add(name: str, text: str, **kwargs: Any) -> None:
        """Adds an option of `Config`. It is absent if it isn't given, so that --resume can take it from the
        checkpoint."""
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", help=f"{text} (default: {value})", default=argparse.SUPPRESS, **kwargs)

    add("model", "the network", choices=tuple(NETWORKS))
    add("mode", "drop for the whole batch or per sample", choices=("block", "sample"))
    add("drop-prob", "P(drop) of every path", type=number(float, "in [0, 1]", lambda p: 0 <= p <= 1))
    add("freeze-bn", "statistics that frozen BatchNorm uses", choices=tuple(FREEZE_BN))
    add("seeds", "number of seeds", type=number(int, "in [1, 1000]", lambda n: 1 <= n <= 1000))
    wanted = "above 0 and at most 10000"
    add("epochs", "plain's passes through the data; sets the steps", type=number(float, wanted, lambda x: 0 < x <= 1e4))
    add("validate", "test on a part of the training set, to choose settings", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the report (default: report/digits-MODEL-MODE)")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder")
    parser.add_argument("--overwrite", action="store_true", help="start again even if the folder has an unfinished run")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    given = {field.name: getattr(args, field.name) for field in fields(Config) if hasattr(args, field.name)}
    config = Config(**given)
    if args.resume and args.overwrite:
        parser.error("argument --overwrite: not allowed with argument --resume")
    folder = Folder(args.out or Path("report") / f"digits-{config.model}-{config.mode}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    state = None
    try:
        folder.prepare()
        if folder.has_checkpoint() and not args.overwrite:
            state = folder.load_checkpoint(device)
    except StorageError as error:
        parser.error(f"argument --out: {error}")
    if state is not None:
        saved = Config(**state["config"])
        if args.resume:
            for name, value in given.items():
                if value != getattr(saved, name):
                    option = f"--{name.replace('_', '-')}"
                    parser.error(
                        f"argument {option}: the run in {folder.path} has {getattr(saved, name)}, got {value}; "
                        "leave it out to resume, or name another --out"
                    )
            config = saved
        elif len(state["finished"]) < saved.seeds:
            parser.error(
                f"argument --out: {folder.path} holds an unfinished run: continue with --resume, start again with "
                "--overwrite, or name another folder"
            )
        else:
            state = None
    if config.model == "resnet" and config.mode == "sample":
        parser.error(
            "argument --mode: must be block with --model resnet, got sample: BatchNorm in a branch can't be frozen for "
            "some samples only"
        )
    return run(config, folder, state, args.resume, device)


def run(config: Config, folder: Folder, state: dict[str, Any] | None, resume: bool, device: torch.device) -> int:
    console = Console()
    digits = Digits.load(device, config.validate)
    columns = (BarColumn(bar_width=10), TimeRemainingColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    try:
        with StopSignals() as signals, Progress(*columns, console=console, refresh_per_second=4) as progress:
            experiment = Experiment(config, digits, folder.save_checkpoint, signals)
            steps = experiment.steps
            machine = f"{Device.of(device.type).name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
            console.print(f"{machine}; {steps} steps of {BATCH_SIZE} images, {config.network}", highlight=False)
            if state is not None:
                experiment.load_state_dict(state)
            elif resume:
                console.print(f"No checkpoint in {folder.path}: starts at the beginning", highlight=False)
            experiment.run(ProgressDisplay(progress, config.seeds, steps))
        report = Report(config, experiment.finished, steps, device)
        report.write(folder)
    except (Stopped, KeyboardInterrupt) as stopped:
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        name = signal.Signals(number).name
        console.print(f"{name}: stopped; the checkpoint is in {folder.path}. Continue with --resume", highlight=False)
        return 128 + number
    except StorageError as error:
        print(f"{error}. What was done is in {folder.path}: make room and continue with --resume", file=sys.stderr)
        return 1
    console.print(results_table(report))
    for sentence in report.findings:
        console.print(f"- {sentence}", highlight=False)
    console.print(next_ideas(config), highlight=False)
    console.print(f"Report: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
