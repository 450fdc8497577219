"""Cuts branches out of a block's graph: the nodes that only a drop-path's input needs become a function."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..kernels.spec import NORMS
from ..paths.path import paths_of
from .calls import HoldsPaths, Refused
from .converted import RUN_PATH
from .graphs import (
    IN_PLACE_ADDS,
    Values,
    check_mutations,
    computed_only_for,
    drop_dead,
    fold_nothing,
    is_add,
    is_float,
    is_heavy,
    module_calls,
)
from .guards import is_constant
from .sites import DropSite, drop_path_sites, unnamed_sites
from .spec import PathSpec
from .trace import Trace

_COMPARISONS = {operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge}
_NORMS = [kind.module for kind in NORMS.values()]


@dataclass
class Carved:
    """A block's graph that calls its paths, and the graphs of their branches."""

    graph: fx.Graph
    branches: list[fx.Graph]
    paths: list[PathSpec]
    refused: list[tuple[str, str]]
    """Each refused drop-path and the reason."""
    nested: list[tuple[str, str]]
    """Drop-paths that stay as they are inside the branch of a path, each with this path's name."""
    reference: fx.Graph
    """The graph before anything was cut, with a `mark` where a branch may be dropped but no drop-path is called."""
    called: list[tuple[str | None, int | None]]
    """For each call of a drop-path or mark, in order: the drop-path or None; the path's index or None if refused."""


def carve(
    block: nn.Module,
    traced: Trace,
    inputs: list[list[Any]],
    batch_sizes: tuple[int, ...],
    unnamed: bool = False,
) -> Carved:
    """Cuts the branches out of a traced graph.

    Args:
        block: the block that was traced.
        traced: the trace of its forward. Its graph is changed.
        inputs: the inputs of two calls with `batch_sizes` samples.
        batch_sizes: the numbers of samples in the two calls.
        unnamed: whether to look for residual adds if no drop-path is called.

    Returns:
        The graph that calls its paths, and the branches.
    """
    graph = traced.graph
    check_mutations(graph)
    drop_dead(graph)
    modules = dict(block.named_modules(remove_duplicate=False))
    values = Values(graph, block, inputs)
    fold_nothing(graph, values)
    sites = drop_path_sites(graph, modules, values)
    if not sites and unnamed:
        sites = unnamed_sites(block, graph, modules, values)
    reference = fx.Graph()
    reference.output(reference.graph_copy(graph, {}))
    carving = _Carving(block, graph, modules, values, batch_sizes)
    found: dict[int, tuple[PathSpec, fx.Graph]] = {}
    refused: list[tuple[str, str]] = []
    nested: list[tuple[str, str]] = []
    for number in reversed(range(len(sites))):  # a later branch may hold an earlier one
        site = sites[number]
        try:
            if site.node not in graph.nodes:
                nested.insert(0, (site.name, carving.gone[site.node]))
                continue
            found[number] = carving.cut(site, number)
        except Refused as reason:
            # An add around blocks with paths is reported only if a drop-path stands before it.
            if site.drop_path is not None or not isinstance(reason, HoldsPaths):
                refused.insert(0, (site.name, str(reason)))
    carving.check_shared_modules(found)
    places = {number: place for place, number in enumerate(sorted(found))}
    for number, place in places.items():
        call = carving.calls[number]
        call.args = (place, *call.args[1:])
    drop_dead(graph)
    graph.lint()
    called = [(site.drop_path, places.get(number)) for number, site in enumerate(sites)]
    specs, branches = [found[number][0] for number in places], [found[number][1] for number in places]
    return Carved(graph, branches, specs, refused, nested, reference, called)


