"""FSDP2 (`torch.distributed.fsdp.fully_shard`): each branch is a unit of its own, and all ranks make the same calls.

fsdp.shard_paths(model)
scheme = rdp.ResidualDropPath(model, drop_prob=0.2, seed=seed)
fsdp.register(model, scheme)
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..paths.path import find_paths
from ..scheme.scheme import ResidualDropPath
from .distributed import Agreement, agree

__all__ = ["register", "shard_paths"]


def shard_paths(model: nn.Module, **options: Any) -> nn.Module:
    """Calls `fully_shard` on each path's branch, then on `model`. A dropped branch isn't gathered, and one in which
    nothing learns isn't reduce-scattered. Returns `model`.

    Args:
        model: built from `ResidualBranch`, or converted, without a scheme. Modules that are sharded already stay so.
        options: passed to `fully_shard`: `mesh`, `mp_policy`, `reshard_after_forward`, `offload_policy`, ...

    A unit holds the modules that a branch calls (norm and `fn`). γ and everything outside of branches belong to the
    model's unit. Branches that share a module belong to the first one's unit, or to the model's if only a part of a
    module is shared. Make the scheme and the optimizer afterwards. Raises the errors of `ResidualDropPath` for a model
    without paths.
    """
    for path in find_paths(model):
        modules = [m for m in path.module.branch_modules() if next(m.parameters(), None) is not None]
        if modules and not any(isinstance(inner, FSDPModule) for m in modules for inner in m.modules()):
            fully_shard(modules if len(modules) > 1 else modules[0], **options)
    if not isinstance(model, FSDPModule):
        fully_shard(model, **options)
    return model


def register(
    model: nn.Module, scheme: ResidualDropPath, *, every_iteration: bool = True, timeout: timedelta | None = None
) -> Agreement:
    """Makes ranks agree on what is dropped, and in sample mode call the same branches. Every rank has to call it.

    Without it, ranks whose masks differ wait for each other forever. Arguments and errors as in `distributed.agree`.
    Raises `TypeError` where `model` isn't sharded yet.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise TypeError("model must be sharded by fully_shard (or shard_paths) first, but holds no FSDPModule")
    return agree(scheme, every_iteration=every_iteration, timeout=timeout)
