"""Self-distillation without labels (DINO, arXiv 2104.14294) on scikit-learn's digits, with drop-path in the student:

    python examples/dino.py                                  # under a minute on one core
    python examples/dino.py --scheme drop-path --seed 1
    python examples/dino.py --resume                         # continues a run that was stopped or killed

The teacher gets 2 large crops of each image. The student gets these and 8 small ones, in two forwards with different
image and batch sizes. For each crop the student learns to predict the teacher's output for another crop. The teacher's
weights are an average of the student's past weights. Centering and sharpening the outputs and, as in DINOv2 (arXiv
2304.07193), spreading the features (KoLeo) prevent one output for all images. A k-NN classifier on the teacher's
features shows what was learned. Schemes:

    plain              every branch runs and learns
    drop-path          stochastic depth for each sample of each crop; dropped samples are skipped
    residual-droppath  `rdp.ResidualDropPath`: two cheap optimizer steps per batch, on the same crops and targets

Needs scikit-learn; rich draws a progress bar if it is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin, on a busy machine for longer than they work

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

import rdp_kernels as rdp
from examples.digits.analysis import knn_accuracy, weights_sha256
from examples.digits.command import Problem, add_option, add_run_options, begin_run, display
from examples.digits.data import Digits, crops
from examples.digits.storage import Folder, StorageError
from examples.models import ViT

LARGE, SMALL = 2, 8  # crops per image
LARGE_SIDE, SMALL_SIDE, PATCH = 12, 8, 4  # pixels
LARGE_AREA, SMALL_AREA = (0.6, 1.0), (0.4, 0.8)  # shares of the image's area
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.04
TEACHER_MOMENTUM, CENTER_MOMENTUM = 0.98, 0.8
KOLEO, LEARNING_RATE = 0.3, 2e-3
LIMITS = {"drop_prob": (0, 1), "seed": (0, 2**31 - 1), "batch_size": (2, 1e3)}
LIMITS |= {"epochs": (1, 1e6), "save_every": (1, 1e6)}


class Head(nn.Module):
    """Returns cosines between a projection of the features and prototypes. Both are learned."""

    def __init__(self, dim: int, prototypes: int, hidden: int = 128, bottleneck: int = 32):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, bottleneck))
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))
        for layer in (self.project[0], self.project[2]):  # outputs that differ between images from the start
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(self.project(features), dim=-1), F.normalize(self.prototypes, dim=-1))


class Network(ViT):
    """Student or teacher. Takes square images of any size; returns features `[B, dim]` and logits `[B, prototypes]`."""

    def __init__(self, drop_prob: float = 0.0, dim: int = 32, depth: int = 3, prototypes: int = 128):
        super().__init__(LARGE_SIDE, PATCH, dim=dim, depth=depth, drop_prob=drop_prob, position_std=0.1)
        self.head = Head(dim, prototypes)

    def classify(self, stream: Tensor) -> tuple[Tensor, Tensor]:
        features = self.norm(stream).mean(dim=1)
        return features, self.head(features)


def dino_loss(logits: Tensor, answers: Tensor) -> Tensor:
    """Returns the mean cross-entropy between the student's logits for crop s, `[LARGE + SMALL, B, prototypes]`, and the
    teacher's probabilities for crop t, `[LARGE, B, prototypes]`, over all s ≠ t."""
    log_probs = (logits / STUDENT_TEMPERATURE).log_softmax(dim=-1)
    losses = -torch.einsum("tbk,sbk->ts", answers, log_probs) / logits.shape[1]
    return (losses.sum() - losses.diagonal().sum()) / (losses.numel() - len(losses))


def koleo_loss(features: Tensor) -> Tensor:
    """Returns minus the mean log distance of each row of `[B, dim]` to its nearest neighbour on the sphere."""
    points = F.normalize(features, dim=-1)
    nearest = (points @ points.T).fill_diagonal_(-2).argmax(dim=-1)
    return -((points - points[nearest]).norm(dim=-1) + 1e-8).log().mean()


