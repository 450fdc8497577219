"""The scheme inside timm's train.py, and other scripts that save their optimizer but know of no scheme. Below
`optimizer = create_optimizer_v2(...)`:

    rdp.convert(model)
    attach(optimizer, rdp.ResidualDropPath(model, drop_prob=0.2, seed=args.seed))

Every optimizer step is then the next iteration, on the next batch.
"""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from ..scheme.alternation import Alternation
from ..scheme.scheme import ResidualDropPath

KEY = "ResidualDropPath"
"""Under which the scheme's state stands in `optimizer.state_dict()`."""


def attach(optimizer: Optimizer, scheme: ResidualDropPath) -> Alternation:
    """`scheme.alternate(optimizer)`, with the scheme's state in that of the optimizer: `CheckpointSaver` saves it and
    `resume_checkpoint` loads it, so that training goes on to the bit, also with a reuse iteration next.

    Args:
        optimizer: before anything is loaded into it.
        scheme: in block mode.

    Returns the handle of `alternate`; without its `remove()` an iteration stays open at the end. Raises `TypeError` and
    `ValueError` as `alternate` does.
    """
    if not isinstance(scheme, ResidualDropPath):
        raise TypeError(f"scheme must be a ResidualDropPath, got {type(scheme).__name__}")
    handle = scheme.alternate(optimizer)

    def save(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return state | {KEY: scheme.state_dict()}

    def load(_: Optimizer, state: dict[str, Any]) -> None:
        if KEY in state:  # not in the checkpoint of a run without a scheme
            scheme.load_state_dict(state[KEY])

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)
    return handle
