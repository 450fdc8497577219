"""The bytes that an iteration needs: a lower bound of the bytes that it reads and writes.

| | forward | backward, where a gradient passes |
|---|---|---|
| weights of a part that runs | read | read |
| the residual at a branch | read and written for the rows that run | likewise |

If a part learns, its gradients are written and read, and AdamW's weight, m and v are read and written.

Traffic inside a branch is left out, as if it stayed in registers and cache: no implementation needs less.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.models import ResidualClassifier

from .parts import parts_of

GRADIENT, ADAMW = 2, 6  # number of times that a weight's bytes are moved


@dataclass(frozen=True)
class Traffic:
    """Bytes of the weights of each branch and of the rest, and of the whole batch's residual at each path."""

    branches: list[int]
    streams: list[int]
    rest: int

    @classmethod
    @torch.no_grad()
    def of(cls, model: ResidualClassifier, images: Tensor) -> Traffic:
        model = copy.deepcopy(model).eval()
        branches, rest = parts_of(model)
        x, streams = model.embed(images), []
        for path in model.paths:
            streams.append(x.nbytes)
            x = path(x)
        return cls([part.bytes for part in branches], streams, rest.bytes)

    def plain(self) -> float:
        return self.drop([1.0] * len(self.branches))

    def drop(self, kept: list[float]) -> float:
        return self._iteration(kept, [0.0] * len(kept), True, "none")

    def reuse(self, kept: list[float], freeze: str = "parameters") -> float:
        return self._iteration([1 - k for k in kept], kept, False, freeze)

    def _iteration(self, learning: list[float], frozen: list[float], rest_learns: bool, freeze: str) -> float:
        total = float(self._weights(self.rest, True, rest_learns, rest_learns))
        passes = rest_learns  # whether something before the path learns
        for weights, stream, learns, frozes in zip(self.branches, self.streams, learning, frozen, strict=True):
            forward, backward = learns + frozes, learns + frozes * (passes and freeze != "branch")
            total += self._weights(weights, forward > 0, backward > 0, learns > 0) + 2 * stream * (forward + backward)
            passes |= learns > 0
        return total

    @staticmethod
    def _weights(size: int, forward: bool, backward: bool, learns: bool) -> int:
        return size * (forward + backward + (GRADIENT + ADAMW) * learns)
