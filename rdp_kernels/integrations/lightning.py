"""The scheme inside Lightning's `Trainer`:

    scheme = rdp.ResidualDropPath(module, drop_prob=0.2, seed=seed)
    trainer = L.Trainer(callbacks=[ResidualDropPathCallback(scheme)])

With automatic optimization every optimizer step is the next iteration, on the next batch. With manual optimization
`training_step` loops over the scheme's pairs itself:

    for _ in self.scheme.iterations():
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..scheme.alternation import Alternation
from ..scheme.scheme import ResidualDropPath
from ._trained import check_trained


class ResidualDropPathCallback(Callback):
    """Alternates between the scheme's drop and reuse iterations under automatic optimization, which takes block mode.
    In either kind of optimization the scheme's state is in every checkpoint, and `trainer.fit(ckpt_path=...)` goes on
    to the bit, also with a reuse iteration next.

    An iteration is an optimizer step: accumulated batches stay inside of it, and a step that fp16 skips is made up for
    by the next. None is open after training, however that ended. Raises `TypeError`, and in `fit()` `ValueError` where
    the scheme is not in block mode or of another model.
    """

    def __init__(self, scheme: ResidualDropPath):
        if not isinstance(scheme, ResidualDropPath):
            raise TypeError(f"scheme must be a ResidualDropPath, got {type(scheme).__name__}")
        self._scheme = scheme
        self._alternation: Alternation | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_trained(trainer.strategy.model, self._scheme)
        if pl_module.automatic_optimization:
            self._alternation = self._scheme.alternate(trainer.optimizers[0])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._alternation is not None:
            self._alternation.remove()
            self._alternation = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        return self._scheme.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._scheme.load_state_dict(state_dict)
