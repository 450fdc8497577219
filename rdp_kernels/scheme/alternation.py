"""Iterations that follow an optimizer's steps, for training loops that can't be rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Alternation:
    """The handle of `ResidualDropPath.alternate`: keeps one iteration open and turns to the next at every step.

    Args:
        model: the scheme's.
        optimizer: its steps end iterations.
        turn: closes the open iteration and opens the next. Returns False, doing nothing, where no path has run in it.
        end: ends this alternation.
        warn: warns that no path ran, given where.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        turn: Callable[[], bool],
        end: Callable[[Alternation], None],
        warn: Callable[[str], None],
    ):
        self._model, self._optimizer, self._turn, self._end, self._warn = model, optimizer, turn, end, warn
        self._empty_steps = 0
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Ends the alternation. Discards the open iteration; whatever iterates next starts over with it."""
        self._hook.remove()
        self._end(self)

    def trains_more(self) -> bool:
        """Whether the optimizer has parameters of other models that can learn: a head outside of the scheme's."""
        owned = {id(p) for p in self._model.parameters()}
        trained = (p for group in self._optimizer.param_groups for p in group["params"])
        return any(p.requires_grad and id(p) not in owned for p in trained)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None):  # a GradScaler has a fused optimizer skip by itself, inside its step
            return
        if self._turn():
            self._empty_steps = 0
            return
        # Not every step follows a forward: torch.distributed.checkpoint makes an optimizer's state by an empty one.
        self._empty_steps += 1
        if self._empty_steps == 2:
            self._warn("two optimizer steps in a row")


def stepped_by(optimizer: Any) -> Any:
    """The optimizer inside wrappers that have no hooks of their own, such as accelerate's and Lightning's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
