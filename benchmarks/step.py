"""Time and FLOPs of a pair of training steps: ours against the naive pair and plain training, on one ViT.

    python -m benchmarks.step [--quick] [--csv PATH] [--json PATH]

Providers run the same plans one after the other, A B C A B C, so that a busy machine slows all of them. Nothing is
timed before ours has given the naive pair's gradients in float64, and needed FLOPs are counted apart from timing.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import rdp_kernels as rdp
from examples.models import ViT

PROBS, MODES = (0.1, 0.3, 0.5), ("block", "sample")
TARGETS = {"ours exact": 0.75, "ours branch-frozen": 0.66}  # of the naive pair's time: block mode, p = 0.5
SEED = 0


@dataclass(frozen=True)
class Config:
    """`pairs`: how many pairs are timed for each provider, mode and p."""

    dim: int = 192
    depth: int = 12
    heads: int = 4
    image: int = 32
    patch: int = 4
    batch: int = 8
    pairs: int = 12
    dtype: torch.dtype = torch.float32

    def model(self) -> ViT:
        torch.manual_seed(SEED)
        model = ViT(self.image, self.patch, 3, 10, self.dim, self.depth, self.heads)
        return model.to(self.dtype)

    def data(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        return images.to(self.dtype), torch.randint(10, (self.batch,), generator=generator)

    def plans(self, drop_prob: float, mode: str) -> list[rdp.PathPlan]:
        scheme = rdp.ResidualDropPath(self.model(), drop_prob, mode=mode, sampling="fixed", seed=SEED)
        plans = []
        for _ in range(self.pairs):
            with scheme.drop_iteration(self.batch if mode == "sample" else None) as plan:
                plans.append(plan)
        return plans


FULL = Config()
QUICK = Config(dim=64, depth=4, image=16, pairs=2)
VERIFIED = Config(dim=16, depth=4, image=16, batch=6, pairs=3, dtype=torch.float64)


# Providers: `pair` yields after each of its two backwards; what has a gradient then learns


class Provider:
    """A way to run a pair of steps on its own copy of the model; here two plain training steps."""

    name = "plain"
    follows_plan = False
    """Whether its FLOPs depend on the plan."""

    def __init__(self, config: Config, mode: str):
        self.model = config.model()
        self.images, self.labels = config.data()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in range(2):
            self.backward(self.model(self.images))
            yield

    def backward(self, logits: Tensor) -> None:
        F.cross_entropy(logits, self.labels).backward()

    def train(self, plan: rdp.PathPlan) -> None:
        for _ in self.pair(plan):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class DropPath(Provider):
    """Two steps of ordinary drop-path as it is usually written: every branch is computed, then masked."""

    name = "drop-path"

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in range(2):
            self.backward(masked_forward(self.model, self.images, plan))
            yield


class Naive(Provider):
    """The scheme without this package: a masked step, then a full one whose frozen gradients are thrown away.

    In sample mode gradients of weights can't be thrown away for some samples: weights of any dropped sample learn
    from all, so that the time stands for a naive pair and the gradients differ from ours.
    """

    name = "naive"

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        keep = plan.keep.view(plan.num_paths, -1)
        self.backward(masked_forward(self.model, self.images, plan))
        throw_away([path for path, kept in zip(self.model.paths, keep, strict=True) if not kept.any()])
        yield
        self.backward(self.model(self.images))
        rest = (self.model.patches, self.model.norm, self.model.head)
        throw_away([*rest, *(path for path, kept in zip(self.model.paths, keep, strict=True) if kept.all())])
        self.model.position.grad = None
        yield


class Ours(Provider):
    name = "ours exact"
    follows_plan = True
    freeze = "parameters"

    def __init__(self, config: Config, mode: str):
        super().__init__(config, mode)
        self.scheme = rdp.ResidualDropPath(self.model, mode=mode, freeze=self.freeze)

    def pair(self, plan: rdp.PathPlan) -> Iterator[None]:
        for _ in self.scheme.iterations(plan=plan):
            self.backward(self.model(self.images))
            yield


class OursBranchFrozen(Ours):
    name = "ours branch-frozen"
    freeze = "branch"


PROVIDERS = (Provider, Naive, DropPath, Ours, OursBranchFrozen)


def masked_forward(model: ViT, images: Tensor, plan: rdp.PathPlan) -> Tensor:
    """`model(images)` in plain torch, every branch computed for every sample and multiplied by mask / (1 − p)."""
    x = model.patches(images).flatten(2).mT + model.position
    for path, keep, drop_prob in zip(model.paths, plan.keep, plan.drop_probs, strict=True):
        mask = keep.to(x.dtype).expand(len(x)).view(-1, 1, 1) / (1 - drop_prob)
        x = x + path.fn(path.norm(x)) * mask
    return model.head(model.norm(x).mean(dim=1))


def throw_away(modules: list[nn.Module]) -> None:
    for module in modules:
        for parameter in module.parameters():
            parameter.grad = None


# Correctness, then FLOPs, then time


def verify() -> float:
    """Largest difference between gradients of ours and the naive pair's. Raises `SystemExit` where it exceeds 1e-10.

    Block mode throughout; in sample mode the drop step and, sample by sample, the reuse step.
    """
    worst = 0.0
    for drop_prob in PROBS:
        for plan in VERIFIED.plans(drop_prob, "block"):
            wanted, got = (gradients(provider(VERIFIED, "block"), plan) for provider in (Naive, Ours))
            worst = max(worst, difference(wanted, got))
        for plan in VERIFIED.plans(drop_prob, "sample"):
            got = gradients(Ours(VERIFIED, "sample"), plan)
            worst = max(worst, difference(textbook_sample_gradients(plan), got))
    if not worst <= 1e-10:
        sys.exit(f"not timed: gradients differ from the naive pair's by {worst:.1e} in float64")
    return worst


def gradients(provider: Provider, plan: rdp.PathPlan) -> list[dict[str, Tensor]]:
    steps = []
    for _ in provider.pair(plan):
        steps.append({name: p.grad for name, p in provider.model.named_parameters() if p.grad is not None})
        provider.optimizer.zero_grad(set_to_none=True)
    return steps


def textbook_sample_gradients(plan: rdp.PathPlan) -> list[dict[str, Tensor]]:
    """Sample mode: the naive drop step, and a full step for each sample, which the paths that kept it ignore."""
    provider = Naive(VERIFIED, "sample")
    drop = gradients(provider, plan)[0]
    reuse: dict[str, Tensor] = {}
    for sample, keep in enumerate(plan.keep.T):
        logits = provider.model(provider.images[sample : sample + 1])
        loss = F.cross_entropy(logits, provider.labels[sample : sample + 1]) / len(provider.images)
        loss.backward()
        for path, kept in enumerate(keep.tolist()):
            for name, p in provider.model.paths[path].named_parameters(prefix=f"paths.{path}"):
                if not kept:
                    reuse[name] = reuse.get(name, 0) + p.grad
        provider.optimizer.zero_grad(set_to_none=True)
    return [drop, reuse]


def difference(wanted: list[dict[str, Tensor]], got: list[dict[str, Tensor]]) -> float:
    if [step.keys() for step in wanted] != [step.keys() for step in got]:
        return float("inf")  # what learns is not the same
    return max((w[n] - g[n]).abs().max().item() for w, g in zip(wanted, got, strict=True) for n in w)


def count_flops(provider: Provider, plans: list[rdp.PathPlan]) -> float:
    """Mean FLOPs of a pair. Warms up as well."""
    counts = []
    for plan in plans if provider.follows_plan else plans[:1]:
        with FlopCounterMode(display=False) as counter:
            provider.train(plan)
        counts.append(counter.get_total_flops())
    return statistics.mean(counts)


def time_pairs(providers: list[Provider], plans: list[rdp.PathPlan]) -> list[list[float]]:
    """Milliseconds of every pair, a list for each provider, interleaved."""
    times: list[list[float]] = [[] for _ in providers]
    for plan in plans:
        for provider, mine in zip(providers, times, strict=True):
            start = time.perf_counter()
            provider.train(plan)
            mine.append(1e3 * (time.perf_counter() - start))
    return times


def measure(config: Config, mode: str, drop_prob: float) -> list[dict]:
    plans = config.plans(drop_prob, mode)
    providers = [provider(config, mode) for provider in PROVIDERS]
    flops = [count_flops(provider, plans) for provider in providers]
    rows = []
    for provider, times, count in zip(providers, time_pairs(providers, plans), flops, strict=True):
        rows.append({"provider": provider.name, "mode": mode, "p": drop_prob, "pairs": len(plans)})
        rows[-1] |= {"min_ms": min(times), "median_ms": statistics.median(times), "gflop": count / 1e9}
    for base in ("naive", "plain"):
        (of,) = (dict(row) for row in rows if row["provider"] == base)
        for row in rows:
            row |= {f"{kind}_vs_{base}": row[kind] / of[kind] for kind in ("min_ms", "median_ms", "gflop")}
    return rows


# Reporting


def machine() -> dict[str, str | int]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line for line in lines if line.startswith("model name")), "")
    git = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    return {
        "device": cpu.partition(":")[2].strip() or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip(),
        "date": datetime.date.today().isoformat(),
    }


def table_of(rows: list[dict], title: str) -> Table:
    table = Table(title=title)
    columns: dict[str, Callable[[dict], str]] = {
        "mode": lambda row: row["mode"],
        "p": lambda row: str(row["p"]),
        "provider": lambda row: row["provider"],
        "min ms": lambda row: f"{row['min_ms']:.0f}",
        "median ms": lambda row: f"{row['median_ms']:.0f}",
    }
    for base in ("naive", "plain"):
        columns[f"min / {base}"] = lambda row, base=base: f"{row[f'min_ms_vs_{base}']:.3f}"
        columns[f"median / {base}"] = lambda row, base=base: f"{row[f'median_ms_vs_{base}']:.3f}"
        columns[f"FLOPs / {base}"] = lambda row, base=base: f"{row[f'gflop_vs_{base}']:.3f}"
    for name in columns:
        table.add_column(name, justify="left" if name in ("mode", "provider") else "right")
    for row in rows:
        table.add_row(*(show(row) for show in columns.values()), end_section=row["provider"] == PROVIDERS[-1].name)
    return table


def targets_of(rows: list[dict]) -> Iterator[str]:
    for row in rows:
        target = TARGETS.get(row["provider"])
        if target is not None and (row["mode"], row["p"]) == ("block", 0.5):
            low, middle = row["min_ms_vs_naive"], row["median_ms_vs_naive"]
            verdict = "met" if max(low, middle) <= target else "MISSED"
            yield f"{row['provider']}: {low:.3f} (min), {middle:.3f} (median) of naive, target {target}: {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, p = 0.5 only: does it run at all")
    parser.add_argument("--csv", type=Path, help="write the rows here")
    parser.add_argument("--json", type=Path, help="and here")
    options = parser.parse_args()
    config, console = QUICK if options.quick else FULL, Console(width=150)
    console.print(f"gradients equal the naive pair's to {verify():.1e} (float64)")
    facts = machine()
    rows = []
    for mode in MODES:
        for drop_prob in PROBS[-1:] if options.quick else PROBS:
            rows += [facts | row for row in measure(config, mode, drop_prob)]
    verdicts = [] if options.quick else targets_of(rows)
    console.print(table_of(rows, "A pair of steps: forward, backward, AdamW"), *verdicts, sep="\n")
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
