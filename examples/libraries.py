"""Imports of timm, torchvision and transformers. They also work with a torch that torchvision wasn't compiled for."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

LIBRARIES = ("timm", "torchvision", "transformers")

_declared: list[torch.library.Library] = []
"""Keeps the declared ops, which exist as long as the object that declared them."""


def import_torchvision() -> ModuleType:
    """Imports torchvision. If its compiled library doesn't match torch's build, this declares two missing ops first."""
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _declared.append(torch.library.Library("torchvision", "FRAGMENT"))
    for name in ("nms", "qnms"):
        _declared[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision")


def installed(library: str) -> bool:
    """Returns whether `library` can be imported."""
    return importlib.util.find_spec(library) is not None


def resolve(qualified: str) -> Any:
    """Returns the object named `package.module.Class`. timm and transformers import torchvision if it is installed."""
    if installed("torchvision"):
        import_torchvision()
    module, name = qualified.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
