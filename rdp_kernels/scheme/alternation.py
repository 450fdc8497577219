"""Opens an iteration after each step of an optimizer, for training loops that can't be rewritten."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .pairs import Pairs


class Alternation:
    """The handle of `ResidualDropPath.alternate`: closes the open iteration at each step, and opens the next one.

    `end` is called with the handle when `remove` is called.
    """

    def __init__(self, pairs: Pairs, optimizer: torch.optim.Optimizer, end: Callable[[Alternation], None]):
        self._pairs, self._optimizer, self._end = pairs, optimizer, end
        self._empty_steps = 0
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def remove(self) -> None:
        """Ends the alternation and discards the open iteration, which is then the next one to be opened."""
        self._hook.remove()
        self._end(self)

    def trains_more(self) -> bool:
        """Whether the optimizer has parameters outside of the scheme's model that can learn, such as a head."""
        owned = {id(p) for p in self._pairs.rest.model.parameters()}
        trained = (p for group in self._optimizer.param_groups for p in group["params"])
        return any(p.requires_grad and id(p) not in owned for p in trained)

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if getattr(optimizer, "found_inf", None):  # a GradScaler calls a fused optimizer's step, which then skips
            return
        pairs = self._pairs
        if pairs.open is not None and pairs.open.begun:
            self._empty_steps = 0
            pairs.close(completed=True)
            pairs.open_next()
            return
        # Not every step follows a forward: torch.distributed.checkpoint makes an empty step to create the state.
        self._empty_steps += 1
        if self._empty_steps == 2:
            pairs.notices.warn_not_begun("two optimizer steps in a row", pairs.paths)


def stepped_by(optimizer: Any) -> Any:
    """The optimizer inside wrappers without hooks of their own, such as accelerate's and Lightning's."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer
