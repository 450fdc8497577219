"""The scheme inside transformers' `Trainer`: every optimizer step is the next iteration, on the next batch.

    scheme = rdp.ResidualDropPath(model, drop_prob=0.2, seed=args.seed)
    attach(trainer, scheme)

The scheme's state is in trainer_state.json of every checkpoint, and `trainer.train(resume_from_checkpoint=...)` goes on
to the bit, also with a reuse iteration next.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..scheme.alternation import Alternation
from ..scheme.scheme import ResidualDropPath
from ._trained import check_trained

KEY = "ResidualDropPath"
"""Under which the scheme's state stands in `TrainerState.stateful_callbacks`."""


def attach(trainer: Trainer, scheme: ResidualDropPath) -> None:
    """Lets `trainer.train()` alternate between the scheme's drop and reuse iterations.

    Args:
        trainer: has not begun to train; its model is the scheme's.
        scheme: in block mode.

    An iteration is an optimizer step: gradient accumulation stays inside of it, and a step that fp16 skips is made up
    for by the next. None is open after training. Raises `TypeError` and `ValueError` here, or in `train()` where the
    model is another than the scheme's by then.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    if not isinstance(scheme, ResidualDropPath):
        raise TypeError(f"scheme must be a ResidualDropPath, got {type(scheme).__name__}")
    trainer.add_callback(_Alternate(trainer, scheme))


class _Alternate(TrainerCallback):
    def __init__(self, trainer: Trainer, scheme: ResidualDropPath):
        self._trainer, self._scheme = trainer, scheme
        self._alternation: Alternation | None = None
        self._checked: Any = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end()  # of a run that failed, which auto_find_batch_size starts again
        if self._trainer.model_wrapped is not self._checked:  # else train() is called again
            self._checked = self._trainer.model_wrapped
            check_trained(self._checked, self._scheme)
        saved = state.stateful_callbacks.get(KEY)
        if saved is not None:
            self._scheme.load_state_dict(saved)
        self._alternation = self._scheme.alternate(self._trainer.optimizer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        # Whatever saves next finds it; TrainerCallback has no hook before saving.
        state.stateful_callbacks[KEY] = self._scheme.state_dict()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._end()

    def _end(self) -> None:
        if self._alternation is not None:
            self._alternation.remove()
            self._alternation = None
