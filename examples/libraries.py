"""Importing timm, torchvision and transformers, also beside a torch that torchvision was not compiled for."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

LIBRARIES = ("timm", "torchvision", "transformers")

_declared: list[torch.library.Library] = []
"""Ops vanish with the object that declared them."""


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled library doesn't match torch's build: two ops are then declared for it."""
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
    """Whether `library` can be imported."""
    return importlib.util.find_spec(library) is not None


def resolve(qualified: str) -> Any:
    """The object named `package.module.Class`. timm and transformers import torchvision where they find it."""
    if installed("torchvision"):
        import_torchvision()
    module, name = qualified.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
