"""The check that a training loop trains the model of a scheme."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .._utils.ranks import world_size
from ..paths.path import paths_of
from ..scheme.scheme import ResidualDropPath
from . import distributed


def check_trained(model: nn.Module, scheme: ResidualDropPath) -> None:
    """Checks that `model`, which the loop calls, is the scheme's model in any number of wrappers.

    Raises `ValueError` where it isn't, for example where it is a copy, and for `DataParallel`, whose threads would
    freeze and unfreeze the same modules. Every rank has to call this: the ranks agree on the masks.
    """
    if isinstance(model, DataParallel):
        raise ValueError("model must not be in DataParallel: run one process for each device (torchrun), or use one")
    if not any(
        path_module.binding.scheme is scheme for module in model.modules() for _, path_module in paths_of(module)
    ):
        raise ValueError(
            "scheme must belong to the model that is trained, but none of its paths is in that model: was the model "
            "copied or made anew (model_init) after the scheme?"
        )
    if isinstance(model, DistributedDataParallel):
        distributed.register(model, scheme)
    elif world_size() > 1:
        distributed.agree(scheme)
