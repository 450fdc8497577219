"""`rdp.convert`: residual blocks of existing models become paths whose branches can be skipped and frozen.

| file | does |
|---|---|
| `libraries.py` | knows the drop-paths of other libraries by their names |
| `observed.py`, `drop_probe.py`, `drop_code.py` | find out what a drop-path does |
| `calls.py` | runs the model on an example and records the arguments of each block |
| `trace.py`, `in_place.py` | make a graph of one block's forward, with its children as leaves |
| `watch.py`, `called.py`, `python_code.py` | see what a forward does that a graph doesn't show |
| `guards.py` | compares Python values before each call with what they were |
| `carve.py`, `sites.py`, `graphs.py` | cut the branches out of the graph |
| `source.py`, `spec.py` | write Python source, make a subclass of the block's class from it, and pickle that |
| `followed.py` | checks whether the functions that were traced are still the same |
| `converted.py` | is the code that runs in a converted block |
| `step.py`, `differences.py` | run one step of a block and compare its results |
| `check.py` | compares the converted block with the original, children in eval mode |
| `check_training.py` | compares them as users run them: in training mode, under autocast |
| `snapshot.py` | restores the model and the generators |
| `side_products.py` | finds the attributes that a branch sets on its modules |
| `report.py` | reports what was done |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from .._utils.checks import check_bool, check_probability
from .._utils.example_inputs import example_inputs_of
from .._utils.modes import in_eval
from ..paths.binding import PathBinding
from ..paths.freezing import tensors_of
from ..paths.path import CONVERTED, paths_of
from .calls import BlockCall, Refused, record_calls
from .carve import Carved, carve
from .check import check as self_check
from .check import device_type_of
from .check_training import check_training
from .converted import ConvertedPath, class_among
from .differences import likeness
from .followed import Followed
from .graphs import is_add
from .libraries import MODULE_CONTAINERS, REFUSED, drop_paths_of, rate_of
from .observed import Law, kind_of, law_of
from .report import BlockReport, ConversionError, ConversionReport, PathReport, describe
from .side_products import side_products_of
from .snapshot import preserved
from .source import install, recipe_of, uninstall
from .spec import Recipe
from .trace import Trace, trace


def convert(
    model: nn.Module,
    drop_prob: float | None = None,
    strict: bool = False,
    *,
    example_inputs: Any = None,
    check: bool = True,
) -> ConversionReport:
    """Turns the residual blocks of a model into paths, in place.

    A path is a residual branch with its add. In training mode a converted block calls its paths where it called its
    drop-path or added its branch, so that a dropped branch isn't computed; in eval mode its own forward runs. Each
    block becomes an instance of a generated subclass of its class. No submodule is added, the keys of `state_dict`
    stay, and `deepcopy` and `pickle` work as before. `revert` undoes the conversion. Blocks that were converted before
    stay as they are, and the report says so. If an error is raised, the model is as before.

    Args:
        model: a model whose blocks have timm's `DropPath`, torchvision's `StochasticDepth`, one of the `*DropPath` of
            transformers or another module that drops rows. With `drop_prob` its blocks need none.
        drop_prob: P(drop) of all paths, in [0, 1], also of those that were converted before. Residual blocks without a
            drop-path become paths too. With None, the default, each path keeps its own rate, and only blocks with a
            drop-path are converted.
        strict: whether to raise an error if a path is refused. Default: False.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments that the model can be called
            with, samples in dimension 0. With None, the default, they follow the model's configuration, or are images
            of 224 × 224 pixels.
        check: whether to compare each kind of block with the original, on copies. The first comparison is of outputs
            and gradients with fixed masks, in float64 where the block can be cast. The second is in training mode, in
            the block's own dtypes and under autocast to bfloat16, and covers everything that the block returns and
            changes. A block that differs is refused. Checks take seconds, and longer for models with many
            kinds of blocks. A model on the meta device can only be converted with False. Default: True.

    Returns:
        A report to print. Its rows name every path. `report.refused` has the paths that stay as they were, each with
        the reason in its `refused`. With `drop_prob` the report also names every block without a path and the reason.

    Raises:
        ConversionError: if `strict` is True and a path is refused.
        ValueError: if an argument has a wrong value, or if the model can't run on `example_inputs`.
        TypeError: if an argument has a wrong type.
        RuntimeError: if there are new paths while a scheme of the model is in the middle of a pair of iterations.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        >>> model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        >>> report = rdp.convert(model, drop_prob=0.2, example_inputs=torch.randn(4, 5, 8))
        >>> report.summary()
        '4 paths in 2 blocks converted'
        >>> scheme = rdp.ResidualDropPath(model, seed=0)
        >>> len(scheme.paths)
        4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_bool("strict", strict)
    check_bool("check", check)
    if drop_prob is not None:
        check_probability("drop_prob", drop_prob)
    names = {id(module): name for name, module in model.named_modules()}
    report, inside = _found_already(model, names)
    blocks = [module for module in model.modules() if _may_convert(module)]
    with_drop_path = [block for block in blocks if drop_paths_of(block)]
    without = [] if drop_prob is None else [block for block in blocks if block not in with_drop_path]
    refused_before = {block: block.__dict__.get(REFUSED) for block in with_drop_path}
    done: list[nn.Module] = []
    if with_drop_path or without:
        example = example_inputs_of(model) if example_inputs is None else example_inputs
        with preserved(model) as snapshot:
            calls = record_calls(model, [*with_drop_path, *without], example)
            snapshot.restore()
            converter = _Converter(drop_prob, check, inside, *calls)
            # A block with a drop-path takes precedence over the blocks inside it. Among blocks without one, whose
            # residual adds are looked for, the inner ones come first.
            for block in [*with_drop_path, *reversed(without)]:
                report.rows += converter.convert(block, names[id(block)])
        done = converter.done
        report.without_paths = converter.without_paths
    elif not report.rows:
        report.notes.append("no block has a drop-path; convert(model, drop_prob=…) finds residual blocks without")
    order = {name: place for place, name in enumerate(names.values())}
    report.rows.sort(key=lambda row: order[row.block])
    report.without_paths.sort(key=lambda block: order[block.block])
    error = _why_undo(model, done, report, strict)
    if error is not None:
        for block in done:
            uninstall(block)
        for block, refused in refused_before.items():
            _Converter.note_refused(block, refused or [])
        raise error
    report.note_blocks()
    report.notes += _held_twice(model, {row.block for row in report.rows})
    if report.already:
        report.notes.append(_renew(model, done, drop_prob, report))
    return report


