"""`x += y` and the like, which torch.fx would record as `x + y`: of a tensor they keep the dtype."""

from __future__ import annotations

from typing import Any

from torch import fx


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
