"""Importing the libraries whose models are converted."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import Any

import torch

LIBRARIES = ("timm", "torchvision", "transformers")

# Declared once, before torchvision's Python code asks for them, and kept alive: they vanish with this object.
_declared: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """torchvision, also where its compiled library doesn't match torch's build: its import needs two ops declared."""
    global _declared
    if _declared is None and importlib.util.find_spec("torchvision") is not None:
        _declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                _declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
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
