"""Questions about a torch.fx graph, changes of a graph, and the values of its nodes in two calls."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .calls import Refused
from .converted import RUN_PATH
from .in_place import iadd
from .trace import of_length, run_graph

_ADDS = {operator.add, torch.add, "add", "__add__"}
IN_PLACE_ADDS = {iadd, operator.iadd, "add_", "__iadd__"}
_HEAVY = {
    "linear", "conv1d", "conv2d", "conv3d", "matmul", "bmm", "einsum", "baddbmm", "addmm", "__matmul__",
    "scaled_dot_product_attention", "multi_head_attention_forward",
}  # fmt: skip
_CHEAP = {
    operator.getitem, getattr, of_length, "size", "dim", operator.mod, operator.floordiv,
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
}  # fmt: skip


class Values:
    """The value of every node in two calls, with batches of different sizes."""

    def __init__(self, graph: fx.Graph, block: nn.Module, inputs: list[list[Any]]):
        self.calls: list[dict[fx.Node, Any]] = []
        for given in inputs:
            copied = [v.clone() if isinstance(v, Tensor) else v for v in given]  # children may work in place
            try:
                with torch.no_grad():
                    self.calls.append(run_graph(graph, block, copied))
            except Exception as error:
                raise Refused(f"what was traced holds for one batch size ({type(error).__name__}: {error})") from error

    def __getitem__(self, node: fx.Node) -> Any:
        return self.calls[0][node]

    def of(self, node: fx.Node) -> tuple[Any, Any]:
        return self.calls[0][node], self.calls[1][node]

    def alias(self, node: fx.Node, original: fx.Node) -> None:
        for values in self.calls:
            values[node] = values[original]


def computed_only_for(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The nodes whose values only `node` needs, in order."""
    inside: list[fx.Node] = []
    members = {node}
    before = list(graph.nodes)
    for candidate in reversed(before[: before.index(node)]):
        if candidate.op != "placeholder" and candidate.users and members.issuperset(candidate.users):
            members.add(candidate)
            inside.append(candidate)
    return inside[::-1]


def ancestors(node: fx.Node) -> set[fx.Node]:
    seen, stack = set[fx.Node](), list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return seen


def is_add(node: fx.Node) -> bool:
    """Whether a node adds two values."""
    adds = node.op in ("call_function", "call_method") and node.target in _ADDS | IN_PLACE_ADDS
    return adds and len(node.args) == 2 and not node.kwargs and all(isinstance(a, fx.Node) for a in node.args)


def is_heavy(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is worth skipping: it has weights or multiplies matrices."""
    if node.op == "call_module":
        return any(True for _ in modules[str(node.target)].parameters())
    return name_of(node) in _HEAVY


def name_of(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0


def check_mutations(graph: fx.Graph) -> None:
    """Raises `Refused` if a tensor is changed in place and used under its old name, which a graph doesn't show."""
    for node in graph.nodes:
        name = name_of(node)
        if node.target is operator.setitem:
            raise Refused(f"its forward assigns to a part of a tensor ({node.name})")
        in_place = node.op == "call_method" and name.endswith("_") and not name.endswith("__")
        if in_place and not node.users:
            raise Refused(f"its forward changes a tensor in place and uses it under its old name ({node.name}: {name})")


def drop_dead(graph: fx.Graph) -> None:
    """Erases cheap nodes without users: items of tuples, shapes, attributes, and comparisons that an `if` has used."""
    for node in reversed(list(graph.nodes)):
        cheap = node.op == "get_attr" or node.target in _CHEAP
        if cheap and not node.users:
            graph.erase_node(node)


def fold_nothing(graph: fx.Graph, values: Values) -> None:
    """Replaces values that a child returns as None or empty, such as attention weights, by constants."""
    for node in list(graph.nodes):
        if node.target is operator.getitem and node.users and all(map(_is_nothing, values.of(node))):
            for user in list(node.users):
                taken: dict[fx.Node, Any] = {n: n for n in user.all_input_nodes} | {node: values[node]}
                user.args, user.kwargs = fx.map_arg((user.args, user.kwargs), taken.__getitem__)
            graph.erase_node(node)


def _is_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, (tuple, list)) and all(map(_is_nothing, value)))


def module_calls(nodes: Iterable[fx.Node]) -> list[str]:
    """The names of the modules that the nodes call, each once. Calls of paths are left out."""
    names = dict.fromkeys(str(node.target) for node in nodes if node.op == "call_module")
    return [name for name in names if name != RUN_PATH]