def _why_undo(model: nn.Module, done: list[nn.Module], report: ConversionReport, strict: bool) -> Exception | None:
    """The error for which the conversion of the blocks in `done` must be undone; None if it may stay."""
    if done and (busy := _busy_with(model)):
        return RuntimeError(
            f"new paths can't be made now: a scheme of the model {busy}, whose plan covers only the paths that it had. "
            "Convert before the next pair of iterations, or call the scheme's reset(); under alternate(), call its "
            "handle's remove() first"
        )
    if strict and report.refused:
        return ConversionError("\n".join(f"{r.block}.{r.name} ({r.block_class}): {r.refused}" for r in report.refused))
    return None


def _busy_with(model: nn.Module) -> str | None:
    """The iteration that a scheme of the model has open or pending, in words; None if there is none."""
    for scheme in {path_module.binding.scheme for m in model.modules() for _, path_module in paths_of(m)}:
        if scheme is not None and scheme.phase is not None:
            return f"has a {scheme.phase} iteration open"
        if scheme is not None and scheme.reuse_pending:
            return "has a reuse iteration pending"
    return None


def _held_twice(model: nn.Module, blocks: set[str]) -> list[str]:
    """A note for each block with paths that has several names."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return [
        f"{names[0]} is {', '.join(names[1:])} too: one block, whose paths are dropped in all its calls or in none"
        for names in found.values()
        if len(names) > 1 and names[0] in blocks
    ]


def _found_already(model: nn.Module, names: dict[int, str]) -> tuple[ConversionReport, dict[int, str]]:
    """A report with the paths of blocks that are converted already; and the modules that lie in the branch of any path:
    the path's name by the module's id."""
    report, inside = ConversionReport(), dict[int, str]()
    for module in model.modules():
        name = names[id(module)]
        for label, path_module in paths_of(module):
            if isinstance(path_module, ConvertedPath):
                label = path_module.spec.name
                report.rows.append(_row_of(name, module, path_module, already=True))
            path = ".".join(part for part in (name, label) if part)
            inside |= {id(m): path for inner in path_module.branch_modules() for m in inner.modules()}
        for label in module.__dict__.get(REFUSED, ()) if CONVERTED in module.__dict__ else ():
            reason = "it was refused when its block was converted; call rdp.revert(model) and convert again to see why"
            rate = rate_of(module.get_submodule(label.partition(":")[0]))
            report.rows.append(PathReport(name, type(module).__name__, label, rate, refused=reason))
    return report, inside


def _renew(model: nn.Module, done: list[nn.Module], drop_prob: float | None, report: ConversionReport) -> str:
    """Gives `drop_prob` to the paths that were there before. Returns the report's note about them."""
    blocks = len({row.block for row in report.already})
    note = f"{len(report.already)} paths in {blocks} blocks were converted already"
    if drop_prob is None:
        return f"{note} and stay as they are"
    schemes = set()
    for block in model.modules():
        for _, path in block.__dict__.get(CONVERTED, ()) if block not in done else ():
            path.drop_prob = drop_prob
            schemes.add(path.binding.scheme)
    report.rows = [replace(row, drop_prob=drop_prob) if row.already else row for row in report.rows]
    ends = "; the scheme that has them reads it at its next draw, unless it was given a drop_prob of its own"
    return f"{note}; their drop_prob is {drop_prob:g} now{ends if schemes != {None} else ''}"


