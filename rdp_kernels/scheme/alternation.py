"""Iterations that follow an optimizer's steps, for training loops that can't be rewritten."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .scheme import ResidualDropPath


class Alternation:
    """The handle of `ResidualDropPath.alternate`: keeps one iteration open and turns to the next at every step."""

    def __init__(self, scheme: ResidualDropPath, optimizer: torch.optim.Optimizer):
        self._scheme, self._optimizer = scheme, optimizer
        self._empty_steps = 0
        self._hook = optimizer.register_step_post_hook(self._after_step)
        self.open_next()

    def remove(self) -> None:
        """Ends the alternation. The iteration that is open has not been: whatever iterates next begins with it."""
        self._hook.remove()
        self._scheme._end_alternation(self)

    def trains_more(self) -> bool:
        """Whether the optimizer has parameters of other models that can learn: a head outside of the scheme's."""
        owned = {id(p) for p in self._scheme._rest.model.parameters()}
        trained = (p for group in self._optimizer.param_groups for p in group["params"])
        return any(p.requires_grad and id(p) not in owned for p in trained)

    def open_next(self) -> None:
        self._scheme._open_next()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None):  # a GradScaler has a fused optimizer skip by itself, inside its step
            return
        if self._scheme._begun():
            self._empty_steps = 0
            self._scheme._close(completed=True)
            self.open_next()
            return
        # Not every step follows a forward: torch.distributed.checkpoint makes an optimizer's state by an empty one.
        self._empty_steps += 1
        if self._empty_steps == 2:
            self._scheme._warn_not_begun("two optimizer steps in a row")


def stepped_by(optimizer: Any) -> Any:
    """The optimizer inside of wrappers that have no hooks of their own, as accelerate's and Lightning's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
