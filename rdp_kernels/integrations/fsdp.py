"""FSDP2 (`torch.distributed.fsdp.fully_shard`): branches as units of their own, and ranks that make the same calls.

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


def shard_paths(model: nn.Module, **options: Any) -> nn.Module:
    """`fully_shard` of each path's branch, then of `model`: a dropped branch isn't gathered, and one in which nothing
    learns isn't reduce-scattered. Returns `model`.

    Args:
        model: built from `ResidualBranch`, or converted, without a scheme. What was sharded before stays as it is.
        options: those of `fully_shard`: `mesh`, `mp_policy`, `reshard_after_forward`, `offload_policy`, ...

    A unit holds what a branch calls (norm and `fn`); γ and what else is outside of branches belong to the model's.
    Branches that share a module belong to the first one's unit, or to the model's where only a part of it is shared.
    Make the scheme and the optimizer afterwards. Raises as `ResidualDropPath` does for a model without paths.
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
    """Makes ranks agree on what is dropped, and in sample mode call the same branches. Every rank calls it.

    Without it, ranks whose masks differ wait for each other for ever. Arguments and errors as of `distributed.agree`;
    `model` is sharded already, else that is a `TypeError`.
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise TypeError("model must be sharded by fully_shard (or shard_paths) before, and holds no FSDPModule")
    return agree(scheme, every_iteration=every_iteration, timeout=timeout)
