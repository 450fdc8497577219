"""Trains a small vision transformer on scikit-learn's handwritten digits in four ways and compares what they cost:

    python examples/train_digits.py --seeds 3 --mode sample

All four start from the same weights, see the batches in the same order and take the same number of optimizer steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

import rdp_kernels as rdp
from examples.models import ViT

PLAIN, DROP_PATH, EXACT, FROZEN = "plain", "drop-path", "ResidualDroppath", "ResidualDroppath, branch-frozen"
METHODS = (PLAIN, DROP_PATH, EXACT, FROZEN)
FREEZE = {EXACT: "parameters", FROZEN: "branch"}

MODEL = {"dim": 64, "depth": 6, "heads": 4}
POSITION_STD = 0.5  # the model averages its tokens: with positions told apart from the start it learns far sooner
BATCH_SIZE = 64
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.05
EVALUATIONS = 10  # in the course of a training
COUNTED_STEPS = 60  # at least 30 pairs of iterations whose FLOPs are counted


@dataclass(frozen=True)
class Digits:
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, device: torch.device) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        images = (pixels.reshape(-1, 1, 8, 8) / 8 - 1).astype("float32")
        parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
        train_images, test_images, train_labels, test_labels = (torch.from_numpy(part).to(device) for part in parts)
        return cls(train_images, train_labels, test_images, test_labels)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.train_images) // BATCH_SIZE

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches without end, in an order that depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self.train_images), generator=generator)
            for rows in order[: self.batches_per_epoch * BATCH_SIZE].split(BATCH_SIZE):
                rows = rows.to(self.train_images.device)
                yield self.train_images[rows], self.train_labels[rows]


@dataclass
class Record:
    """What one training of one method was seen to do."""

    phases: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)
    flops_per_step: float = 0.0


def build(method: str, weights: ViT, args: argparse.Namespace, seed: int) -> tuple[ViT, rdp.ResidualDropPath | None]:
    model = copy.deepcopy(weights)
    if method == DROP_PATH:
        for branch in model.paths:
            branch.drop_prob, branch.mode = args.drop_prob, args.mode
    if method not in FREEZE:
        return model, None
    return model, rdp.ResidualDropPath(model, args.drop_prob, mode=args.mode, freeze=FREEZE[method], seed=seed)


def train(
    model: ViT, scheme: rdp.ResidualDropPath | None, batches: Iterator[tuple[Tensor, Tensor]], steps: int
) -> Iterator[tuple[str, Tensor]]:
    """Takes one optimizer step whenever it is asked for its next (phase, loss), so that trainings can take turns."""
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for images, labels in batches:
        for phase in ["plain"] if scheme is None else scheme.iterations(len(images)):
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            yield phase, loss.detach()


@torch.no_grad()
def accuracy(model: ViT, digits: Digits) -> float:
    model.eval()
    right = model(digits.test_images).argmax(dim=-1) == digits.test_labels
    model.train()
    return right.float().mean().item()


def count_flops(method: str, weights: ViT, digits: Digits, args: argparse.Namespace, seed: int) -> float:
    """The mean over the first `COUNTED_STEPS` steps of the training, taken again with the same weights and draws."""
    torch.manual_seed(seed)
    training = train(*build(method, weights, args, seed), digits.batches(seed), COUNTED_STEPS)
    with FlopCounterMode(display=False) as counter:
        for _ in range(COUNTED_STEPS):
            next(training)
    return counter.get_total_flops() / COUNTED_STEPS


def timed_step(training: Iterator[tuple[str, Tensor]], record: Record) -> None:
    """Everything counts that a step needs: the batch, the draw of a plan, both passes and the optimizer."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    phase, loss = next(training)
    synchronize()
    record.seconds.append(time.perf_counter() - start)
    record.phases[phase] += 1
    record.losses.append(loss.item())


