"""Proxies that record `x += y` and the like. torch.fx would record `x + y`, which may have another dtype.

They also refuse or replace hashes, as torch.fx would give the hash of the proxy.
"""

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
    """Records in-place operators as calls of the functions above.

    The code that torch.fx writes for `operator.iadd` is `x += y; z = x`, which would give integers new values under
    their old names.
    """

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", iadd, (self, other), {})

    def __isub__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", isub, (self, other), {})

    def __imul__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", imul, (self, other), {})

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", itruediv, (self, other), {})

    def __hash__(self) -> int:
        """Refuses code outside of torch: a proxy is never found in a set or dict of numbers, so that the graph would
        hold for one shape only."""
        if not sys._getframe(1).f_code.co_filename.startswith(_TORCH):
            raise fx.proxy.TraceError("it looks something up by a value that has no number while it is recorded")
        return id(self)
