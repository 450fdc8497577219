"""The scheme with FSDP2 (`torch.distributed.fsdp.fully_shard`).

Each branch is a unit of its own, and all ranks make the same calls. Call `shard_paths` first, then make the scheme and
the optimizer, then call `register`.
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
    """Shards a model by FSDP2, each branch by itself and then the rest.

    A dropped branch then isn't gathered, and a branch in which nothing learns isn't reduce-scattered. A unit holds the
    modules that a branch calls (norm and `fn`). γ and everything outside of branches belong to the model's unit.
    Branches that share a module belong to the first one's unit. If they share only a part of a module, it belongs to
    the model's unit.

    Args:
        model: built from `ResidualBranch`, or converted, without a scheme. Modules that are already sharded stay so.
        **options: passed to `fully_shard`: `mesh`, `mp_policy`, `reshard_after_forward`, `offload_policy` and others.

    Returns:
        `model`.

    Raises:
        TypeError: if `model` isn't a module.
        ValueError: if `model` has no paths.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from rdp_kernels.integrations import fsdp
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> model = fsdp.shard_paths(model, mesh=init_device_mesh("cpu", (1,)))
        >>> type(model[0].fn).__name__
        'FSDPLinear'
        >>> dist.destroy_process_group()
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
    """Checks that the schemes of all ranks agree, and in sample mode makes ranks call the same branches.

    Every rank has to call it. Without it, ranks whose masks differ wait for each other forever. See
    `rdp_kernels.integrations.distributed.agree`.

    Args:
        model: sharded by `shard_paths` or `fully_shard`.
        scheme: the scheme of `model`.
        every_iteration: as in `distributed.agree`.
        timeout: as in `distributed.agree`.

    Returns:
        The handle of `distributed.agree`.

    Raises:
        RuntimeError: on every rank, if ranks disagree.
        TypeError: if `model` isn't sharded yet, or if an argument has another type.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> from rdp_kernels.integrations import fsdp
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> model = fsdp.shard_paths(model, mesh=init_device_mesh("cpu", (1,)))
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
        >>> agreement = fsdp.register(model, scheme)
        >>> for _ in scheme.iterations():
        ...     model(torch.randn(8, 8)).square().mean().backward()
        >>> dist.destroy_process_group()
    """
    if not any(isinstance(module, FSDPModule) for module in model.modules()):
        raise TypeError("model must be sharded by fully_shard (or shard_paths) first, but holds no FSDPModule")
    return agree(scheme, every_iteration=every_iteration, timeout=timeout)
