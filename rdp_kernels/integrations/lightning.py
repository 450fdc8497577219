"""The scheme in Lightning's `Trainer`.

With automatic optimization every optimizer step is an iteration, on its own batch. With manual optimization
`training_step` opens the iterations itself, and runs both iterations of a pair on each batch::

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
    """Alternates between a scheme's drop and reuse iterations under automatic optimization.

    With either kind of optimization every checkpoint has the scheme's state. `trainer.fit(ckpt_path=...)` resumes bit
    for bit, even if a reuse iteration is next. An iteration is an optimizer step. Accumulated batches belong to one
    iteration. If fp16 skips a step, the next step completes the iteration. No iteration is open after training, even if
    it ended by an exception.

    Args:
        scheme: of the module that is trained. With automatic optimization it has to be in block mode.

    Raises:
        TypeError: if `scheme` isn't a `ResidualDropPath`.

    Example:
        >>> import lightning as L
        >>> from rdp_kernels.integrations.lightning import ResidualDropPathCallback
        >>> class Module(L.LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.net = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)))
        ...     def training_step(self, x, _):
        ...         return self.net(x).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.AdamW(self.parameters())
        >>> module = Module()
        >>> scheme = rdp.ResidualDropPath(module, drop_prob=0.5, seed=0)
        >>> options = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
        >>> options |= {"enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = L.Trainer(callbacks=[ResidualDropPathCallback(scheme)], **options)
        >>> trainer.fit(module, torch.utils.data.DataLoader(torch.randn(32, 8), batch_size=8))
        >>> scheme.state_dict()["completed"]
        {'drop': 2, 'reuse': 2}
    """

    def __init__(self, scheme: ResidualDropPath):
        self._scheme = check_scheme(scheme)
        self._alternation = contextlib.ExitStack()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Checks that the trainer trains the scheme's model. Under automatic optimization it starts the alternation.

        Args:
            trainer: the trainer. Iterations follow its first optimizer.
            pl_module: the module that is trained.

        Raises:
            ValueError: if the model isn't the scheme's, or if the scheme isn't in block mode under automatic
                optimization.
            RuntimeError: if an iteration is open under automatic optimization.
        """
        check_trained(trainer.strategy.model, self._scheme)
        if pl_module.automatic_optimization:
            self._alternation.callback(self._scheme.alternate(trainer.optimizers[0]).remove)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the alternation.

        Args:
            trainer: not used.
            pl_module: not used.
        """
        self._alternation.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Ends the alternation.

        Args:
            trainer: not used.
            pl_module: not used.
            exception: not used.
        """
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The scheme's state, for a checkpoint.

        Returns:
            `scheme.state_dict()`.
        """
        return self._scheme.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the scheme's state from a checkpoint.

        Args:
            state_dict: a result of `state_dict`.
        """
        self._scheme.load_state_dict(state_dict)
