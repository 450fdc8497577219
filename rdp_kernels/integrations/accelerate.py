"""The scheme in a training loop of your own that uses `accelerate`:

    scheme = rdp.ResidualDropPath(model, drop_prob=0.2, seed=seed)          # before or after accelerator.prepare
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    register(accelerator, model, scheme)
    for images, labels in loader:
        for _ in scheme.iterations(len(images)):
            accelerator.backward(F.cross_entropy(model(images), labels))
            optimizer.step()
            optimizer.zero_grad()

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

    Args:
        accelerator: the one that runs the loop.
        model: the result of `accelerator.prepare` for the scheme's model.
        scheme: in either mode.

    Raises `TypeError` naming the argument, and `ValueError` where `model` isn't the scheme's.
    """
    if not isinstance(accelerator, Accelerator):
        raise TypeError(f"accelerator must be an accelerate.Accelerator, got {type(accelerator).__name__}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_scheme(scheme)
    check_trained(model, scheme)
    accelerator.register_for_checkpointing(scheme)
