"""Makes the graph of one block's own forward in training mode, with its children as leaves.

A Python value that is read during tracing holds for that one call only. Values that `watch.py` sees, and shapes and
dtypes that decide an `if`, therefore become guards, which every later call checks.
"""

from __future__ import annotations

import copy
import operator
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from . import in_place
from .called import ambient
from .calls import BlockCall, Refused, Signature, cloned
from .guards import Guard
from .libraries import drop_paths_of
from .report import describe
from .snapshot import preserved_generators
from .watch import Watch, of_user

LARGEST = 20_000
"""A forward with more nodes is assumed to loop for ever. Large blocks have some hundreds."""


@dataclass
class Trace:
    graph: fx.Graph
    signature: Signature
    guards: tuple[Guard, ...]
    """Python values that the forward read."""
    inputs: tuple[Any, ...] | None = None
    """What later inputs must be: `(shape after dimension 0, dtype or None, device type or None)` for each tensor, the
    value for anything else. None if nothing that the forward did depends on them."""
    sizes: tuple[Any, ...] = ()
    """Sizes whose dimension 0 decided something. They must be the same for another number of samples."""
    sets: tuple[tuple[str, Any], ...] = ()
    """Attributes of the block that the forward sets, with their constant values."""
    dtypes: tuple[str, ...] = ()
    """Reasons to refuse the block: dtypes that decided something and that autocast may change."""


def trace(block: nn.Module, call: BlockCall) -> Trace:
    """Traces a block's forward. Raises `Refused` if that fails, or if the forward does something that a graph can't."""
    reasons: list[str] = []
    for guided in (False, True):
        for integers_are_inputs in (True, False):
            signature = Signature.of(call, integers_are_inputs)
            if reasons and not integers_are_inputs and not any(type(v) is int for v in call.flat()[0]):
                continue  # the result would be the same
            inputs = signature.inputs_of(call.args, call.kwargs)
            assert inputs is not None
            values = [cloned(v) if isinstance(v, Tensor) else v for v in inputs]
            try:
                return _Tracer(signature, values, guided).run(block)
            except Refused:
                raise
            except Exception as error:
                if "item assignment" in str(error):
                    raise Refused("its forward assigns to a part of a tensor") from error
                reasons.append(describe(error))
    own = [reason for reason in reasons if not reason.startswith("TraceError")]  # from torch.fx without values
    raise Refused(f"its forward can't be traced: {'; '.join(dict.fromkeys(own or reasons))}")


_SIZES = {"shape", "size", "numel", "nelement", "ndim", "dim", "ndimension", "__len__"}
_DTYPES = {"dtype", "is_floating_point", "is_complex", "element_size", "itemsize", "type"}
_DEVICES = {"device", "is_cuda", "is_cpu", "is_mps", "is_meta", "is_xpu", "get_device"}


