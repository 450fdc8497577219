"""The step cases: a pair of training steps on a network, a mode and p, by every trainer of `pairs.py`."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

import rdp_kernels as rdp
from examples.models import ResidualClassifier, ResNet, ViT
from rdp_kernels.estimate import ModelCost, kept_fractions

from .harness import Case, Check, Provider
from .machine import Device, one_thread
from .pairs import TRAINERS, Exact, Plain
from .parts import parts_of
from .textbook import Textbook, largest_difference, state_after
from .traffic import Traffic

MODES, PROBS = ("block", "sample"), (0.1, 0.3, 0.5)
BOUND = 1e-10  # of the largest error, in float64
VERIFIED_PLANS = 3
CPU = torch.device("cpu")
SEED = 0


@dataclass(frozen=True)
class Config:
    """A network and its batch of `[batch, 3, image, image]`."""

    build: Callable[[], ResidualClassifier]
    batch: int
    image: int = 32
    dtype: torch.dtype = torch.float32

    def model(self, device: torch.device) -> ResidualClassifier:
        """The same weights every time."""
        torch.manual_seed(SEED)
        return self.build().to(device, self.dtype)

    def data(self, device: torch.device, number: int = 0) -> tuple[Tensor, Tensor]:
        """Batch `number`: images and labels."""
        generator = torch.Generator().manual_seed(SEED + number)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        labels = torch.randint(10, (self.batch,), generator=generator)
        return images.to(device, self.dtype), labels.to(device)

    def batches(self, device: Device) -> list[tuple[Tensor, Tensor]]:
        """On a GPU as many as keep a turn from finding its images in the L2 cache; the CPU's caches are left to a
        training's own traffic."""
        first = self.data(device.device)
        count = device.input_sets(first[0].nbytes) if device.device.type == "cuda" else 1
        return [first, *(self.data(device.device, number) for number in range(1, count))]

    def plans(self, count: int, mode: str, drop_prob: float) -> list[rdp.PathPlan]:
        """The first plans that drop something: without that there is no reuse iteration, and a pair would be one step
        for us and two for the others. Never ends at p = 0."""
        # freeze="none" draws the same plans and takes BatchNorm in sample mode, which drop-path can do
        drawing = {"mode": mode, "freeze": "none", "sampling": "fixed", "seed": SEED}
        scheme = rdp.ResidualDropPath(self.model(CPU), drop_prob, **drawing)
        plans: list[rdp.PathPlan] = []
        while len(plans) < count:
            with scheme.drop_iteration(self.batch if mode == "sample" else None) as plan:
                plans += [plan] * bool(plan.dropped_paths)
        return plans

    def trainer(self, kind: type[Plain], mode: str, device: torch.device) -> Plain:
        return kind(self.model(device), *self.data(device), mode)


# A plain step of either takes between 100 and 300 ms on two cores. Enough paths for p = 0.1 to drop one in block mode.
FULL = {
    "vit": Config(partial(ViT, 32, 4, 3, 10, 192, 12, 4), batch=16),
    "resnet": Config(partial(ResNet, 3, 10, (32, 64, 128), 4), batch=24),
}
QUICK = {
    "vit": Config(partial(ViT, 16, 4, 3, 10, 64, 4, 4), batch=8, image=16),
    "resnet": Config(partial(ResNet, 3, 10, (16, 32), 2), batch=8, image=16),
}
SIZES = {"full": FULL, "quick": QUICK}
VERIFIED = {
    "vit": Config(partial(ViT, 16, 4, 3, 10, 16, 4, 4, layer_scale=0.5), batch=6, image=16, dtype=torch.float64),
    "resnet": Config(partial(ResNet, 3, 10, (4, 8), 2), batch=6, image=16, dtype=torch.float64),
}
MODELS = tuple(FULL)


def step_case(
    size: str,
    model: str,
    mode: str,
    drop_prob: float,
    turns: int,
    device: Device | None = None,
    batch: int | None = None,
) -> Case:
    """One row group of the table: turn i of every provider is a pair of steps on plan i.

    Args:
        size: `"full"` or `"quick"`; verification has a size of its own.
        device: the CPU by default. On a GPU turns take different images, so that none is in the cache.
        batch: images, in the place of the size's own.
    """
    config = SIZES[size][model]
    config = config if batch is None else replace(config, batch=batch)
    device = device or Device.of("cpu")
    plans, batches = config.plans(turns, mode, drop_prob), config.batches(device)
    built, (images, _) = config.model(device.device), batches[0]
    kept = [computed_fractions(built, plan) for plan in plans]
    cost, traffic = ModelCost.of(built, images), Traffic.of(built, images)
    refusal = scheme_refusal(config, mode)

    def provider(kind: type[Plain]) -> Provider:
        if refusal is not None and kind.follows_scheme:
            return Provider.missing(kind.name, refusal)
        trainer = config.trainer(kind, mode, device.device)

        def run(turn: int) -> None:
            trainer.images, trainer.labels = batches[turn % len(batches)]
            trainer.train(plans[turn % len(plans)])

        return Provider(
            kind.name,
            run=run,
            verify=lambda: verify(kind, model, mode, drop_prob, device.device),
            needed_flop=statistics.mean(kind.needs(cost, fractions) for fractions in kept),
            needed_bytes=statistics.mean(kind.needs(traffic, fractions) for fractions in kept),
            minimal=kind.minimal,
        )

    labels = {"size": size, "model": model, "batch": config.batch, "mode": mode, "p": drop_prob}
    return Case(labels, "pair of steps", Plain.name, [provider(kind) for kind in TRAINERS])


@one_thread()
def verify(kind: type[Plain], model: str, mode: str, drop_prob: float, device: torch.device = CPU) -> Check:
    """Gradients, which of them there are, and BatchNorm statistics after each backward of a small float64 network,
    against the textbook's."""
    config = VERIFIED[model]
    errors = []
    for plan in config.plans(VERIFIED_PLANS, mode, drop_prob):
        trainer = config.trainer(kind, mode, device)
        book = Textbook(config.model(device), trainer.images, trainer.labels)
        wanted = state_after(book.model, kind.textbook(book, plan))
        errors.append(largest_difference(wanted, state_after(trainer.model, trainer.pair(plan))))
    return Check(torch.tensor(errors, dtype=torch.float64).max().item(), BOUND)


def computed_fractions(model: ResidualClassifier, plan: rdp.PathPlan) -> list[float]:
    """The share of the rows on which each branch must run in a drop iteration: with BatchNorm all or none."""
    branches, _ = parts_of(model)
    fractions = zip(branches, kept_fractions(plan), strict=True)
    return [float(kept > 0) if part.batch_norms else kept for part, kept in fractions]


def scheme_refusal(config: Config, mode: str) -> str | None:
    """Why the scheme can't freeze on this network in this mode."""
    try:
        config.trainer(Exact, mode, CPU)
    except ValueError as error:
        return str(error)
    return None
