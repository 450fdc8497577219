"""The step cases. Each is a pair of training steps for a network, a mode and p, by every trainer of `pairs.py`."""

from __future__ import annotations

import copy
import functools
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import rdp_kernels as rdp
from examples.models import ResidualClassifier, ResNet, ViT
from rdp_kernels.estimate import ModelCost, kept_fractions
from rdp_kernels.plan import draw_keep, plan_generator

from . import library_models
from .harness import Case, Check, Provider
from .library_models import library, small
from .machine import Device, one_thread
from .networks import Network, Own
from .pairs import TRAINERS, Exact, Needs, Plain
from .textbook import Textbook, largest_difference, state_after
from .traffic import Traffic

MODES, PROBS = ("block", "sample"), (0.1, 0.3, 0.5)
BOUND = 1e-10  # for the largest error, in float64
VERIFIED_PLANS = 3
PLANS = 6  # turns cycle through them; counting the FLOPs of more plans would take as long as timing
UNIT = "pair of steps"
CPU = torch.device("cpu")
SEED = 0


@dataclass(frozen=True)
class Config:
    """How to build a network, and the shape of its batch: `[batch, 3, image, image]`."""

    build: Callable[[], Network]
    batch: int
    image: int = 32
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format

    def network(self, device: torch.device) -> Network:
        """Returns a new network. The weights are the same every time."""
        network = copy.deepcopy(_built(self.build))
        network.model.to(device, self.dtype, memory_format=self.memory_format)
        return network

    def data(self, device: torch.device, number: int = 0) -> tuple[Tensor, Tensor]:
        """Returns the images and labels of batch `number`."""
        generator = torch.Generator().manual_seed(SEED + number)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        labels = torch.randint(10, (self.batch,), generator=generator)
        return images.to(device, self.dtype, memory_format=self.memory_format), labels.to(device)

    def batches(self, device: Device) -> list[tuple[Tensor, Tensor]]:
        """Returns the batches that turns cycle through: one on the CPU, on a GPU so many that none is in L2."""
        first = self.data(device.device)
        count = device.input_sets(first[0].nbytes) if device.device.type == "cuda" else 1
        return [first, *(self.data(device.device, number) for number in range(1, count))]

    def trainer(self, kind: type[Plain], mode: str, device: torch.device, autocast: bool = False) -> Plain:
        return kind(self.network(device), *self.data(device), mode, autocast)


@functools.lru_cache(maxsize=2)  # the measured and the verified network
def _built(build: Callable[[], Network]) -> Network:
    """Cached, because every trainer needs a copy and drawing the weights of a ViT-B takes seconds."""
    torch.manual_seed(SEED)
    return build()


def draw_plans(paths: int, batch: int, count: int, mode: str, drop_prob: float) -> list[rdp.PathPlan]:
    """Returns the first `count` plans that drop something. Other plans have no reuse iteration, so a pair would be one
    step for the scheme and two for the others. Doesn't end at p = 0."""
    rates = [drop_prob] * paths
    keeps = (draw_keep(rates, mode, "fixed", plan_generator(SEED, number), [batch]) for number in itertools.count())
    plans = (rdp.PathPlan(keep, rates, mode) for keep in keeps)
    return list(itertools.islice((plan for plan in plans if plan.dropped_paths), count))


def own(kind: type[ResidualClassifier], *args: Any, **options: Any) -> Callable[[], Network]:
    return lambda: Own(kind(*args, **options))


# A plain step of either takes between 100 and 300 ms on two cores. Enough paths for p = 0.1 to drop one in block mode.
OWN_FULL = {
    "vit": Config(own(ViT, 32, 4, 3, 10, 192, 12, 4), batch=16),
    "resnet": Config(own(ResNet, 3, 10, (32, 64, 128), 4), batch=24),
}
OWN_TINY = {
    "vit": Config(own(ViT, 16, 4, 3, 10, 64, 4, 4), batch=8, image=16),
    "resnet": Config(own(ResNet, 3, 10, (16, 32), 2), batch=8, image=16),
}
OWN_VERIFIED = {
    "vit": Config(own(ViT, 16, 4, 3, 10, 16, 4, 4, layer_scale=0.5), batch=6, image=16, dtype=torch.float64),
    "resnet": Config(own(ResNet, 3, 10, (4, 8), 2), batch=6, image=16, dtype=torch.float64),
}
# Real depth and width. On two cores a plain step takes about a second at most.
LIBRARY_CPU = {
    "vit-s": Config(partial(library, "vit-s"), batch=4, image=224),
    "vit-b": Config(partial(library, "vit-b", img_size=64), batch=4, image=64),
    "convnext-t": Config(partial(library, "convnext-t"), batch=4, image=128),
    "swin-t": Config(partial(library, "swin-t", img_size=112), batch=4, image=112),
    "resnet-50": Config(partial(library, "resnet-50"), batch=4, image=128),
}
LIBRARY_CUDA = {
    "vit-s": Config(partial(library, "vit-s"), batch=256, image=224),
    "vit-b": Config(partial(library, "vit-b"), batch=128, image=224),
    "convnext-t": Config(partial(library, "convnext-t"), batch=128, image=224, memory_format=torch.channels_last),
    "swin-t": Config(partial(library, "swin-t"), batch=128, image=224),
    "resnet-50": Config(partial(library, "resnet-50"), batch=128, image=224, memory_format=torch.channels_last),
}
LIBRARY_TINY = {model: Config(partial(small, model), batch=6) for model in LIBRARY_CPU}
LIBRARY_VERIFIED = {model: replace(config, dtype=torch.float64) for model, config in LIBRARY_TINY.items()}

