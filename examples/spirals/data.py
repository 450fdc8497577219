"""Points of two interleaved spirals, for many networks at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.digits.seeds import seed_of

TURNS = 1.5
TEST_POINTS = 1000


@dataclass(frozen=True)
class Points:
    """A set of points for each network: `x [networks, points, 2]`, `labels [networks, points]`, 0 or 1."""

    x: Tensor
    labels: Tensor

    @classmethod
    def draw(cls, seeds: list[int], number: int, noise: float, purpose: str) -> Points:
        """Draws `number` points for each of `seeds`, half of them of each class. Other `purpose`s give other points."""
        drawn = [_spirals(number, noise, torch.Generator().manual_seed(seed_of(seed, purpose))) for seed in seeds]
        return cls(torch.stack([x for x, _ in drawn]), torch.stack([labels for _, labels in drawn]))


def _spirals(number: int, noise: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draws Archimedean arms of radius up to 1, the second turned by π. Gaussian `noise` is added to both
    coordinates."""
    labels = torch.arange(number) % 2
    along = torch.rand(number, generator=generator).sqrt()  # equal density at the rim and inside
    angle = 2 * math.pi * TURNS * along + math.pi * labels
    arms = along[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1)
    return arms + noise * torch.randn(number, 2, generator=generator), labels
