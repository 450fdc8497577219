"""`python -m benchmarks memory`: the bytes that an iteration saves for its backward, and its peak of allocated bytes.

"saved" counts the storages that autograd saves in the forward for the backward, each once. Parameters, buffers and the
batch are left out, as they exist anyway. "peak" is the largest number of bytes allocated during an iteration (forward,
backward, AdamW) beyond those allocated before it. It includes gradients and all intermediate results. Both are counted
for the trainers that `step` times, on the same plans. The counts are the same in every run; on the CPU they are those
of one thread. They are shown as ratios to plain training's, for the mean and for the largest of the plans.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import rdp_kernels as rdp

from . import command
from .cases import BF16, DTYPES, MODELS, MODES, OWN_FULL, PROBS, VERIFIED, Config, config_of, draw_plans, scheme_refusal
from .harness import Row, quotient
from .machine import Device, facts
from .pairs import TRAINERS, Exact, Plain
from .pass_tables import Columns
from .step import case_table, notes_of

FULL_PLANS, FEW_PLANS = 6, 2
STEP, DROP, REUSE = "step", "drop", "reuse"


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "memory", help="saved and peak bytes", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", choices=MODELS, default=tuple(OWN_FULL), help=f"default: {' '.join(OWN_FULL)}"
    )
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES, help=f"default: {' '.join(MODES)}")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="bf16 by autocast; default: float32")
    plans = f"plans of each case; default: {FULL_PLANS}"
    quick = f"half of the images, p = 0.3, {FEW_PLANS} plans"
    command.add_options(parser, plans, quick, f"tiny networks, p = 0.5, {FEW_PLANS} plans")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Counts, prints and writes. An interrupt keeps the rows so far."""
    if not command.has_device(options.device):
        return 2
    console, device = Console(width=command.WIDTH), Device.of(options.device)
    size, plans = options.size, FULL_PLANS if options.size == "full" else FEW_PLANS
    choices = itertools.product(options.model, options.mode, {"tiny": PROBS[-1:], "quick": PROBS[1:2]}.get(size, PROBS))
    cases = [
        MemoryCase(config_of(size, model, device), mode, p, {"size": size, "model": model}, DTYPES[options.dtype])
        for model, mode, p in choices
    ]
    plans = options.turns or plans
    rows, code = command.measured(
        console,
        [lambda: cases],
        len(cases) * plans,
        lambda on_round: MemorySession(device, plans, on_round),
        one_threaded=True,
        keep=lambda rows: command.write_rows(options, rows),
    )
    if rows:
        console.print(table_of(rows), *notes_of(rows), sep="\n")
    return code if command.written(options, rows) else 1


# Counting


@dataclass(frozen=True)
class Use:
    """Bytes of one iteration."""

    saved: int
    peak: int


def uses_of(trainer: Plain, plan: rdp.PathPlan, device: torch.device) -> list[Use]:
    """Returns the bytes of each iteration of a pair, with its optimizer step. If the optimizer has no state yet, the
    new state is part of the peak."""
    pair, model = trainer.pair(plan), trainer.model
    there = [*model.parameters(), *model.buffers(), trainer.images, trainer.labels]

    def iteration() -> None:
        next(pair)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)

    uses = []
    for _ in range(2):
        with saved_storages(there) as saved:
            peak = peak_of(iteration, device)
        uses.append(Use(sum(saved.values()), peak))
    next(pair, None)  # closes the last iteration
    return uses


@contextmanager
def saved_storages(there: list[Tensor]) -> Iterator[dict[int, int]]:
    """Yields the bytes of each storage that autograd saves, by address. Storages of the tensors in `there` are left
    out."""
    known = {t.untyped_storage().data_ptr() for t in there}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        yield saved


def peak_of(run: Callable[[], object], device: torch.device) -> int:
    """Returns the peak of bytes that torch's allocator has given out during `run()`, beyond those at its start. On a
    GPU the allocator counts them. On the CPU torch.profiler records each allocation of `run()`; it doesn't see that
    `run()` frees an earlier one, but an iteration frees none."""
    gc.disable()  # collecting garbage at another moment would change the peak
    try:
        if device.type == "cpu":
            return _peak_of_records(run)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    finally:
        gc.enable()


