"""The effect of skip connections: stacks of the same layer without, with addition (ResNet), with concatenation
(DenseNet).

    python examples/skip_connections.py --quick                  # seconds
    python examples/skip_connections.py                          # about three minutes on two cores
    python examples/skip_connections.py --no-norm --out report/skips-no-norm

Each kind is trained on scikit-learn's digits at several depths, all seeds at once. All kinds have about as many
parameters at a depth. The study measures how gradients reach the first layers at the start and early in training, the
accuracy, the effect of removing layers, and how many layers matter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path

# Idle OpenMP threads spin, on a busy machine for far longer than they work.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

from benchmarks.machine import Device, facts
from examples.digits.data import Digits
from examples.digits.storage import Folder, StorageError
from examples.skips.networks import KINDS
from examples.skips.plots import draw_all
from examples.skips.results import AFTER, BEFORE, estimates, findings, to_csv
from examples.skips.study import Config, Measured, measure

DEPTHS = (4, 8, 16, 32, 64)
QUICK = {"seeds": 3, "depths": (4, 16), "steps": 60}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Config()
    parser.add_argument("--quick", action="store_true", help=f"a small study, in seconds: {QUICK}")
    parser.add_argument("--seeds", type=int, help=f"at least 2 for intervals (default: {default.seeds})")
    parser.add_argument(
        "--depths", type=int, nargs="+", help=f"numbers of layers (default: {' '.join(map(str, DEPTHS))})"
    )
    parser.add_argument("--steps", type=int, help=f"optimizer steps of each training (default: {default.steps})")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="(default: all)")
    parser.add_argument(
        "--no-norm", action="store_true", help="layers without LayerNorm; learning rates are those chosen with it"
    )
    parser.add_argument("--learning-rate", type=float, help="for all (default: one for each kind and depth)")
    parser.add_argument("--validate", action="store_true", help="test on a part of the training set, to choose rates")
    parser.add_argument("--out", type=Path, default=Path("report/skips"), help="folder (default: %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(argv)
    chosen = {name: getattr(args, name) or (value if args.quick else None) for name, value in QUICK.items()}
    limits = {"seeds": (1, 1000), "steps": (1, 100_000), "depths": (1, 1000), "learning_rate": (1e-9, 10)}
    for name, (low, high) in limits.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [] if given is None else [given]:
            if not low <= value <= high:
                parser.error(f"argument --{name.replace('_', '-')}: must be in [{low}, {high}], got {value}")
    depths = sorted(set(chosen["depths"] or DEPTHS))
    config = Config(
        seeds=chosen["seeds"] or Config.seeds,
        steps=chosen["steps"] or Config.steps,
        normalise=not args.no_norm,
        validate=args.validate,
        learning_rate=args.learning_rate,
    )
    folder = Folder(args.out)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: can't write to {folder.path}: {error.strerror or error}")
    try:
        return run(config, args.kinds, depths, folder)
    except StorageError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130


def run(config: Config, kinds: list[str], depths: list[int], folder: Folder) -> int:
    console = Console()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    digits = Digits.load(device, config.validate)
    studied: list[Measured] = []
    columns = (BarColumn(bar_width=20), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, refresh_per_second=4) as progress:
        total = config.steps * len(kinds) * sum(map(cost, depths))
        task = progress.add_task("", total=total)
        for depth in depths:
            for kind in kinds:
                progress.update(task, description=f"{depth} layers, {kind}")
                studied.append(
                    measure(kind, depth, config, digits, lambda depth=depth: progress.advance(task, cost(depth)))
                )
    folder.write("results.csv", to_csv(studied, config, facts(Device.of(device.type))).encode())
    for name, image in draw_all(studied).items():
        folder.write(name, image)
    norm = "LayerNorm → ReLU → Linear" if config.normalise else "ReLU → Linear"
    spread = f"mean ± 95 % interval over {config.seeds} seeds" if config.seeds > 1 else "one seed"
    console.print(f"Stacks of {norm} on handwritten digits, {config.steps} steps; {spread}", highlight=False)
    console.print(before_table(studied), after_table(studied, "validation" if config.validate else "test"))
    for sentence in findings(studied):
        console.print(f"- {sentence}", highlight=False)
    console.print(f"Figures and results.csv: {folder.path}", highlight=False, soft_wrap=True)
    return 0


def cost(depth: int) -> int:
    """Returns the cost of a training step in units of a layer's."""
    return depth + 4


def before_table(studied: list[Measured]) -> Table:
    table = _table(
        "Before training",
        "lg: log10 of the ratio of gradient norms, first layer's to last layer's. "
        "Alikeness: mean cosine between the final states of different images.",
        ("kind", "depth", "params", *(heading for heading, _, _ in BEFORE.values())),
    )
    for measured, last in _by_kind(studied):
        cells = (measured.kind, str(measured.depth), f"{measured.parameters:,}", *estimates(measured, BEFORE))
        table.add_row(*cells, end_section=last)
    return table


def after_table(studied: list[Measured], test_set: str) -> Table:
    table = _table(
        "After training",
        f"Accuracy on the {test_set} set; removed: without one layer, or without a quarter of them, picked at random. "
        "Effective depth, the layers that matter: (Σe)²/Σe² of the losses e that removing each of them adds.",
        ("kind", "depth", *(heading for heading, _, _ in AFTER.values())),
    )
    for measured, last in _by_kind(studied):
        table.add_row(measured.kind, str(measured.depth), *estimates(measured, AFTER), end_section=last)
    return table


def _table(title: str, caption: str, headings: tuple[str, ...]) -> Table:
    table = Table(title=title, caption=caption, caption_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "kind" else "right", no_wrap=heading == "kind")
    return table


def _by_kind(studied: list[Measured]) -> Iterator[tuple[Measured, bool]]:
    """Yields kind by kind, with whether it is the last of its kind."""
    for kind in {measured.kind: None for measured in studied}:
        own = [measured for measured in studied if measured.kind == kind]
        yield from ((measured, measured is own[-1]) for measured in own)


if __name__ == "__main__":
    sys.exit(main())
