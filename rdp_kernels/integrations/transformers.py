"""The scheme in transformers' `Trainer`.

Every optimizer step is an iteration, on its own batch. The scheme's state is in trainer_state.json of every checkpoint.
`trainer.train(resume_from_checkpoint=...)` resumes bit for bit, even if a reuse iteration is next.
"""

from __future__ import annotations

import contextlib
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..scheme.scheme import ResidualDropPath
from ._checks import check_scheme
from .distributed import check_trained

__all__ = ["attach"]

KEY = "ResidualDropPath"
"""The key of the scheme's state in `TrainerState.stateful_callbacks`."""


def attach(trainer: Trainer, scheme: ResidualDropPath) -> None:
    """Makes `trainer.train()` alternate between the scheme's drop and reuse iterations.

    An iteration is an optimizer step. Accumulated batches belong to one iteration. If fp16 skips a step, the next step
    completes the iteration. No iteration is open after training. `train()` raises `ValueError` if the trainer's model
    isn't the scheme's by then, or if the scheme isn't in block mode.

    Args:
        trainer: a trainer of the scheme's model that hasn't begun to train.
        scheme: in block mode.

    Raises:
        TypeError: if an argument has another type.

    Example:
        >>> from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification
        >>> from rdp_kernels.integrations.transformers import attach
        >>> config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2)
        >>> model = ViTForImageClassification(config)
        >>> report = rdp.convert(model, drop_prob=0.5)
        >>> options = dict(max_steps=4, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True)
        >>> data = [{"pixel_values": torch.randn(3, 8, 8), "labels": label % 2} for label in range(32)]
        >>> trainer = Trainer(model, TrainingArguments("report", **options), train_dataset=data)
        >>> scheme = rdp.ResidualDropPath(model, seed=0)
        >>> attach(trainer, scheme)
        >>> result = trainer.train()
        {...}
        >>> sum(scheme.state_dict()["completed"].values())
        4
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    check_scheme(scheme)
    trainer.add_callback(_Alternate(trainer, scheme))


class _Alternate(TrainerCallback):
    def __init__(self, trainer: Trainer, scheme: ResidualDropPath):
        self._trainer, self._scheme = trainer, scheme
        self._alternation = contextlib.ExitStack()
        self._checked: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.on_train_end(args, state, control)  # auto_find_batch_size restarts a run that failed
        if self._trainer.model_wrapped is not self._checked:  # equal where train() is called again
            self._checked = self._trainer.model_wrapped
            check_trained(self._checked, self._scheme)
        if (saved := state.stateful_callbacks.get(KEY)) is not None:
            self._scheme.load_state_dict(saved)
        self._alternation.callback(self._scheme.alternate(self._trainer.optimizer).remove)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # TrainerCallback has no hook before saving, so the state is updated after each step.
        state.stateful_callbacks[KEY] = self._scheme.state_dict()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._alternation.close()