def _row_of(name: str, block: nn.Module, path: ConvertedPath, already: bool = False) -> PathReport:
    spec = path.spec
    return PathReport(
        name, type(block).__name__, spec.name, path.drop_prob, whole_in_sample_mode=spec.batch_norm,
        foreign_rows=spec.foreign_rows, modules=spec.modules, already=already, side_products=path.side_products,
    )  # fmt: skip


def revert(model: nn.Module) -> None:
    """Gives the converted blocks of a model their own classes back.

    If an error is raised, the model is as before.

    Args:
        model: a model that was converted by `convert`. Other models stay as they are.

    Raises:
        TypeError: if `model` isn't a `torch.nn.Module`.
        RuntimeError: if a scheme has paths of the model, or if another library has derived a class from the class of a
            converted block.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        >>> report = rdp.convert(layer, drop_prob=0.2, example_inputs=torch.randn(4, 5, 8))
        >>> type(layer) is nn.TransformerEncoderLayer
        False
        >>> rdp.revert(layer)
        >>> type(layer) is nn.TransformerEncoderLayer
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    blocks = [m for m in model.modules() if CONVERTED in m.__dict__]
    for block in blocks:
        if any(path.binding.scheme is not None for _, path in block.__dict__[CONVERTED]):
            raise RuntimeError("a scheme has paths of this model: call its remove() first")
        kind = class_among(block)
        if kind is not None and kind is not type(block):
            raise RuntimeError(
                f"{type(block).__name__} was made of the converted {kind.__name__}, by a parametrization of the block "
                "itself or by fully_shard, and can't be reverted: undo that first"
            )
    for block in blocks:
        uninstall(block)
    for module in model.modules():
        module.__dict__.pop(REFUSED, None)


_LAYERS_OF_TORCH = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Residual blocks of torch.nn."""


def _may_convert(module: nn.Module) -> bool:
    """Whether the module's own forward may hold residual paths that aren't paths of this package yet."""
    if CONVERTED in module.__dict__ or isinstance(getattr(module, "binding", None), PathBinding):
        return False
    if type(module) in MODULE_CONTAINERS:
        return False
    if type(module).__module__.startswith("torch.nn.") and type(module) not in _LAYERS_OF_TORCH:
        return False
    return any(True for child in module.children() for _ in child.parameters())


