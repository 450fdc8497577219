"""`x += y` and the like, which torch.fx would record as `x + y`: of a tensor they keep the dtype. And hashes,
which torch.fx would give of the proxy."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import fx

_TORCH = os.path.dirname(torch.__file__) + os.sep


def iadd(x: Any, y: Any) -> Any:
    x += y
    return x


def isub(x: Any, y: Any) -> Any:
    x -= y
    return x


def imul(x: Any, y: Any) -> Any:
    x *= y
    return x


def itruediv(x: Any, y: Any) -> Any:
    x /= y
    return x


class Proxy(fx.Proxy):
    """Records them as calls of these functions. Torch's code for `operator.iadd` would change integers' old names."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", itruediv, (self, other), {})

    def __hash__(self) -> int:
        """In a set or dict of numbers it is never found, so that what follows holds for one shape."""
        if not sys._getframe(1).f_code.co_filename.startswith(_TORCH):
            raise fx.proxy.TraceError("it looks something up by a value that has no number while it is recorded")
        return id(self)
