"""The scheme in your own training loop with `accelerate`.

The loop opens the iterations. `register` adds the scheme to the checkpoints of an `Accelerator`.
`accelerator.accumulate` decides when an optimizer steps. With it, leave the loop as it was and call
`scheme.alternate(optimizer)`.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from ..scheme.scheme import ResidualDropPath
from ._checks import check_scheme
from .distributed import check_trained

__all__ = ["register"]


def register(accelerator: Accelerator, model: nn.Module, scheme: ResidualDropPath) -> None:
    """Adds the scheme to `accelerator.save_state` and `load_state`, so that training resumes bit for bit.

    If `accelerator.prepare` wrapped the model in DDP, this also calls `distributed.register`. With several processes
    every process has to call it.

    Args:
        accelerator: runs the training loop.
        model: the result of `accelerator.prepare` for the scheme's model.
        scheme: in block or sample mode. Make it before or after `prepare`.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if `model` isn't the scheme's model.

    Example:
        >>> from accelerate import Accelerator
        >>> from rdp_kernels.integrations.accelerate import register
        >>> accelerator = Accelerator(cpu=True)
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
        >>> model, optimizer = accelerator.prepare(model, optimizer)
        >>> register(accelerator, model, scheme)
        >>> for x in torch.randn(2, 16, 8):
        ...     for _ in scheme.iterations(len(x)):
        ...         accelerator.backward(model(x).square().mean())
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_scheme(scheme)
    check_trained(model, scheme)
    accelerator.register_for_checkpointing(scheme)
