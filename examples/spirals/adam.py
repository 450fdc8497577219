"""Adam for tensors that hold the parameters of many networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


class StackedAdam:
    """Equals a `torch.optim.Adam` for each network, on parameters `[networks, ...]`. If a network's part doesn't learn
    in a step, the part, its moments and its count of steps don't change, as with a `.grad` of None."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ):
        self.betas, self.eps = betas, eps
        self._states = {p: (torch.zeros_like(p), torch.zeros_like(p), torch.zeros(len(p))) for p in parameters}

    @torch.no_grad()
    def step(self, learning_rate: float, learns: Mapping[nn.Parameter, Tensor]) -> None:
        """Takes a step. `learns` has a bool `[networks]` for each parameter."""
        first, second = self.betas
        for parameter, (mean, square, steps) in self._states.items():
            networks, grad = learns[parameter], parameter.grad
            if grad is None or not networks.any():
                continue
            steps += networks
            here = networks.view(-1, *[1] * (grad.dim() - 1)).to(grad.dtype)
            count = steps.clamp_min(1).view_as(here).to(grad.dtype)
            mean.lerp_(grad, here * (1 - first))
            square.lerp_(grad * grad, here * (1 - second))
            denominator = (square / (1 - second**count)).sqrt_().add_(self.eps)
            parameter -= learning_rate * here * (mean / (1 - first**count)) / denominator
