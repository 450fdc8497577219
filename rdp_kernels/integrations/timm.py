"""The scheme in timm's train.py, and in other scripts that save their optimizer but know of no scheme.

After the line `optimizer = create_optimizer_v2(...)` insert::

    rdp.convert(model)
    attach(optimizer, rdp.ResidualDropPath(model, drop_prob=0.2, seed=args.seed))

Every optimizer step is then an iteration, on its own batch. This module doesn't import timm.
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
    """Makes every step of `optimizer` an iteration, and adds the scheme's state to the optimizer's.

    It calls `scheme.alternate(optimizer)`. timm's `CheckpointSaver` saves the scheme's state with the optimizer, and
    `resume_checkpoint` loads it. Training then resumes bit for bit, even if a reuse iteration is next.

    Args:
        optimizer: an optimizer into which nothing has been loaded yet.
        scheme: in block mode.

    Returns:
        The handle of `scheme.alternate`. Without a call of its `remove()` an iteration stays open at the end.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if `scheme.alternate` refuses the scheme or the optimizer.
        RuntimeError: if an iteration is open.

    Example:
        >>> from rdp_kernels.integrations.timm import attach
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> handle = attach(optimizer, rdp.ResidualDropPath(model, drop_prob=0.5, seed=0))
        >>> for x in torch.randn(4, 16, 8):
        ...     model(x).square().mean().backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> optimizer.state_dict()["ResidualDropPath"]["completed"]
        {'drop': 2, 'reuse': 2}
        >>> handle.remove()
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