@dataclass
class _Carving:
    block: nn.Module
    graph: fx.Graph
    modules: dict[str, nn.Module]
    values: Values
    batch_sizes: tuple[int, ...]
    calls: dict[int, fx.Node] = field(default_factory=dict)
    """The call of each path, by the number of its site."""
    gone: dict[fx.Node, str] = field(default_factory=dict)
    """The nodes that were cut out, each with the name of the path whose branch took it."""

    def cut(self, site: DropSite, number: int) -> tuple[PathSpec, fx.Graph]:
        """Replaces a site's branch by a call of its path, and returns path and branch. Raises `Refused`."""
        if site.refused is not None:
            raise Refused(site.refused)
        output = site.node.args[0]
        if not isinstance(output, fx.Node) or not is_float(self.values[output]):
            raise Refused("what is dropped is not a floating-point tensor")
        rows = tuple(value.shape[0] if value.dim() else 0 for value in self.values.of(output))
        if rows[0] == rows[1]:
            raise Refused(
                f"dimension 0 of what is dropped doesn't follow the batch: it is {rows[0]} for any batch size"
            )
        inside = self._without_foreign_rows(computed_only_for(self.graph, site.node), rows)
        if output not in inside or not any(is_heavy(node, self.modules) for node in inside):
            raise Refused("all that is computed for it is used elsewhere too, so there is nothing to skip")
        if any(paths_of(m) for node in inside for m in self._modules_in(node)):
            raise HoldsPaths("its branch holds blocks with paths of their own, and nested paths can't be planned apart")
        self._check_rows_are_not_numbered(inside, rows)
        add = self._add_of(site.node)
        inputs = self._inputs(inside, rows)
        residual = None if add is None else self._other(add, site.node)
        x = self._rows_of(inputs, residual)
        taken = {node: kind for node, kind in inputs if node is not x and isinstance(kind, str)}
        further = list(taken)
        branch, norm = self._branch(inside, output, x, inputs, rows, further)
        sum_dtype = "both"
        if add is None or add.target in IN_PLACE_ADDS:  # an add in place keeps its first summand's dtype
            sum_dtype = "branch" if add is None or add.args[0] is site.node else "residual"
        called = module_calls(inside)
        foreign = rows != self.batch_sizes
        spec = PathSpec(
            name=site.name,
            drop_path=site.drop_path,
            mode="block" if foreign else "sample",
            kinds=tuple(taken.values()),
            modules=tuple(called),
            parameters=self._own_parameters(inside, called),
            norm=norm,
            zeros=None if add is not None else self._zeros(output, x),
            sum_dtype=sum_dtype,
            dtype=self._only_dtype([x, output, *further], inside),
            batch_norm=any(isinstance(m, _BatchNorm) for node in inside for m in self._modules_in(node)),
            foreign_rows=foreign,
            dims=self.values[site.node].dim(),
        )

        replaced = site.node if add is None else add
        with self.graph.inserting_before(replaced):
            kwargs: dict[str, Any] = {} if residual is None or residual is x else {"residual": residual}
            # torch.fx prints this as `self._rdp_run_path(...)`, like the call of a child.
            call = self.graph.create_node("call_module", RUN_PATH, (number, x, *further), kwargs, "residual")
        self.calls[number] = call
        self.values.alias(call, replaced)
        replaced.replace_all_uses_with(call)
        for node in [replaced, site.node, *reversed(inside)]:
            if not node.users and node in self.graph.nodes:
                self.graph.erase_node(node)
                self.gone[node] = spec.name
        return spec, branch

    def _check_rows_are_not_numbered(self, inside: list[fx.Node], rows: tuple[int, ...]) -> None:
        """Raises `Refused` if a branch picks rows by number or compares their count, as both change if rows drop."""
        for node in inside:
            pairs = [self.values.of(source) for source in node.all_input_nodes]
            if node.target is operator.getitem:
                index = node.args[1][0] if isinstance(node.args[1], tuple) and node.args[1] else node.args[1]
                picks = isinstance(index, int) or (isinstance(index, slice) and index != slice(None))
                first, second = pairs[0]
                changes = isinstance(first, Tensor) and first.shape != second.shape
                if picks and changes and _follows(first, second, rows):
                    raise Refused(
                        f"its branch picks rows by number ({node.name}), which are other samples once rows are dropped"
                    )
            elif node.target in _COMPARISONS and any(type(a) is int and a != b for a, b in pairs):
                raise Refused(
                    f"its branch compares the number of its rows ({node.name}), which is smaller once some are dropped"
                )

    def _modules_in(self, node: fx.Node) -> list[nn.Module]:
        return [m for name in module_calls([node]) for m in self.modules[name].modules()]

    def check_shared_modules(self, found: dict[int, tuple[PathSpec, fx.Graph]]) -> None:
        """Raises `Refused` if a branch uses weights that are also used outside of all branches."""
        outside = {id(p) for n in self.graph.nodes for m in self._modules_in(n) for p in m.parameters()}
        read = {node.target for node in self.graph.nodes if node.op == "get_attr" and node.users}
        for spec, _ in found.values():
            for name in spec.parameters:
                if name in read:
                    raise Refused(f"the parameter {name!r} of a branch is used outside of all branches too")
            for name in spec.modules:
                if any(id(p) in outside for p in self.modules[name].parameters()):
                    raise Refused(f"the module {name!r} of a branch is called outside of all branches too")

    def _without_foreign_rows(self, inside: list[fx.Node], rows: tuple[int, ...]) -> list[fx.Node]:
        """The nodes without the views at their head that turn other dimensions into rows. These stay outside."""
        kept = list(inside)
        for node in inside:
            sources = [s for s in node.all_input_nodes if s not in kept and s.op != "get_attr"]
            is_view = not is_heavy(node, self.modules) and node.op != "call_module"
            if is_view and any(self._has_other_rows(source, rows) for source in sources):
                kept.remove(node)
        return kept

    def _has_other_rows(self, node: fx.Node, rows: tuple[int, ...]) -> bool:
        """Whether a node is a tensor that changes with the batch and doesn't have these rows."""
        a, b = self.values.of(node)
        return isinstance(a, Tensor) and a.shape != b.shape and not _follows(a, b, rows)

    def _add_of(self, site: fx.Node) -> fx.Node | None:
        """The add that takes the branch; None if the branch is used in another way."""
        (user, *others) = site.users
        if others or not is_add(user):
            return None
        other, out = self.values[self._other(user, site)], self.values[user]
        whole = isinstance(other, Tensor) and other.shape == self.values[site].shape == out.shape
        widens = out.dtype == torch.float64 != other.dtype  # `Promotion` does the other promotions
        return user if whole and is_float(other) and not widens else None

    @staticmethod
    def _other(add: fx.Node, site: fx.Node) -> fx.Node:
        first, second = add.args[:2]
        other = second if first is site else first
        assert isinstance(other, fx.Node)
        return other

    def _inputs(self, inside: list[fx.Node], rows: tuple[int, ...]) -> list[tuple[fx.Node, str | tuple]]:
        """The nodes that the branch takes from outside, each with its kind: "row", "shared" or, for sizes that follow
        the rows, the multiples of the rows."""
        members, found = set(inside), dict[fx.Node, Any]()
        for node in inside:
            for source in node.all_input_nodes:
                if source not in members and source not in found and source.op != "get_attr":
                    found[source] = self._kind(source, rows)
        return list(found.items())

    def _kind(self, node: fx.Node, rows: tuple[int, ...]) -> str | tuple:
        first, second = self.values.of(node)
        leaves = [list(v) if isinstance(v, torch.Size) else pytree.tree_leaves(v) for v in (first, second)]
        tensors = [v for v in leaves[0] if isinstance(v, Tensor)]
        if tensors:
            pairs = [pair for pair in zip(*leaves, strict=True) if isinstance(pair[0], Tensor)]
            if len(tensors) == len(leaves[0]):
                if all(a.shape == b.shape for a, b in pairs):
                    return "shared"
                if all(_follows(a, b, rows) for a, b in pairs):
                    return "row"
            shapes = ", ".join(str(list(a.shape)) for a, _ in pairs)
            raise Refused(
                f"its branch takes {node.name!r} of shape {shapes}, which changes with the batch and has no row for "
                f"each of the {rows[0]} that are dropped or kept"
            )
        if is_constant(first):
            if first == second:
                return "shared"
            multiples = [_multiple(a, b, rows) for a, b in zip(*leaves, strict=True)]
            if all(m is not None for m in multiples):
                return (multiples, isinstance(first, int))
        raise Refused(f"its branch takes {node.name!r} ({type(first).__name__}), which changes with the batch")

    def _rows_of(self, inputs: list[tuple[fx.Node, Any]], residual: fx.Node | None) -> fx.Node:
        """The input `x` of the branch: the residual if the branch takes it, else the first input with rows."""
        rows = [node for node, kind in inputs if kind == "row" and is_float(self.values[node])]
        if not rows:
            raise Refused("its branch takes no tensor with a row for each of those that are dropped")
        return residual if residual in rows else rows[0]  # type: ignore[return-value]

    def _branch(self, inside: list[fx.Node], output: fx.Node, x: fx.Node, inputs: list[tuple[fx.Node, Any]],
                rows: tuple[int, ...], further: list[fx.Node]) -> tuple[fx.Graph, str | None]:  # fmt: skip
        """The graph of the branch without the norm at its head, which the caller applies; and this norm's name."""
        graph, made = fx.Graph(), dict[fx.Node, Any]()
        made[x] = graph.placeholder("x")
        for node in further:
            made[node] = graph.placeholder(node.name)
        for node, kind in inputs:
            if isinstance(kind, tuple):
                multiples, single = kind
                sizes = [self._size(graph, made[x], multiple) for multiple in multiples]
                made[node] = sizes[0] if single else tuple(sizes)
        norm = self._leading_norm(inside, x)
        for node in inside:
            if node is norm:
                made[node] = made[x]
                continue
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in made:
                    made[source] = graph.node_copy(source)
            args, kwargs = (fx.map_arg(a, made.__getitem__) for a in (node.args, node.kwargs))
            made[node] = graph.create_node(node.op, node.target, args, kwargs, node.name)  # type: ignore[arg-type]
        graph.output(made[output])
        graph.lint()
        return graph, None if norm is None else str(norm.target)

    def _leading_norm(self, inside: list[fx.Node], x: fx.Node) -> fx.Node | None:
        users = [node for node in x.users if node in set(inside)]
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (x,) or users[0].kwargs:
            return None
        return users[0] if type(self.modules[str(users[0].target)]) in _NORMS else None

    @staticmethod
    def _size(graph: fx.Graph, x: fx.Node, multiple: Any) -> Any:
        constant, times = multiple
        if constant:
            return times
        size = graph.call_function(operator.getitem, (graph.call_function(getattr, (x, "shape")), 0))
        return size if times == 1 else graph.call_function(operator.mul, (size, times))

    def _zeros(self, output: fx.Node, x: fx.Node) -> tuple[int | None, ...]:
        shape, like = self.values[output].shape, self.values[x].shape
        return tuple(None if d < len(like) and like[d] == size else size for d, size in enumerate(shape) if d > 0)

    def _only_dtype(self, nodes: list[fx.Node], inside: list[fx.Node]) -> torch.dtype | None:
        """The dtype of all floating-point tensors that a branch takes, returns and owns; None where they differ."""
        values = pytree.tree_leaves([self.values[n] for n in nodes])
        values += [self.values[s] for n in inside for s in (n, *n.all_input_nodes) if s.op == "get_attr"]
        called = [self.modules[name] for name in module_calls(inside)]
        values += [t for module in called for t in (*module.parameters(), *module.buffers())]
        dtypes = {value.dtype for value in values if isinstance(value, Tensor) and value.is_floating_point()}
        return dtypes.pop() if len(dtypes) == 1 else None

    def _own_parameters(self, inside: list[fx.Node], called: list[str]) -> tuple[str, ...]:
        """The parameters that a branch reads itself and that belong to none of the modules that it calls."""
        owned = {id(p) for name in called for p in self.modules[name].parameters()}
        read = [n for node in inside for n in (node, *node.all_input_nodes) if n.op == "get_attr"]
        found = {str(n.target): operator.attrgetter(str(n.target))(self.block) for n in read}
        return tuple(n for n, p in found.items() if isinstance(p, nn.Parameter) and id(p) not in owned)


def _follows(a: Any, b: Any, rows: tuple[int, ...]) -> bool:
    return a.dim() > 0 and (a.shape[0], b.shape[0]) == rows and a.shape[1:] == b.shape[1:]


def _multiple(a: Any, b: Any, rows: tuple[int, ...]) -> tuple[bool, Any] | None:
    """A size at two batch sizes as (True, constant), or as (False, k) for k times the rows; None if it is neither."""
    if a == b:
        return True, a
    if type(a) is int and a % rows[0] == 0 and a * rows[1] == b * rows[0]:
        return False, a // rows[0]
    return None