def _peak_of_records(run: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it logs every start and stop
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
            run()
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    records = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    changes = [record["args"]["Bytes"] for record in sorted(records, key=lambda record: record["ts"])]
    return max(itertools.accumulate(changes, initial=0))


# Cases


@dataclass(frozen=True)
class MemoryCase:
    """One row group of the table. `labels["model"]` names the network; with `autocast` steps run under bf16
    autocast."""

    config: Config
    mode: str
    drop_prob: float
    labels: dict[str, Any]
    autocast: bool = False


class MemorySession:
    """Counts cases on one device and collects their `rows`.

    Args:
        plans: the number of plans of each case. Plain, drop-path and naive use only the first, as all give the same.
        on_round: called after every plan.
    """

    def __init__(self, device: Device, plans: int, on_round: Callable[[], object] = lambda: None):
        self.device, self.plans, self.on_round = device, plans, on_round
        self.rows: list[Row] = []
        self._facts = facts(device)

    def measure(self, case: MemoryCase) -> None:
        """Counts `case`. After an interrupt the complete plans are kept."""
        device, refusal = self.device.device, scheme_refusal(VERIFIED[case.labels["model"]], case.mode)
        trainers = {
            kind: case.config.trainer(kind, case.mode, device, case.autocast)
            for kind in TRAINERS
            if refusal is None or not kind.follows_scheme
        }
        paths = len(trainers[Plain].network.branches)
        plans = draw_plans(paths, case.config.batch, self.plans, case.mode, case.drop_prob)
        for trainer in trainers.values():
            trainer.train(plans[0])  # creates the optimizer's state
        uses: list[dict[type[Plain], list[Use]]] = []
        try:
            for turn, plan in enumerate(plans):
                chosen = {kind: t for kind, t in trainers.items() if turn == 0 or issubclass(kind, Exact)}
                uses.append({kind: uses_of(trainer, plan, device) for kind, trainer in chosen.items()})
                self.on_round()
        finally:
            if uses:
                self.rows += self._rows(case, uses, refusal or "")

    def _rows(self, case: MemoryCase, uses: list[dict[type[Plain], list[Use]]], refusal: str) -> Iterator[Row]:
        plain = uses[0][Plain][0]
        labels = case.labels | {"batch": case.config.batch, "mode": case.mode, "p": case.drop_prob}
        labels |= {"dtype": BF16 if case.autocast else "float32"}
        for kind in TRAINERS:
            pairs = [by_kind[kind] for by_kind in uses if kind in by_kind]
            for number, iteration in enumerate((DROP, REUSE) if kind.follows_scheme else (STEP,)):
                row = self._facts | {"unit": "iteration"} | labels | {"provider": kind.name, "iteration": iteration}
                those = [pair[number] for pair in pairs]
                row |= {"plans": len(those)}
                row |= summary("saved", [use.saved for use in those], plain.saved)
                row |= summary("peak", [use.peak for use in those], plain.peak)
                yield row | {"unavailable": "" if those else refusal}


def summary(name: str, sizes: list[int], plain: int) -> Row:
    """Returns mean and maximum, in bytes and as ratios to plain training's."""
    mean, largest = (statistics.mean(sizes), max(sizes)) if sizes else (None, None)
    return {
        f"{name}_mean_bytes": mean,
        f"{name}_max_bytes": largest,
        f"{name}_ratio": quotient(mean, plain),
        f"{name}_max_ratio": quotient(largest, plain),
    }


# Tables

COLUMNS: Columns = {
    "saved MB": ("saved_mean_mb", ",.1f"),
    "saved": ("saved_ratio", ".3f"),
    "largest": ("saved_max_ratio", ".3f"),
    "peak MB": ("peak_mean_mb", ",.1f"),
    "peak": ("peak_ratio", ".3f"),
    "largest peak": ("peak_max_ratio", ".3f"),
}


def table_of(rows: list[Row]) -> Table:
    title = "Memory of an iteration (forward, backward, AdamW); means over the plans, and ratios to plain's step"
    megabytes = [
        {f"{name}_mean_mb": _megabytes(row[f"{name}_mean_bytes"]) for name in ("saved", "peak")} for row in rows
    ]
    rows = [row | more for row, more in zip(rows, megabytes, strict=True)]
    return case_table(rows, COLUMNS, title, command.machine_line(rows[0]), ("provider", "iteration"))


def _megabytes(size: float | None) -> float | None:
    return None if size is None else size / 1e6