@dataclass
class _Converter:
    _drop_prob: float | None
    _checks: bool
    _in_branches: dict[int, str]
    _calls: dict[int, list[BlockCall]]
    _batch_sizes: tuple[int, ...]
    done: list[nn.Module] = field(default_factory=list)
    without_paths: list[BlockReport] = field(default_factory=list)
    _carved: dict[Any, list[tuple[dict[str, int], tuple[Recipe, Carved] | Refused]]] = field(default_factory=dict)
    """The results for blocks that are alike, each with the kinds of the drop-paths that it holds for."""
    _side_products: dict[int, tuple[str, ...]] = field(default_factory=dict)
    """The side products of the branches, by the recipe's id."""

    def convert(self, block: nn.Module, name: str) -> list[PathReport]:
        """Converts a block. Returns a row for each path, or none and notes the block in `without_paths`."""
        kind, named = type(block).__name__, drop_paths_of(block)

        def row(path: str, **more: Any) -> PathReport:
            drop_path = named.get(path.partition(":")[0])
            rate = self._drop_prob if drop_path is None or self._drop_prob is not None else rate_of(drop_path)
            return PathReport(name, kind, path, rate or 0.0, **more)

        def nothing(reason: str, inside: str | None = None) -> list[PathReport]:
            self.without_paths.append(BlockReport(name, kind, reason, inside))
            return []

        if id(block) in self._in_branches:
            outer = self._in_branches[id(block)]
            return [row(path, nested=outer) for path in named] or nothing("it lies in the branch of a path", outer)
        try:
            if id(block) not in self._calls:
                raise Refused("the model doesn't call its block in an evaluation of the example")
            replaced = "forward" if "forward" in vars(block) else Followed.of(type(block)).replaced_on(block)
            if replaced is not None:
                raise Refused(
                    f"its {replaced} was replaced on the instance, as accelerate's hooks do, and only the class's can "
                    "be followed: convert before it is replaced"
                )
            with in_eval(block):  # children are run
                recipe, carved = self._recipe(block, self._calls[id(block)])
        except Exception as error:
            reason = str(error) if isinstance(error, Refused) else f"it raises {describe(error)}"
            self.note_refused(block, list(named))
            return [row(path, refused=reason) for path in named] or nothing(reason)
        self.note_refused(block, [path for path, _ in carved.refused if path.partition(":")[0] in named])
        rows = [row(path, refused=reason) for path, reason in carved.refused]
        rows += [row(path, nested=outer) for path, outer in carved.nested]
        if recipe.paths:
            install(block, recipe, self._drop_prob)
            self.done.append(block)
            for _, path in block.__dict__[CONVERTED]:
                within = tuple(f"{module}." for module in path.spec.modules)
                path.side_products = tuple(n for n in self._side_products[id(recipe)] if n.startswith(within))
                rows.append(_row_of(name, block, path))
                inside = {id(m) for inner in path.branch_modules() for m in inner.modules()}
                self._in_branches |= dict.fromkeys(inside, f"{name}.{path.spec.name}")
        return rows or nothing(_why_none(named, carved))

    @staticmethod
    def note_refused(block: nn.Module, names: list[str]) -> None:
        block.__dict__.pop(REFUSED, None)
        if names:
            block.__dict__[REFUSED] = names

    def _recipe(self, block: nn.Module, calls: Sequence[BlockCall]) -> tuple[Recipe, Carved]:
        traced = trace(block, calls[0])
        if traced.inputs is not None:
            other = trace(block, calls[1])
            if _code(other) != _code(traced) or (other.sizes, other.sets) != (traced.sizes, traced.sets):
                raise Refused("what its forward does depends on the number of samples")
        for dtype in (torch.bfloat16, torch.float16) if traced.dtypes else ():
            with torch.autocast(device_type_of(block, calls[0]), dtype):
                other = trace(block, calls[0])
            if _code(other) != _code(traced):
                raise Refused(traced.dtypes[0])
        # Blocks that differ only in their weights and rates are carved and checked once.
        shapes = [getattr(value, "shape", value) for call in calls for value in call.flat()[0]]
        drop_paths = drop_paths_of(block)
        kinds = {name: kind_of(module) for name, module in drop_paths.items()}
        key = (repr((traced.signature, traced.guards, traced.sets, shapes, _code(traced))), likeness(block, drop_paths))
        carved = next(
            (found for known, found in self._carved.get(key, ()) if _serves(found, known, kinds, block)), None
        )
        if carved is None:
            try:
                carved = self._carve(block, traced, calls)
            except Refused as refused:
                carved = refused
            self._carved.setdefault(key, []).append((kinds, carved))
        if isinstance(carved, Refused):
            raise carved
        return carved

    def _carve(self, block: nn.Module, traced: Trace, calls: Sequence[BlockCall]) -> tuple[Recipe, Carved]:
        inputs = [traced.signature.inputs_of(call.args, call.kwargs) for call in calls]
        if None in inputs:
            raise Refused("it is called in different ways for different numbers of samples")
        unnamed = self._drop_prob is not None
        carved = carve(block, traced, inputs, self._batch_sizes, unnamed)  # type: ignore[arg-type]
        recipe = recipe_of(traced, carved)
        if self._checks and recipe.paths:
            given = tensors_of([call.flat()[0] for call in calls])
            if any(t.is_meta for t in (*block.parameters(), *block.buffers(), *given)):
                raise Refused(
                    "it is on the meta device, and the check needs numbers: materialise the model first (to_empty, and "
                    "load its weights), or call rdp.convert(model, check=False)"
                )
            self_check(block, carved, recipe, calls)
            check_training(block, carved, recipe, calls[0])
        if recipe.paths:
            self._side_products[id(recipe)] = side_products_of(block, calls[0])
        return recipe, carved


def _serves(
    found: tuple[Recipe, Carved] | Refused, known: dict[str, int], kinds: dict[str, int], block: nn.Module
) -> bool:
    """Whether a result for a block with drop-paths of the `known` kinds holds for a block with these `kinds`. The kinds
    may differ because an Identity replaces a drop-path whose rate is 0."""
    if known == kinds:
        return True
    if isinstance(found, Refused) or found[1].refused or known.keys() != kinds.keys():
        return False
    named = [(path.drop_path, path.dims) for path in found[0].paths if path.drop_path is not None]
    return all(isinstance(law_of(block.get_submodule(name), dims), Law) for name, dims in named)


def _why_none(named: dict[str, nn.Module], carved: Carved) -> str:
    if named:
        return "its own forward calls none of its drop-paths"
    if carved.called:
        return "its residual adds stand around blocks that have paths of their own"
    if any(map(is_add, carved.reference.nodes)):
        return "no add in its own forward has a summand that is computed with weights from the other"
    return "no add in its own forward"


def _code(traced: Trace) -> str:
    return traced.graph.python_code("self").src


__all__ = ["BlockReport", "ConversionError", "ConversionReport", "PathReport", "convert", "revert"]