class _Tracer(fx.Tracer):
    """If `guided`, a proxy that is asked for a Python value has that of the recorded call."""

    proxy_buffer_attributes = True

    def __init__(self, signature: Signature, values: list[Any], guided: bool):
        super().__init__()
        self._signature, self._inputs, self._guided = signature, values, guided
        self._values: dict[fx.Node, Any] = {}
        self._running, self._thread = False, threading.get_ident()
        self._decided: set[str] = set()
        self._sizes: list[Any] = []
        self._dtypes: list[str] = []

    def run(self, block: nn.Module) -> Trace:
        before = set(block.__dict__)
        training = block.training
        block.training = True
        # Children that run for their values are those of a copy.
        self._block = copy.deepcopy(block) if self._guided else block
        try:
            with torch.enable_grad():
                self._ambient = ambient()
                several = sum(isinstance(value, Tensor) for value in self._inputs) > 1
                self._watch = Watch(block, lambda path: self.create_proxy("get_attr", path, (), {}), several)
                with self._watch():
                    graph = self.trace(block)
        finally:
            block.training = training
            constants = set(block.__dict__) - before
            for name in constants:  # torch.fx has put them on the user's module
                del block.__dict__[name]
        if constants:
            raise Refused("its forward makes a tensor of constants, which would stay on this device and in this shape")
        if self._dtypes:
            self._guard_dtypes(block)
        graph.lint()
        inputs = tuple(map(self._what_decided, self._inputs)) if self._decided else None
        guards, sets = self._watch.findings.guards, tuple(self._watch.sets.items())
        return Trace(graph, self._signature, guards, inputs, tuple(self._sizes), sets, tuple(self._dtypes))

    def _guard_dtypes(self, block: nn.Module) -> None:
        """Guards one parameter of each dtype, as `half()` changes all of them."""
        by_dtype = {p.dtype: name.split(".") for name, p in block.named_parameters() if p.is_floating_point()}
        for dtype, path in by_dtype.items():
            self._watch.guard((*path, "dtype"), dtype, len(path) - 1)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or _has_any_global_hook()
        return bool(hooks) or not (type(m) is nn.Sequential and drop_paths_of(m))

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        proxies = []
        for number, value in enumerate(self._inputs):
            proxy = self.create_proxy("placeholder", f"input_{number}", (), {})
            self._values[proxy.node] = value
            proxies.append(proxy)

        def function(root: nn.Module, *inputs: Any) -> Any:
            args, kwargs = self._signature.call_with(inputs)
            given = pytree.tree_flatten((args, kwargs))
            out = root_fn(root, *args, **kwargs)
            flat, structure = pytree.tree_flatten((args, kwargs))
            if structure != given[1] or any(a is not b for a, b in zip(flat, given[0], strict=True)):
                raise Refused("its forward changes a list or dict that it is called with")
            return self._returned(out)

        return function, [self.root, *proxies]

    def _returned(self, out: Any) -> Any:
        """The output of the forward, in a form whose type the graph keeps."""
        if type(out) in (list, tuple):
            return type(out)(map(self._returned, out))
        if isinstance(out, dict):
            items = {name: self._returned(value) for name, value in out.items()}
            if type(out) is dict:
                return items
            if not all(isinstance(name, str) for name in items):
                raise Refused(f"its forward returns {type(out).__name__}, which can't be made again from its items")
            return self.create_proxy("call_function", type(out), (), items)
        if isinstance(out, (list, set, frozenset)) or (isinstance(out, tuple) and not hasattr(out, "_fields")):
            raise Refused(f"its forward returns {type(out).__name__}, which a graph doesn't return")
        return out

    # Guided tracing

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Guided(node, self) if self._guided else in_place.Proxy(node, self)

    def create_node(
        self, kind: str, target: Any, args: Any, kwargs: Any, name: Any = None, type_expr: Any = None
    ) -> fx.Node:
        if len(self.graph.nodes) > LARGEST:
            raise self._watch.refuse(f"its forward makes more than {LARGEST} operations")
        if kind not in ("placeholder", "output") and ambient() != self._ambient:
            raise self._watch.refuse(
                "its forward enters a context (autocast, no_grad, ...), which a graph doesn't have"
            )
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        if self._guided and kind not in ("placeholder", "output"):
            self._running = self._watch.paused = True
            try:
                with torch.no_grad(), preserved_generators():
                    self._values[node] = run_node(node, self._block, self._values)
            finally:
                self._running = self._watch.paused = False
        return node

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs) if self._is_running() else super().call_module(m, forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._is_running() else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _is_running(self) -> bool:
        """Whether a module is called for its values, or in another thread, where the patches of torch.fx act too."""
        return self._running or threading.get_ident() != self._thread

    def concrete(self, proxy: fx.Proxy) -> Any:
        value = self._values[proxy.node]
        if isinstance(value, Tensor):
            raise Refused(f"what it does depends on numbers in a tensor ({proxy.node})")
        self._decide(proxy.node)
        return value

    def _decide(self, node: fx.Node) -> None:
        """Notes the inputs that a Python value was computed from. Raises `Refused` if they can't be guarded."""
        self._decided.add("value")
        stack, seen = [node], set[fx.Node]()
        while stack:
            current = stack.pop()
            if current in seen or current.op == "placeholder":
                continue
            seen.add(current)
            tensors = [n for n in current.all_input_nodes if isinstance(self._values[n], Tensor)]
            if tensors:
                self._decide_by_tensor(current, tensors[0])
            elif current.target in (operator.eq, operator.ne) and self._are_alike_in_any_batch(*current.args):
                sizes = current.args[1] if isinstance(current.args[1], tuple) else ()
                stack += [size for size in sizes[1:] if isinstance(size, fx.Node)]
            elif not (current.target is operator.getitem and self._is_size_behind_rows(current)):
                stack += current.all_input_nodes

    def _is_shape(self, node: fx.Node) -> bool:
        return isinstance(self._values[node], torch.Size)

    def _are_alike_in_any_batch(self, shape: Any, other: Any) -> bool:
        """Whether comparing a shape with another, or with sizes taken from one, has the same result for any batch: the
        two are equal, as both follow the batch, or they differ after dimension 0."""
        if not (isinstance(shape, fx.Node) and self._is_shape(shape)):
            return False
        first = self._values[shape]
        if isinstance(other, fx.Node):
            second = self._values[other]
            follows = self._is_shape(other)
        else:
            follows = isinstance(other, tuple) and len(other) > 0 and isinstance(other[0], fx.Node)
            second = tuple(self._values[n] if isinstance(n, fx.Node) else n for n in other) if follows else ()
        return follows and (first == second or first[1:] != second[1:])

    def _is_size_behind_rows(self, node: fx.Node) -> bool:
        source, index = node.args
        if not (isinstance(source, fx.Node) and self._is_shape(source) and isinstance(index, (int, slice))):
            return False
        picked = range(len(self._values[source]))[index]
        return (0 not in picked) if isinstance(picked, range) else picked != 0

    def _decide_by_tensor(self, node: fx.Node, tensor: fx.Node) -> None:
        reads = node.target in (getattr, "__getattr__")
        name = str(node.args[1]) if reads else getattr(node.target, "__name__", node.target)
        if node.op not in ("call_function", "call_method") or len(node.all_input_nodes) > 1:
            name = ""
        if name in _SIZES:
            behind = name == "size" and len(node.args) > 1 and node.args[1] not in (0, -self._values[tensor].dim())
            if tensor.op == "get_attr":
                self._guard_of_tensor(tensor, "shape")
            elif not behind and name not in ("ndim", "dim", "ndimension"):
                self._sizes.append(self._values[node])
        elif name in _DTYPES or name in _DEVICES:
            kind = "dtype" if name in _DTYPES else "device"
            self._decided.add(kind)
            if tensor.op == "get_attr":
                self._guard_of_tensor(tensor, kind)
            elif kind == "dtype" and tensor.op != "placeholder":
                self._dtypes.append(f"what it does depends on the dtype of {tensor}, which differs under autocast")
        elif name in ("requires_grad", "is_leaf", "grad_fn", "grad", "stride", "is_contiguous", "data_ptr", "_version"):
            raise Refused(f"what it does depends on {name} of a tensor ({tensor})")
        else:
            raise Refused(f"what it does depends on numbers in a tensor ({node})")

    def _guard_of_tensor(self, tensor: fx.Node, what: str) -> None:
        *modules, attribute = str(tensor.target).split(".")
        self._watch.guard((*modules, attribute, what), getattr(self._values[tensor], what), len(modules))

    def _what_decided(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = value.dtype if "dtype" in self._decided else None
        return tuple(value.shape[1:]), dtype, value.device.type if "device" in self._decided else None

    def length(self, node: fx.Node) -> int:
        value = self._values[node]
        if isinstance(value, Tensor):
            self._decided.add("value")
            self._sizes.append(len(value))
        elif type(value) not in (tuple, list):  # of_length checks what a child returns
            self._decide(node)
        return len(value)

    def hashed(self, proxy: fx.Proxy, by_user: bool) -> int:
        """A hash that equals no number's hash, as a cache might keep the proxy in place of a number. A lookup therefore
        finds nothing, which the checks notice, and its result holds for this shape alone."""
        if by_user and not isinstance(self._values[proxy.node], Tensor):
            self.concrete(proxy)
        return id(proxy)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.concrete(obj)) if self._guided else super().to_bool(obj)

    def iter(self, obj: fx.Proxy) -> Iterator[Any]:
        if not self._guided:
            return super().iter(obj)
        value = self._values[obj.node]
        if type(value) in (tuple, list):  # what a child returned
            checked = self.create_proxy("call_function", of_length, (obj, len(value)), {})
            return iter([checked[i] for i in range(len(value))])  # type: ignore[index]
        return iter([obj[i] for i in range(self.length(obj.node))])  # type: ignore[index]

    def keys(self, obj: fx.Proxy) -> Any:
        return self._values[obj.node].keys() if self._guided else super().keys(obj)


def of_length(values: Any, length: int) -> Any:
    """The values that a child returned. Raises `RuntimeError` if their number isn't `length`, as in the trace."""
    if len(values) != length:
        raise RuntimeError(
            f"a child of a converted block returns {len(values)} values, and returned {length} at the conversion: "
            "call rdp.revert(model) and rdp.convert(model, example_inputs=...) again"
        )
    return values


class _Guided(in_place.Proxy):
    tracer: _Tracer

    def __index__(self) -> int:
        return int(self.tracer.concrete(self))

    __int__ = __index__

    def __float__(self) -> float:
        return float(self.tracer.concrete(self))

    def __len__(self) -> int:
        return self.tracer.length(self.node)

    def __hash__(self) -> int:
        return self.tracer.hashed(self, of_user(sys._getframe(1).f_code))


def run_node(node: fx.Node, root: nn.Module, values: dict[fx.Node, Any]) -> Any:
    """Computes the value of one node from the values of its arguments."""

    def plain(argument: Any) -> Any:  # torch.fx's own lists and dicts are immutable
        if isinstance(argument, list):
            return [plain(a) for a in argument]
        if isinstance(argument, dict):
            return {k: plain(v) for k, v in argument.items()}
        return tuple(plain(a) for a in argument) if type(argument) is tuple else argument

    args, kwargs = (plain(fx.map_arg(a, values.__getitem__)) for a in (node.args, node.kwargs))
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(root)
    if node.op == "call_module":
        return root.get_submodule(str(node.target))(*args, **kwargs)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        return node.target(*args, **kwargs)  # type: ignore[operator]
    return args[0]


def run_graph(graph: fx.Graph, root: nn.Module, inputs: list[Any]) -> dict[fx.Node, Any]:
    """Computes the values of all nodes."""
    values: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        values[node] = next(given) if node.op == "placeholder" else run_node(node, root, values)
    return values
