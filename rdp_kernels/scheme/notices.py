"""The warnings of a scheme: that it does nothing, or that the training loop undoes what it does."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..paths.binding import PathModule
from ..paths.path import Path
from .iteration import Iteration

LOOKS_AT_GRADIENTS = 8
"""How many iterations look for gradients of zero when they close. A loop leaves them from the start or never."""


class Notices:
    """The warnings of a scheme, each given once."""

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._looks_left = LOOKS_AT_GRADIENTS

    def warn(self, message: str, kind: str | None = None) -> None:
        if (kind or message) not in self._warned:
            self._warned.add(kind or message)
            warnings.warn(f"ResidualDropPath: {message}", stacklevel=3)

    def warn_not_run(self, iteration: Iteration) -> None:
        if not iteration.begun:
            where = f"a {iteration.phase} iteration, which is not counted as completed"
            self.warn_not_begun(where, iteration.paths)
            return
        missed: dict[str, list[str]] = {}
        for path in iteration.not_run():
            missed.setdefault(_why_not_run(path.module), []).append(path.name)
        for why, names in missed.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.warn(
                f"the model didn't run path {names[0]!r}{others} in a {iteration.phase} iteration in which it was to "
                f"run. Likely reason: {why}. This warning is given once",
                kind=why,
            )

    def warn_not_begun(self, where: str, paths: Sequence[Path]) -> None:
        why = "call the model inside the iteration: the one that the scheme was made for, not a copy"
        if not any(path.module.training for path in paths):
            why = "the model is in eval mode: call model.train()"
        self.warn(f"no path ran in {where}. Likely reason: {why}", kind=why)

    def looks_at_gradients(self) -> bool:
        """Whether to call `warn_of_zeros` for the iteration that closes now: only the first few are checked."""
        self._looks_left -= 1
        return self._looks_left >= 0

    def warn_of_zeros(self, idle: Sequence[nn.Parameter]) -> None:
        """Warns of gradients of zero on parameters that don't learn: weight decay and momentum would move them."""
        found = [p.grad for p in idle if p.requires_grad and p.grad is not None]
        plain = [grad for grad in found if type(grad) is Tensor and grad.layout == torch.strided]
        if plain and not any(bool(grad.any()) for grad in reversed(plain)):  # gradients near the output are the largest
            self._looks_left = 0  # reading values waits for the device
            self.warn(
                f"{len(found)} parameters that take no part in an iteration have gradients of zero instead of None, "
                "with which momentum and weight decay move them: call optimizer.zero_grad(set_to_none=True)"
            )


def _why_not_run(path_module: PathModule) -> str:
    if not path_module.training:
        return "it is in eval mode, in which a path follows no plan (call train(), or freeze its parameters)"
    if "forward" in vars(getattr(path_module, "block", path_module)):
        return "its forward was replaced on the instance, and the new one runs without its paths"
    return "the model skips layers by itself (switch off its LayerDrop), or doesn't use this one"
