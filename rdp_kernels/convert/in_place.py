"""Proxies that record `x += y` and the like, where torch.fx would record `x + y`, which may have another dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import fx

from .called import TORCH


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


def _recorded(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], fx.Proxy]:
    def method(proxy: fx.Proxy, other: Any) -> fx.Proxy:
        return proxy.tracer.create_proxy("call_function", function, (proxy, other), {})

    return method


class Proxy(fx.Proxy):
    """Records in-place operators as calls of the functions above. For `operator.iadd` torch.fx would write
    `x += y; z = x`, which would give an integer a new value under its old name."""

    __iadd__, __isub__ = _recorded(iadd), _recorded(isub)
    __imul__, __itruediv__ = _recorded(imul), _recorded(itruediv)

    def __hash__(self) -> int:
        """Raises if code outside of torch looks the proxy up, as no set or dict of numbers holds it."""
        if not sys._getframe(1).f_code.co_filename.startswith(TORCH):
            raise fx.proxy.TraceError("it looks something up by a value that isn't known while it is recorded")
        return id(self)