def compare(seed: int, digits: Digits, args: argparse.Namespace, steps: int, progress: Progress) -> dict[str, Record]:
    """Trains all methods, which take turns step by step: what disturbs the machine disturbs all of them alike."""
    torch.manual_seed(seed)
    weights = ViT(**MODEL).to(digits.train_images.device)
    torch.nn.init.normal_(weights.position, std=POSITION_STD)
    records = {method: Record() for method in METHODS}
    for method in progress.track(METHODS, description=f"counting FLOPs, seed {seed}"):
        records[method].flops_per_step = count_flops(method, weights, digits, args, seed)
    torch.manual_seed(seed)  # drop-path's draws, here and in count_flops
    built = {method: build(method, weights, args, seed) for method in METHODS}
    trainings = {method: train(*built[method], digits.batches(seed), steps) for method in METHODS}
    tasks = {method: progress.add_task(short(method), total=steps) for method in METHODS}
    interval = max(1, steps // EVALUATIONS)
    for step in range(1, steps + 1):
        for method, record in records.items():
            timed_step(trainings[method], record)
            if step % interval == 0 or step == steps:
                point = {"step": step, "loss": statistics.fmean(record.losses[-interval:])}
                record.curve.append(point | {"accuracy": accuracy(built[method][0], digits)})
            tested = f", accuracy {record.curve[-1]['accuracy']:.1%}" if record.curve else ""
            loss = statistics.fmean(record.losses[-interval:])
            progress.update(tasks[method], advance=1, description=f"{short(method)}: loss {loss:.3f}{tested}")
    return records


def short(method: str) -> str:
    """For lines that keep to 80 columns."""
    return method.split(", ")[-1]


def seconds_per_step(records: list[Record]) -> float:
    """The median over two steps in a row, halved: the two iterations of a pair take different times."""
    pairs = [record.seconds[i : i + 2] for record in records for i in range(0, len(record.seconds), 2)]
    return statistics.median(statistics.fmean(pair) for pair in pairs)


def summarize(runs: list[dict[str, Record]]) -> dict[str, dict]:
    summary = {}
    for method in METHODS:
        records = [run[method] for run in runs]
        accuracies = [record.curve[-1]["accuracy"] for record in records]
        summary[method] = {
            "optimizer_steps": [record.phases.total() for record in records],
            "iterations": [dict(record.phases) for record in records],
            "accuracies": accuracies,
            "accuracy_mean": statistics.fmean(accuracies),
            "accuracy_sd": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "ms_per_step": 1e3 * seconds_per_step(records),
            "flops_per_step": statistics.fmean(record.flops_per_step for record in records),
            "curves": [record.curve for record in records],
        }
    plain = summary[PLAIN]
    for result in summary.values():
        result["time_ratio"] = result["ms_per_step"] / plain["ms_per_step"]
        result["flops_ratio"] = result["flops_per_step"] / plain["flops_per_step"]
    return summary


def results_table(summary: dict[str, dict], steps: int) -> Table:
    caption = (
        f'{steps} optimizer steps each. branch-frozen: ResidualDroppath with freeze="branch". '
        "Time: median over two steps in a row (a pair of iterations), halved; methods"
        " took turns. FLOPs: matmuls and convolutions, forward and backward, counted by torch's FlopCounterMode in the"
        f" first {COUNTED_STEPS} steps, repeated untimed with the same weights, batches and draws."
    )
    table = Table(
        title="Handwritten digits: test accuracy, and cost as a ratio to plain", caption=caption, caption_justify="left"
    )
    table.add_column("method", min_width=len(EXACT) + 1)
    for heading in ("accuracy", "ms/step", "ratio", "MFLOPs/step", "ratio"):
        table.add_column(heading, justify="right")
    for method, result in summary.items():
        spread = "" if result["accuracy_sd"] is None else f" ± {100 * result['accuracy_sd']:.2f}"
        flops = f"{result['flops_per_step'] / 1e6:,.0f}", f"{result['flops_ratio']:.2f}"
        duration = f"{result['ms_per_step']:.1f}", f"{result['time_ratio']:.2f}"
        table.add_row(short(method), f"{100 * result['accuracy_mean']:.2f}{spread} %", *duration, *flops)
    return table


def next_ideas(args: argparse.Namespace) -> str:
    modes = {"block": {"--mode sample": "masks for each sample"}, "sample": {"--mode block": "a mask for the batch"}}
    ideas = modes[args.mode].copy()
    ideas |= {"--drop-prob 0.5": "cheaper steps, stronger regularisation"} if args.drop_prob < 0.5 else {}
    ideas |= {"--seeds 3": "how far chance goes in the accuracies"} if args.seeds == 1 else {}
    ideas |= {"--epochs 60": "a longer training"} if args.epochs < 60 else {}
    ideas |= {"--out digits.json": "results and learning curves in a file"} if args.out is None else {}
    return "\n  ".join(["Try next:", *(f"{option:18} {what}" for option, what in ideas.items())])


def write_results(out: Path, results: dict | None) -> None:
    """Replaces `out` at one stroke; None tries whether that would work and leaves `out` as it is. Raises OSError."""
    if out.exists() and not (out.is_file() and os.access(out, os.W_OK)):
        raise OSError("it is there already, and not a file that can be written")
    file = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        file.write_text(json.dumps(results, indent=1) + "\n")
        if results is not None:
            os.replace(file, out)
    finally:
        file.unlink(missing_ok=True)


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


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary = (__doc__ or "").split(":")[0] + "."
    parser = argparse.ArgumentParser(description=summary, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    seeds, epochs = number(int, "at least 1", lambda n: n >= 1), number(float, "above 0", lambda x: 0 < x < math.inf)
    probability = number(float, "in [0, 1]", lambda p: 0 <= p <= 1)
    parser.add_argument("--seeds", type=seeds, default=1, help="how many seeds to train with")
    parser.add_argument("--epochs", type=epochs, default=20, help="plain's passes through the data: sets the steps")
    parser.add_argument("--drop-prob", type=probability, default=0.3, help="P(drop) of every path")
    parser.add_argument("--mode", choices=("block", "sample"), default="block", help="drop for the batch or per sample")
    parser.add_argument("--out", type=Path, help="a JSON file for results and curves")
    args = parser.parse_args(argv)
    if args.out is not None:
        try:
            args.out = args.out.resolve()
            write_results(args.out, None)
        except OSError as error:
            parser.error(f"argument --out: can't write {args.out}: {error.strerror or error}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    digits, console = Digits.load(device), Console()
    steps = max(1, round(args.epochs * digits.batches_per_epoch))
    machine = f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    console.print(f"{machine}; {steps} steps of {BATCH_SIZE} images, ViT {MODEL}", highlight=False)
    columns = (BarColumn(bar_width=10), TimeRemainingColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        runs = [compare(seed, digits, args, steps, progress) for seed in range(args.seeds)]
    summary = summarize(runs)
    console.print(results_table(summary, steps))
    console.print(next_ideas(args), highlight=False)
    if args.out is not None:
        config = vars(args) | {"out": str(args.out), "steps": steps, "batch_size": BATCH_SIZE, "model": MODEL}
        config |= {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
        config |= {"learning_rate": LEARNING_RATE, "weight_decay": WEIGHT_DECAY, "counted_steps": COUNTED_STEPS}
        try:
            write_results(args.out, {"config": config, "methods": summary})
        except OSError as error:
            print(f"the results could not be written to {args.out}: {error.strerror or error}", file=sys.stderr)
            return 1
        console.print(f"Results: {args.out}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
