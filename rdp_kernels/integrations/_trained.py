"""What every training loop is asked before a scheme follows it: whether the scheme's model is the one it trains."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .._utils.ranks import world_size
from ..paths.path import paths_of
from ..scheme.scheme import ResidualDropPath
from . import distributed


def check_trained(model: nn.Module, scheme: ResidualDropPath) -> None:
    """`model`: what the loop calls, with its wrappers.

    Raises `ValueError` where it isn't the scheme's, a copy for example, and for `DataParallel`, whose threads would
    freeze and unfreeze the same modules. With several ranks all of them have to call this: they agree on the masks.
    """
    if isinstance(model, DataParallel):
        raise ValueError("model must not be in DataParallel: run one process for each device (torchrun), or use one")
    if not any(
        path_module.binding.scheme is scheme for module in model.modules() for _, path_module in paths_of(module)
    ):
        raise ValueError(
            "scheme must be of the model that is trained, but none of its paths is in that: was the model copied or "
            "made anew (model_init) after the scheme?"
        )
    if isinstance(model, DistributedDataParallel):
        distributed.register(model, scheme)
    elif world_size() > 1:
        distributed.agree(scheme)
