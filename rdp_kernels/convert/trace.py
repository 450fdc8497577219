"""The graph of one block's own forward in training mode, its children as leaves.

Whatever is read as a Python value while tracing holds for that one call only: attributes of the block and values that
decide an `if` become guards, which are looked at again at every call.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..drop_paths import owns_drop_path
from . import in_place
from .calls import CONSTANTS, Call, Refused, Signature, cloned


@dataclass
class Trace:
    graph: fx.Graph
    signature: Signature
    attributes: dict[str, Any]
    """Constants that the forward read from the block."""
    shapes: tuple[tuple[int, ...] | None, ...] | None = None
    """Those of the inputs behind dimension 0, where they decided something."""


def trace(block: nn.Module, call: Call) -> Trace:
    """Raises `Refused` where the forward can't be traced."""
    reasons: list[str] = []
    for guided in (False, True):
        for integers_are_inputs in (True, False):
            signature = Signature.of(call, integers_are_inputs)
            if reasons and not integers_are_inputs and not any(type(v) is int for v in call.flat()[0]):
                continue  # the same once more
            inputs = signature.inputs_of(call.args, call.kwargs)
            assert inputs is not None
            values = [cloned(v) if isinstance(v, Tensor) else v for v in inputs]
            tracer = _Tracer(signature, values, guided)
            try:
                return tracer.run(block)
            except Refused as refused:
                reasons.append(str(refused))
            except Exception as error:
                if "item assignment" in str(error):
                    raise Refused("its forward assigns to a part of a tensor") from error
                reasons.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    raise Refused(f"its forward can't be traced: {reasons[-1]}")


class _Tracer(fx.Tracer):
    """`guided`: a Python value that is asked of a proxy is that of the recorded call."""

    proxy_buffer_attributes = True

    def __init__(self, signature: Signature, values: list[Any], guided: bool):
        super().__init__()
        self._signature, self._inputs, self._guided = signature, values, guided
        self._values: dict[fx.Node, Any] = {}
        self._running = self._decided = False

    def run(self, block: nn.Module) -> Trace:
        before = set(block.__dict__)
        training = block.training
        block.training = True
        try:
            with torch.no_grad(), _recording(block) as attributes:
                graph = self.trace(block)
        finally:
            block.training = training
            constants = set(block.__dict__) - before
            for name in constants:  # torch.fx puts them on the user's module
                del block.__dict__[name]
        if constants:
            raise Refused("its forward makes a tensor of constants, which would stay on this device and in this shape")
        graph.lint()
        shapes = None
        if self._decided:
            shapes = tuple(tuple(v.shape[1:]) if isinstance(v, Tensor) else v for v in self._inputs)
        return Trace(graph, self._signature, attributes, shapes)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not (type(m) is nn.Sequential and owns_drop_path(m))

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = []
        for number, value in enumerate(self._inputs):
            proxy = self.create_proxy("placeholder", f"input_{number}", (), {})
            self._values[proxy.node] = value
            proxies.append(proxy)

        def function(root: nn.Module, *inputs: Any) -> Any:
            args, kwargs = self._signature.call_with(inputs)
            return root_fn(root, *args, **kwargs)

        return function, [self.root, *proxies]

    # With values at hand

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Guided(node, self) if self._guided else in_place.Proxy(node, self)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if self._guided and kind not in ("placeholder", "output"):
            self._running = True
            try:
                self._values[node] = run_node(node, self.root, self._values)
            finally:
                self._running = False
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._running else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def concrete(self, proxy: fx.Proxy) -> Any:
        value = self._values[proxy.node]
        if isinstance(value, Tensor):
            raise Refused(f"what it does depends on numbers in a tensor ({proxy.node})")
        self._decided = True
        return value

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.concrete(obj)) if self._guided else super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        if not self._guided:
            return super().iter(obj)
        self._decided = True
        return iter([obj[i] for i in range(len(self._values[obj.node]))])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        return self._values[obj.node].keys() if self._guided else super().keys(obj)


class _Guided(in_place.Proxy):
    tracer: _Tracer

    def __index__(self) -> int:
        return int(self.tracer.concrete(self))

    def __int__(self) -> int:
        return int(self.tracer.concrete(self))

    def __float__(self) -> float:
        return float(self.tracer.concrete(self))

    def __len__(self) -> int:
        self.tracer._decided = True
        return len(self.tracer._values[self.node])


@contextlib.contextmanager
def _recording(block: nn.Module) -> Iterator[dict[str, Any]]:
    """Collects the constants that are read from `block` meanwhile."""
    original, found = type(block), dict[str, Any]()

    def read(self: nn.Module, name: str) -> Any:
        value = original.__getattribute__(self, name)
        if self is block and name != "training" and not name.startswith("_") and is_constant(value):
            found[name] = value
        return value

    block.__class__ = type(
        original.__name__, (original,), {"__getattribute__": read, "__module__": original.__module__}
    )
    try:
        yield found
    finally:
        block.__class__ = original


def is_constant(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(is_constant, value))
    return isinstance(value, CONSTANTS)


def run_node(node: fx.Node, root: nn.Module, values: dict[fx.Node, Any]) -> Any:
    """The value of one node from those of its arguments."""

    def plain(argument: Any) -> Any:  # torch.fx's own lists and dicts are immutable
        if isinstance(argument, list):
            return [plain(a) for a in argument]
        if isinstance(argument, dict):
            return {k: plain(v) for k, v in argument.items()}
        return tuple(plain(a) for a in argument) if type(argument) is tuple else argument

    args, kwargs = (plain(fx.map_arg(a, values.__getitem__)) for a in (node.args, node.kwargs))
    if node.op == "get_attr":
        value: Any = root
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return args[0]


def run_graph(graph: fx.Graph, root: nn.Module, inputs: list[Any]) -> dict[fx.Node, Any]:
    """The values of all nodes."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        values[node] = next(given) if node.op == "placeholder" else run_node(node, root, values)
    return values
