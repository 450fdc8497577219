"""Iterations that follow an optimizer's steps, for training loops that can't be rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .pairs import Pairs


class Alternation:
    """The handle of `ResidualDropPath.alternate`: keeps one iteration open and turns to the next at every step.

    `end` is called with the handle when that is removed.
    """

    def __init__(self, pairs: Pairs, optimizer: torch.optim.Optimizer, end: Callable[[Alternation], None]):
        self._pairs, self._optimizer, self._end = pairs, optimizer, end
        self._empty_steps = 0
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Ends the alternation. Discards the open iteration; whatever iterates next starts over with it."""
        self._hook.remove()
        self._end(self)

    def trains_more(self) -> bool:
        """Whether the optimizer has parameters of other models that can learn: a head outside of the scheme's."""
        owned = {id(p) for p in self._pairs.rest.model.parameters()}
        trained = (p for group in self._optimizer.param_groups for p in group["params"])
        return any(p.requires_grad and id(p) not in owned for p in trained)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None):  # a GradScaler has a fused optimizer skip by itself, inside its step
            return
        pairs = self._pairs
        if pairs.open is not None and pairs.open.begun:
            self._empty_steps = 0
            pairs.close(completed=True)
            pairs.open_next()
            return
        # Not every step follows a forward: torch.distributed.checkpoint makes an optimizer's state by an empty one.
        self._empty_steps += 1
        if self._empty_steps == 2:
            pairs.notices.warn_not_begun("two optimizer steps in a row", pairs.paths)


def stepped_by(optimizer: Any) -> Any:
    """The optimizer inside wrappers that have no hooks of their own, such as accelerate's and Lightning's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
