"""Finds where a branch may be dropped in a block's graph: calls of drop-paths or, if there are none, residual adds."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from .graphs import Values, ancestors, computed_only_for, is_add, is_heavy, module_calls
from .libraries import CONCATENATED, is_drop_path
from .observed import has_hooks, law_of

_SHORTCUT = re.compile(r"downsample|shortcut|skip|proj|identity", re.IGNORECASE)


@dataclass
class DropSite:
    """A node whose value is masked where its branch is dropped: a call of a drop-path, or a `mark`."""

    node: fx.Node
    name: str
    drop_path: str | None
    refused: str | None = None
    """Why the path can't follow what the drop-path does; None if it can."""


def mark(x: Tensor) -> Tensor:
    """Marks the place in a graph where a block without a drop-path would have one."""
    return x


def drop_path_sites(graph: fx.Graph, modules: dict[str, nn.Module], values: Values) -> list[DropSite]:
    sites: list[DropSite] = []
    for node in graph.nodes:
        target = str(node.target)
        if node.op == "call_module" and node.users and is_drop_path(target.rpartition(".")[2], modules[target]):
            sites.append(DropSite(node, _numbered(target, sites), target, _why_not(node, modules[target], values)))
    return sites


def _why_not(node: fx.Node, drop_path: nn.Module, values: Values) -> str | None:
    """Why a path can't follow what the drop-path does in this call; None if it can."""
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        given = [*map(str, node.args), *(f"{name}={value}" for name, value in node.kwargs.items())]
        return f"it is called with ({', '.join(given)}) instead of one tensor, so it does more than drop"
    if has_hooks(drop_path):
        return "it has hooks, which wouldn't run"
    x, out = values[node.args[0]], values[node]
    if not isinstance(x, Tensor):
        return f"it is called with {type(x).__name__} instead of a tensor"
    law = law_of(drop_path, x.dim())
    if isinstance(law, str):
        return law
    same = isinstance(out, Tensor) and out.dtype == x.dtype
    if not same or not (x.is_meta or torch.equal(out.nan_to_num(), x.nan_to_num())):
        return "in eval mode it isn't the identity on what it is called with"
    return None


def _numbered(name: str, sites: list[DropSite]) -> str:
    """Makes the names of a block's paths differ: `name`, `name:1`, `name:2`."""
    count = sum(site.name.partition(":")[0] == name for site in sites)
    return f"{name}:{count}" if count else name


def unnamed_sites(block: nn.Module, graph: fx.Graph, modules: dict[str, nn.Module], values: Values) -> list[DropSite]:
    """Finds residual adds in the graph: one summand is computed with weights, the other is the residual or a shortcut
    from it. Each branch gets a `mark`."""
    if f"{type(block).__module__}.{type(block).__qualname__}" in CONCATENATED:
        (output,) = [node for node in graph.nodes if node.op == "output"]
        result = output.args[0]
        return [DropSite(_marked(graph, result, output, values), "output", None)] if isinstance(result, fx.Node) else []
    sites: list[DropSite] = []
    for add in list(graph.nodes):
        branch = _branch_of(graph, add, modules, values) if is_add(add) else None
        if branch is not None:
            called = module_calls([*computed_only_for(graph, branch), branch])
            name = _numbered(f"add_{called[-1]}" if called else add.name, sites)
            sites.append(DropSite(_marked(graph, branch, add, values), name, None))
    return sites


def _branch_of(graph: fx.Graph, add: fx.Node, modules: dict[str, nn.Module], values: Values) -> fx.Node | None:
    """The summand that is a branch; None if there is none."""
    summands = [node for node in add.args if isinstance(node, fx.Node)]
    whole = [isinstance(values[n], Tensor) and values[n].shape == values[add].shape for n in summands]
    if summands[0] is summands[1] or not all(whole):
        return None
    computed = [_computed_for(graph, node, add) for node in summands]
    heavy = [any(is_heavy(n, modules) for n in nodes) for nodes in computed]
    if all(heavy):
        heavy = [not any(map(_SHORTCUT.search, module_calls(nodes))) for nodes in computed]
    if sum(heavy) != 1:
        return None
    branch, residual = summands[heavy.index(True)], summands[heavy.index(False)]
    nodes = computed[heavy.index(True)]
    inputs = {source for node in nodes for source in node.all_input_nodes} - set(nodes)
    return branch if inputs & {residual, *ancestors(residual)} else None


def _computed_for(graph: fx.Graph, node: fx.Node, add: fx.Node) -> list[fx.Node]:
    """`node` and the nodes that only it needs; empty if other nodes than `add` use it."""
    if set(node.users) != {add} or node.op == "placeholder":
        return []
    return [*computed_only_for(graph, node), node]


def _marked(graph: fx.Graph, node: fx.Node, user: fx.Node, values: Values) -> fx.Node:
    with graph.inserting_before(user):
        site = graph.call_function(mark, (node,))
    user.replace_input_with(node, site)
    values.alias(site, node)
    return site
