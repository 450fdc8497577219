"""Importing the libraries whose models are converted."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from examples.digits.loops import import_torchvision

LIBRARIES = ("timm", "torchvision", "transformers")


def installed(library: str) -> bool:
    """Whether `library` can be imported."""
    return importlib.util.find_spec(library) is not None


def resolve(qualified: str) -> Any:
    """The object named `package.module.Class`. timm and transformers import torchvision where they find it."""
    if installed("torchvision"):
        import_torchvision()
    module, name = qualified.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)
