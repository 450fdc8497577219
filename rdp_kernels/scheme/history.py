"""The open iteration of a scheme and the latest closed ones, of which checkpointing may recompute a forward."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .._utils.autograd import in_backward
from ..paths.binding import STOCHASTIC_DEPTH, PathModule
from ..paths.decision import Decision
from ..paths.path import Path
from .iteration import Iteration, Rules
from .rest import Rest

MOST_CLOSED = 16
"""How many closed iterations are remembered: more than a loop leaves behind before the last of their backwards."""


class History:
    """Decides for the paths of a scheme while no iteration is open.

    Paths hold it strongly, so it holds no reference to the scheme, which would then outlive its last user.
    """

    def __init__(self, model: nn.Module, paths: Sequence[Path], rules: Rules):
        self.open: Iteration | None = None
        self.closed: deque[Iteration] = deque(maxlen=MOST_CLOSED)
        self._rules = rules
        itself = weakref.ref(self)
        self.rest = Rest(model, paths, lambda: (it := itself()) is not None and it._freezes_rest(), rules.freeze_bn)

    @property
    def phase(self) -> str | None:
        return None if self.open is None else self.open.phase

    @property
    def is_in_frozen_rest(self) -> bool:
        return self.rest.is_entered

    def decide(self, module: PathModule, x: Tensor) -> Decision:
        recomputing = in_backward()
        iteration = self._current(recomputing)
        if iteration is None:
            return STOCHASTIC_DEPTH.decide(module, x)
        return iteration.decide(module, x, recomputing)

    def close(self) -> Iteration:
        """Closes the open iteration."""
        iteration, self.open = self.open, None
        assert iteration is not None
        iteration.close()
        self.rest.release()
        self.closed.append(iteration)
        return iteration

    def _current(self, recomputing: bool) -> Iteration | None:
        """The open iteration, or the one whose forward is recomputed, which autograd's sequence numbers tell."""
        if not recomputing:
            return self.open
        node = torch._C._current_autograd_node()._sequence_nr()
        for iteration in (self.open, *reversed(self.closed)):
            if iteration is not None and iteration.first_node <= node < iteration.last_node:
                return iteration
        if len(self.closed) == MOST_CLOSED and node < self.closed[0].first_node:
            raise RuntimeError(f"checkpointing recomputes a forward from over {MOST_CLOSED} iterations ago")
        return None

    def _freezes_rest(self) -> bool:
        """Whether a module of the rest that is called now runs frozen."""
        if not self._rules.freezes_rest:
            return False
        recomputing = in_backward()
        iteration = self._current(recomputing)
        if iteration is None or iteration.phase != "reuse":
            return False
        if not recomputing:
            iteration.look_again()
        return True
