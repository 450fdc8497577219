"""The scheme in Lightning's `Trainer`:

    scheme = rdp.ResidualDropPath(module, drop_prob=0.2, seed=seed)
    trainer = L.Trainer(callbacks=[ResidualDropPathCallback(scheme)])

With automatic optimization every optimizer step is an iteration, on its own batch. With manual optimization
`training_step` loops over the scheme's pairs itself:

    for _ in self.scheme.iterations():
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
"""

from __future__ import annotations

import contextlib
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..scheme.scheme import ResidualDropPath
from ._checks import check_scheme
from .distributed import check_trained

__all__ = ["ResidualDropPathCallback"]


class ResidualDropPathCallback(Callback):
    """Alternates between the scheme's drop and reuse iterations under automatic optimization, which needs block mode.

    In either kind of optimization every checkpoint has the scheme's state, and `trainer.fit(ckpt_path=...)` resumes bit
    for bit, also where a reuse iteration is next.

    An iteration is an optimizer step. Accumulated batches belong to one iteration. If fp16 skips a step, the next step
    completes the iteration. No iteration is open after training, however it ended. Raises `TypeError`, and in `fit()`
    `ValueError` where the scheme isn't in block mode or belongs to another model.
    """

    def __init__(self, scheme: ResidualDropPath):
        self._scheme = check_scheme(scheme)
        self._alternation = contextlib.ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_trained(trainer.strategy.model, self._scheme)
        if pl_module.automatic_optimization:
            self._alternation.callback(self._scheme.alternate(trainer.optimizers[0]).remove)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._alternation.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self._scheme.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scheme.load_state_dict(state_dict)
