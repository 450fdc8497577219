"""The scheme by its definition, in plain torch and without regard to cost. Providers are verified against it.

It computes every branch of the unmodified model, and then masks updates or throws gradients away. Nothing of
rdp_kernels runs here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .networks import End, Network
from .parts import left_alone


class Textbook:
    """Iterations on `network`. Each is a forward and a backward, and leaves gradients in the model."""

    def __init__(self, network: Network, images: Tensor, labels: Tensor):
        self.network, self.images, self.labels = network, images, labels

    def plain(self) -> None:
        self._backward(self.images, self.labels, [_as_it_is] * len(self.network.branches))

    def drop(self, keep: Tensor, drop_probs: Sequence[float], skip: bool = True) -> None:
        """Multiplies the kept rows of each update by 1 / (1 − p), and the dropped rows by 0.

        Args:
            keep: bool `[paths]` or `[paths, B]`.
            skip: whether a branch without kept rows stays unchanged. Else it gets gradients of 0, and its BatchNorms
                update their statistics.
        """
        ends = [partial(_masked, kept, p) for kept, p in zip(keep, drop_probs, strict=True)]
        without = [part for part, kept in zip(self.network.branches, keep, strict=True) if skip and not kept.any()]
        with left_alone(without):
            self._backward(self.images, self.labels, ends)

    def reuse(self, keep: Tensor, freeze: str) -> None:
        """Runs every branch. Where `keep` is true its gradients are thrown away and, with `freeze="branch"`, its update
        is detached. The rest doesn't learn.

        In sample mode it runs one sample after the other, and adds up their gradients. This gives the batch's gradients
        because samples are independent. Only BatchNorm would mix them, and it can't be frozen for single samples.
        """
        columns = keep.view(len(keep), -1)
        shares = columns.shape[1]
        total: dict[nn.Parameter, Tensor] = {}
        images, labels = self.images.chunk(shares), self.labels.chunk(shares)
        for kept, some_images, some_labels in zip(columns.T.tolist(), images, labels, strict=True):
            frozen = [part for part, k in zip(self.network.branches, kept, strict=True) if k]
            ends = [Tensor.detach if k and freeze == "branch" else _as_it_is for k in kept]
            with left_alone([*frozen, self.network.rest]):
                self._backward(some_images, some_labels, ends, shares)
            for parameter in self.network.model.parameters():
                if parameter.grad is not None:
                    total[parameter] = parameter.grad + total.get(parameter, 0)
                    parameter.grad = None
        for parameter, gradient in total.items():
            parameter.grad = gradient

    def _backward(self, images: Tensor, labels: Tensor, ends: Sequence[End], shares: int = 1) -> None:
        (F.cross_entropy(self.network.with_ends(images, ends), labels) / shares).backward()


def _as_it_is(update: Tensor) -> Tensor:
    return update


def _masked(kept: Tensor, drop_prob: float, update: Tensor) -> Tensor:
    rows = kept.to(update.device).expand(len(update)).view(-1, *[1] * (update.dim() - 1))
    return torch.where(rows, update / (1 - drop_prob), 0)


def state_after(model: nn.Module, backwards: Iterator[None]) -> list[dict[str, Tensor]]:
    """Returns the existing gradients and the buffers after each of `backwards`."""
    steps = []
    for _ in backwards:
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        steps.append(gradients | {name: buffer.clone() for name, buffer in model.named_buffers()})
        model.zero_grad(set_to_none=True)
    return steps


def largest_difference(wanted: list[dict[str, Tensor]], got: list[dict[str, Tensor]]) -> float:
    """Compares two results of `state_after`. Infinite if different parameters have gradients; NaN if a value is NaN."""
    if [step.keys() for step in wanted] != [step.keys() for step in got]:
        return float("inf")
    differences = [(w[name] - g[name]).abs().max() for w, g in zip(wanted, got, strict=True) for name in w]
    return torch.stack([difference.double() for difference in differences]).max().item()  # max() would lose a NaN
