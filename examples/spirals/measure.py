"""Measures of trained networks: accuracy, accuracy with paths removed, and similarity of layers."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.digits.seeds import seed_of
from examples.spirals.networks import SpiralNetworks
from rdp_kernels.diagnostics import pairwise_cka

REMOVALS = 12  # an accuracy is averaged over so many random choices of removed paths


@torch.no_grad()
def streams(model: SpiralNetworks, points: Tensor, removed: tuple[int, ...] = ()) -> list[Tensor]:
    """Returns the residual before the first path and after each path, `[networks, points, width]`, as at inference.
    The branches of the paths `removed` don't run, and nothing is rescaled."""
    network = torch.arange(model.networks)
    states = [model.stem(points, network)]
    for index, path in enumerate(model.paths):
        state = states[-1]
        states.append(state if index in removed else state + path.fn(state, network))
    return states


@torch.no_grad()
def logits(model: SpiralNetworks, points: Tensor, removed: tuple[int, ...] = ()) -> Tensor:
    return model.head(streams(model, points, removed)[-1], torch.arange(model.networks))


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the accuracy of each network."""
    return (logits.argmax(dim=-1) == labels).double().mean(dim=-1)


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of each network in nats."""
    return F.cross_entropy(logits.mT.double(), labels, reduction="none").mean(dim=-1)


def accuracy_without(model: SpiralNetworks, points: Tensor, labels: Tensor, count: int) -> Tensor:
    """Returns the accuracy of each network with `count` paths removed: the mean over random choices, which are the same
    for all networks."""
    picked = removals(len(model.paths), count)
    return torch.stack([accuracy(logits(model, points, removed), labels) for removed in picked]).mean(dim=0)


def similarity(model: SpiralNetworks, points: Tensor) -> Tensor:
    """Returns the linear CKA between the states of each network's residual, `[networks, paths + 1, paths + 1]`."""
    states = torch.stack(streams(model, points), dim=1)
    return torch.stack([pairwise_cka(list(network)) for network in states])


def removals(paths: int, count: int) -> list[tuple[int, ...]]:
    """Returns all choices of `count` paths if there are no more than `REMOVALS`, else that many random ones."""
    if count in (1, paths - 1) and paths <= REMOVALS:
        return list(itertools.combinations(range(paths), count))
    generator = torch.Generator().manual_seed(seed_of(paths, count))
    return [tuple(torch.randperm(paths, generator=generator)[:count].sort().values.tolist()) for _ in range(REMOVALS)]
