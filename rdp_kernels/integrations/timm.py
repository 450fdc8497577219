"""The scheme in timm's train.py, and in other scripts that save their optimizer but know of no scheme. After the line
`optimizer = create_optimizer_v2(...)` insert:

    rdp.convert(model)
    attach(optimizer, rdp.ResidualDropPath(model, drop_prob=0.2, seed=args.seed))

Every optimizer step is then an iteration, on its own batch.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..scheme.alternation import Alternation
from ..scheme.scheme import ResidualDropPath
from ._checks import check_scheme

__all__ = ["attach"]

KEY = "ResidualDropPath"
"""The key of the scheme's state in `optimizer.state_dict()`."""


def attach(optimizer: Optimizer, scheme: ResidualDropPath) -> Alternation:
    """Calls `scheme.alternate(optimizer)`; adds the scheme's state to the optimizer's. `CheckpointSaver` saves it and
    `resume_checkpoint` loads it, so that training resumes bit for bit, also where a reuse iteration is next.

    Args:
        optimizer: nothing has been loaded into it yet.
        scheme: in block mode.

    Returns the handle of `alternate`. Without a call of its `remove()` an iteration stays open at the end. Raises the
    `TypeError` and `ValueError` of `alternate`.
    """
    check_scheme(scheme)
    handle = scheme.alternate(optimizer)

    def save(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {KEY: scheme.state_dict()}

    def load(_: Optimizer, state: dict[str, Any]) -> None:
        if KEY in state:  # absent in the checkpoint of a run without a scheme
            scheme.load_state_dict(state[KEY])

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return handle
