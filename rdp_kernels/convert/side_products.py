"""Finds attributes that a block's forward sets on its modules: attention maps, auxiliary losses, features.

A skipped branch doesn't set them, and a branch that runs on some rows computes them from these rows.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from .calls import CONSTANTS, BlockCall, cloned
from .snapshot import preserved_generators


def side_products_of(block: nn.Module, call: BlockCall) -> tuple[str, ...]:
    """The names, such as "attn.last_map", of tensors, counters and buffers that a forward of the block in training mode
    sets on its modules, without BatchNorm's buffers. A copy of the block is run; there are no names if that fails."""
    try:
        with preserved_generators(), torch.no_grad():
            copied = copy.deepcopy(block).train()
            before = _state(copied)
            given = call.map_tensors(cloned)
            copied(*given.args, **given.kwargs)
            return tuple(name for name, value in _state(copied).items() if _differ(before.get(name, []), value))
    except Exception:
        return ()


def _state(block: nn.Module) -> dict[str, list[tuple[Any, int]]]:
    """The values in all modules' attributes, containers taken apart, each with the number of writes to a tensor."""
    found = {}
    for path, module in block.named_modules():
        if isinstance(module, (_BatchNorm, _InstanceNorm)):
            continue
        for name, value in {**vars(module), **module._buffers}.items():
            made = f"{name}_g" in module._parameters or f"{name}_orig" in module._parameters  # by weight_norm, pruning
            if name not in ("_parameters", "_modules", "_buffers") and not made:
                leaves = pytree.tree_leaves(value)
                versions = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves]
                found[f"{path}.{name}" if path else name] = list(zip(leaves, versions, strict=True))
    return found


def _differ(before: list[tuple[Any, int]], after: list[tuple[Any, int]]) -> bool:
    return len(before) != len(after) or any(
        then != now or (old is not new and (isinstance(new, Tensor) or (isinstance(new, CONSTANTS) and old != new)))
        for (old, then), (new, now) in zip(before, after, strict=True)
    )