class Training:
    """Can stop between any two optimizer steps. Continuing from its state gives the same bits."""

    def __init__(self, options: argparse.Namespace, state: dict[str, Any] | None):
        self.options, self.digits = options, Digits.load(torch.device("cpu"))
        self.batches_per_epoch = len(self.digits.train_images) // options.batch_size
        self.total = options.epochs * self.batches_per_epoch
        torch.manual_seed(options.seed)
        self.student = Network(options.drop_prob if options.scheme == "drop-path" else 0.0)
        self.teacher = copy.deepcopy(self.student).requires_grad_(False).eval()  # drops nothing and has no scheme
        self.scheme: rdp.ResidualDropPath | None = None
        if options.scheme == "residual-droppath":
            self.scheme = rdp.ResidualDropPath(self.student, options.drop_prob, mode=options.mode, seed=options.seed)
        self.optimizer = torch.optim.AdamW(self.student.parameters(), LEARNING_RATE, weight_decay=0.05)
        self.schedule = CosineAnnealingLR(self.optimizer, self.total)
        self.center = torch.zeros(len(self.student.head.prototypes))  # mean of the teacher's logits
        names = ["student", "teacher", "optimizer", "schedule"] + ["scheme"] * (self.scheme is not None)
        self.parts = {name: getattr(self, name) for name in names}
        self.batch: tuple[Tensor, ...] | None = None
        self.record: dict[str, Any] = {"options": vars(options), "batches": 0, "steps": {}, "losses": [], "epochs": []}
        if state is not None:
            self.load_state_dict(state)

    def run(self, folder: Folder) -> None:
        folder.prepare()
        record = self.record
        with display(self.total, record["batches"]) as (advance, line):
            if not record["epochs"]:
                self.end_epoch(line)
            while record["batches"] < self.total:
                self.step()
                if self.batch is None:  # no reuse iteration follows
                    advance(description=f"loss {statistics.fmean(record['losses'][-20:]):.3f}")
                    if record["batches"] % self.batches_per_epoch == 0:
                        self.end_epoch(line)
                if sum(record["steps"].values()) % self.options.save_every == 0 or record["batches"] == self.total:
                    folder.save_checkpoint(self.state_dict())
        results = {name: value for name, value in record.items() if name != "losses"}
        results["weights_sha256"] = weights_sha256(self.teacher)
        folder.write("results.json", json.dumps(results, indent=1).encode())

    def step(self) -> None:
        """Runs one optimizer step. Both iterations of a pair have the same crops and targets. The teacher is updated
        after the pair."""
        large, small, answers, mean_logits = self.batch = self.batch or self.draw_batch()
        phase = self.options.scheme if self.scheme is None else "reuse" if self.scheme.reuse_pending else "drop"
        with self.iteration():
            features, logits = self.student(large)
            logits = torch.cat([logits, self.student(small)[1]]).unflatten(0, (LARGE + SMALL, -1))
            loss = dino_loss(logits, answers) + KOLEO * sum(map(koleo_loss, features.chunk(LARGE))) / LARGE
            loss.backward()
            nn.utils.clip_grad_norm_(self.student.parameters(), 3.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        self.record["losses"].append(loss.item())
        self.record["steps"][phase] = self.record["steps"].get(phase, 0) + 1
        if self.scheme is None or not self.scheme.reuse_pending:
            self.end_batch(mean_logits)

    def iteration(self) -> contextlib.AbstractContextManager:
        """Opens the next iteration, as `for phase in scheme.iterations(sizes)` does. A checkpoint can be written
        between the two iterations."""
        if self.scheme is None:
            return contextlib.nullcontext()
        sizes = [crops * self.options.batch_size for crops in (LARGE, SMALL)]  # an entry for each forward, in order
        return self.scheme.reuse_iteration() if self.scheme.reuse_pending else self.scheme.drop_iteration(sizes)

    @torch.no_grad()
    def draw_batch(self) -> tuple[Tensor, ...]:
        """Returns large and small crops, and the teacher's outputs and mean logits. They are the same in every call for
        a batch."""
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.record["batches"])
        chosen = torch.randint(len(self.digits.train_images), (self.options.batch_size,), generator=generator)
        images = self.digits.train_images[chosen]
        large = crops(images, LARGE, LARGE_SIDE, LARGE_AREA, generator)
        small = crops(images, SMALL, SMALL_SIDE, SMALL_AREA, generator)
        logits = self.teacher(large)[1]
        answers = ((logits - self.center) / TEACHER_TEMPERATURE).softmax(dim=-1)
        return large, small, answers.unflatten(0, (LARGE, -1)), logits.mean(dim=0)

    @torch.no_grad()
    def end_batch(self, mean_logits: Tensor) -> None:
        """Updates the teacher, with less and less weight, and the center."""
        done = self.record["batches"] / self.total
        weight = (1 - TEACHER_MOMENTUM) * (1 + math.cos(math.pi * done)) / 2
        for average, value in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            average.lerp_(value, weight)
        self.center.lerp_(mean_logits, 1 - CENTER_MOMENTUM)
        self.schedule.step()  # once per batch: both iterations of a pair have the same learning rate
        self.record["batches"] += 1
        self.batch = None

    @torch.no_grad()
    def end_epoch(self, line: Callable[[str], None]) -> None:
        def features(images: Tensor) -> Tensor:
            return self.teacher(F.interpolate(images, (LARGE_SIDE, LARGE_SIDE), mode="bilinear"))[0]

        digits, losses = self.digits, self.record["losses"]
        sets = (features(digits.train_images), digits.train_labels, features(digits.test_images), digits.test_labels)
        epoch = {"epoch": len(self.record["epochs"]), "loss": sum(losses) / max(1, len(losses))}
        self.record["epochs"].append(epoch | {"knn": knn_accuracy(*sets)})
        line("epoch {epoch}: loss {loss:.3f}, k-NN accuracy {knn:.1%}".format(**self.record["epochs"][-1]))
        losses.clear()

    def state_dict(self) -> dict[str, Any]:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        return self.record | parts | {"center": self.center, "rng": torch.get_rng_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.center.copy_(state["center"])
        self.record = {name: state[name] for name in self.record}
        torch.set_rng_state(state["rng"])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(add_option, parser)
    add("--scheme", "training scheme", "residual-droppath", choices=("plain", "drop-path", "residual-droppath"))
    add("--drop-prob", "P(drop) of every residual branch", 0.3, type=float)
    add("--mode", "residual-droppath: drop per sample, or for the whole batch", "sample", choices=("sample", "block"))
    add("--epochs", "epochs; each has as many batches as the data", 8, type=int)
    add("--batch-size", "images in a batch", 32, type=int)
    add("--seed", "seed of weights, crops and draws", 0, type=int)
    add("--save-every", "optimizer steps between two checkpoints", 25, type=int)
    add_run_options(parser, "report/dino-SCHEME")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options, state, folder = begin_run(build_parser(), argv, lambda args: f"dino-{args.scheme}", LIMITS)
        if (options.scheme, options.mode) == ("drop-path", "block"):
            raise Problem("argument --mode: must be sample with --scheme drop-path")
        Training(options, state).run(folder)
    except (Problem, StorageError) as problem:
        print(f"dino.py: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Continue from the last checkpoint with --resume")
        return 130
    print(f"Results: {folder.path / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