TINY = OWN_TINY | LIBRARY_TINY
FULL = {"cpu": OWN_FULL | LIBRARY_CPU, "cuda": OWN_FULL | LIBRARY_CUDA}
VERIFIED = OWN_VERIFIED | LIBRARY_VERIFIED
MODELS = tuple(VERIFIED)
BF16 = "bf16 autocast"
DTYPES = {"float32": False, "bf16": True}
"""Name of a dtype → whether steps run under autocast. Weights are float32 in both cases."""


def config_of(size: str, model: str, device: Device, batch: int | None = None) -> Config:
    """Returns the config of a model at a size. `batch` replaces its batch size."""
    config = TINY[model] if size == "tiny" else FULL[device.device.type][model]
    if size == "quick":
        config = replace(config, batch=config.batch // 2)
    return config if batch is None else replace(config, batch=batch)


def labels_of(
    size: str, model: str, config: Config, mode: str, drop_prob: float, autocast: bool, work: str
) -> dict[str, Any]:
    labels = {"work": work, "size": size, "model": model, "batch": config.batch, "mode": mode, "p": drop_prob}
    return labels | {"dtype": BF16 if autocast else "float32"}


def needs_of(network: Network, images: Tensor) -> tuple[Needs, Needs | None]:
    """Returns the needs in FLOPs, and in bytes where they are known. `network` can't be used afterwards."""
    traffic = Traffic.of(network.model, images) if isinstance(network, Own) else None
    network.prepare(images[:2])
    return ModelCost.of(network.model, images), traffic


def step_case(
    size: str,
    model: str,
    mode: str,
    drop_prob: float,
    turns: int,
    device: Device | None = None,
    batch: int | None = None,
    autocast: bool = False,
) -> Case:
    """Returns one row group of the table. Turn i of every provider is a pair of steps on the same plan.

    Args:
        size: `"full"`, `"quick"` (half of the images) or `"tiny"`. Verification has a size of its own.
        device: the CPU by default. On a GPU turns take different images, so that none is in the cache.
        batch: the number of images; replaces the one of the size.
        autocast: whether steps run under bf16 autocast.
    """
    device = device or Device.of("cpu")
    config = config_of(size, model, device, batch)
    labels = labels_of(size, model, config, mode, drop_prob, autocast, "scheme")
    reason = unavailable(model)
    if reason is not None:
        return Case(labels, UNIT, Plain.name, [Provider.missing(kind.name, reason) for kind in TRAINERS])
    batches, built = config.batches(device), config.network(device.device)
    plans = draw_plans(len(built.branches), config.batch, min(turns, PLANS), mode, drop_prob)
    kept = [computed_fractions(built, plan) for plan in plans]
    cost, traffic = needs_of(built, batches[0][0])
    refusal = scheme_refusal(VERIFIED[model], mode)

    def provider(kind: type[Plain]) -> Provider:
        if refusal is not None and kind.follows_scheme:
            return Provider.missing(kind.name, refusal)
        trainer = config.trainer(kind, mode, device.device, autocast)

        def needed(per: Needs | None) -> float | None:
            return None if per is None else statistics.mean(kind.needs(per, fractions) for fractions in kept)

        return Provider(
            kind.name,
            run=turn_of(trainer, batches, plans),
            verify=lambda: verify(kind, model, mode, drop_prob, device.device),
            needed_flop=needed(cost),
            needed_bytes=needed(traffic),
            minimal=kind.minimal,
            period=len(plans) if kind.follows_scheme else 1,
        )

    return Case(labels, UNIT, Plain.name, [provider(kind) for kind in TRAINERS])


def turn_of(
    trainer: Plain, batches: Sequence[tuple[Tensor, Tensor]], plans: Sequence[rdp.PathPlan | None]
) -> Callable[[int], None]:
    """Returns a function that trains on the batch and the plan of a turn."""

    def run(turn: int) -> None:
        trainer.images, trainer.labels = batches[turn % len(batches)]
        trainer.train(plans[turn % len(plans)])

    return run


def unavailable(model: str) -> str | None:
    """Returns why `model` can't be built here, or None."""
    return library_models.missing() if model in library_models.NAMES else None


@one_thread()
def verify(kind: type[Plain], model: str, mode: str, drop_prob: float, device: torch.device = CPU) -> Check:
    """Compares a small float64 network with the textbook after each backward: gradients, which parameters have one, and
    BatchNorm statistics."""
    config = VERIFIED[model]
    trainer = config.trainer(kind, mode, device)
    book = Textbook(config.network(device), trainer.images, trainer.labels)
    errors = []
    for plan in draw_plans(len(book.network.branches), config.batch, VERIFIED_PLANS, mode, drop_prob):
        wanted = state_after(book.network.model, kind.textbook(book, plan))
        errors.append(largest_difference(wanted, state_after(trainer.model, trainer.pair(plan))))
    return Check(torch.tensor(errors, dtype=torch.float64).max().item(), BOUND)


def computed_fractions(network: Network, plan: rdp.PathPlan) -> list[float]:
    """Returns the share of rows that each branch runs on in a drop iteration. With BatchNorm it is all or none."""
    fractions = zip(network.branches, kept_fractions(plan), strict=True)
    return [float(kept > 0) if part.batch_norms else kept for part, kept in fractions]


def scheme_refusal(config: Config, mode: str) -> str | None:
    """Returns why the scheme can't freeze on this network in this mode, or None. A small variant of the network gives
    the same answer."""
    try:
        config.trainer(Exact, mode, CPU)
    except ValueError as error:
        return str(error)
    return None
