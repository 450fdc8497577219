"""A converted block at run time: its paths, and the functions that its generated class calls."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..paths.binding import PathBinding
from ..paths.call import run_path
from ..paths.path import CONVERTED
from ..paths.promotion import Promotion
from .observed import Law, has_hooks, law_of
from .spec import PathSpec


class ConvertedPath:
    """One path of a converted block, a `PathModule`. It reads its drop-path's rate at every draw. A drop-path that was
    replaced, or that works in another way now, is observed again.

    `drop_prob` can be set; None restores the drop-path's own rate. Reading it raises `RuntimeError` if the drop-path
    now does something that a path can't follow.
    """

    gamma = shortcut = activation = None
    channel_dim = -1
    side_products: tuple[str, ...] = ()
    """As in `PathReport`."""

    def __init__(self, block: nn.Module, index: int, spec: PathSpec, drop_prob: float | None):
        self.block, self.index, self.spec, self.binding = block, index, spec, PathBinding()
        self._drop_prob = drop_prob
        found = None if spec.drop_path is None else law_of(_child(block, spec.drop_path), spec.dims)
        self._law = found if isinstance(found, Law) else None
        self.promotion = Promotion(spec.sum_dtype, spec.dtype)
        self.origins: tuple[PathBinding, ...] = ()
        """The bindings of the paths that this one was copied from, where its block is a shallow copy."""

    def of(self, block: nn.Module) -> ConvertedPath:
        """A copy of this path for a shallow copy of its block."""
        path = copy.copy(self)
        path.block, path.binding, path.origins = block, PathBinding(), (*self.origins, self.binding)
        return path

    @property
    def drop_path(self) -> nn.Module | None:
        """The drop-path that the block has now; None for a path without one."""
        return None if self.spec.drop_path is None else _child(self.block, self.spec.drop_path)

    @property
    def drop_prob(self) -> float:
        if self._drop_prob is not None:
            return self._drop_prob
        law = self._law_now()
        if isinstance(law, str):
            raise RuntimeError(
                f"{self} can't follow its drop-path, which was changed: {law}; call rdp.revert(model) and "
                "rdp.convert(model) again"
            )
        return 0.0 if law is None else law.drop_prob(_child(self.block, str(self.spec.drop_path)))

    @drop_prob.setter
    def drop_prob(self, value: float | None) -> None:
        self._drop_prob = value

    @property
    def mode(self) -> str:
        """The mode: "block" if the rows aren't samples or the drop-path drops whole batches, else "sample"."""
        if self.spec.mode == "block":
            return "block"
        law = self._law_now()
        law = self._law if isinstance(law, str) else law
        return "sample" if law is None else law.mode

    @property
    def scale_by_keep(self) -> bool:
        law = self._law_now()
        law = self._law if isinstance(law, str) else law
        return law is None or law.scale_by_keep

    def why_not(self) -> str | None:
        """Why this path can't follow its drop-path as it is now; None if it can. Inside an iteration, whose decisions
        need no rate, the only reason is a drop-path of another class."""
        if self._drop_prob is not None or self.spec.drop_path is None:
            return None
        law = self._law_now()
        if not isinstance(law, str):
            return None
        scheme, before = self.binding.scheme, self._law
        decided = scheme is not None and scheme.phase is not None
        if decided and before is not None and type(_child(self.block, self.spec.drop_path)) is before.kind:
            return None
        return f"its {self.spec.drop_path!r} was changed: {law}"

    def _law_now(self) -> Law | str | None:
        """The law of the path's drop-path as it is now, or why it has none; None for a path without a drop-path."""
        name, law = self.spec.drop_path, self._law
        if name is None:
            return None
        drop_path = _child(self.block, name)
        if has_hooks(drop_path):
            return "it has hooks, which wouldn't run"
        if law is not None:
            if law.holds_for(drop_path):
                return law
            if torch.compiler.is_compiling() and type(drop_path) is law.kind:
                return law  # the guards of torch.compile check the rest
        found = law_of(drop_path, self.spec.dims)
        if isinstance(found, Law):
            self._law = found
        return found

    @property
    def training(self) -> bool:
        drop_path = self.drop_path
        return self.block.training and (drop_path is None or drop_path.training)

    @property
    def norm(self) -> nn.Module | None:
        return None if self.spec.norm is None else _child(self.block, self.spec.norm)

    def branch_modules(self) -> list[nn.Module]:
        return [_child(self.block, name) for name in self.spec.modules]

    def own_parameters(self) -> list[tuple[nn.Module, str]]:
        split = [name.rpartition(".") for name in self.spec.parameters]
        return [(self.block.get_submodule(module), name) for module, _, name in split]

    def run_branch(self, x: Tensor, args: tuple, kwargs: dict, normed: bool = False) -> Tensor:
        norm = self.norm
        function = type(self.block)._rdp_branches[self.index]  # type: ignore[attr-defined]
        return function(self.block, x if normed or norm is None else norm(x), *args)

    def map_rows(
        self, function: Callable[[Tensor], Tensor], batch_size: int | None, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        def apply(x: Tensor) -> Tensor:
            if x.dim() == 0 or batch_size not in (None, x.shape[0]):
                raise ValueError(
                    f"path {self.spec.name!r} of {type(self.block).__name__}: an argument of shape {list(x.shape)} has "
                    f"no row for each of the {batch_size} rows, as it had when the model was converted"
                )
            return function(x)

        kinds = zip(args, self.spec.kinds, strict=True)
        return tuple(pytree.tree_map_only(Tensor, apply, v) if kind == "row" else v for v, kind in kinds), kwargs

    def __repr__(self) -> str:
        return f"path {self.spec.name!r} of {type(self.block).__name__}"


def _child(block: nn.Module, name: str) -> nn.Module:
    child = block._modules.get(name)
    return block.get_submodule(name) if child is None else child


RUN_PATH = "_rdp_run_path"
"""The name of `run` in converted classes."""


def run(block: nn.Module, index: int, x: Tensor, *args: Any, residual: Tensor | None = None) -> Tensor:
    """Runs path `index` of a converted block. Generated forwards call it, as a method of the block."""
    path: ConvertedPath = block.__dict__[CONVERTED][index][1]
    if path.block is not block or path.origins:
        path = _of_copy(block, index)
    if path.spec.zeros is not None:
        sizes = [x.shape[d] if size is None else size for d, size in enumerate(path.spec.zeros, start=1)]
        residual = x.new_zeros((x.shape[0], *sizes))
    out = run_path(path, x, args, {}, residual)  # type: ignore[arg-type]
    # The block's own add makes a new tensor, which the code after it may change in place.
    return out.clone() if out is (x if residual is None else residual) and path.spec.zeros is None else out


def own_paths(block: nn.Module) -> None:
    """Gives a shallow copy or a replica of a converted block its own paths, which belong to no scheme."""
    paths = block.__dict__.get(CONVERTED)
    if paths and paths[0][1].block is not block:
        block.__dict__[CONVERTED] = [(name, path.of(block)) for name, path in paths]


def _of_copy(block: nn.Module, index: int) -> ConvertedPath:
    """Path `index` of a shallow copy. Raises `RuntimeError` while the scheme of the copied block has an iteration
    open, unless the copy has a scheme of its own."""
    own_paths(block)
    name, path = block.__dict__[CONVERTED][index]
    schemes = [binding.scheme for binding in path.origins] if path.binding.scheme is None else []
    if any(scheme is not None and scheme.phase is not None for scheme in schemes):
        raise RuntimeError(
            f"path {name!r} of {type(block).__name__} can't follow the plan: its block is a shallow copy of the "
            "scheme's, made by copy.copy or as a replica of DataParallel. Call the scheme's own model; use "
            "copy.deepcopy for copies, and DistributedDataParallel for several devices"
        )
    return path


def class_among(block: nn.Module) -> type | None:
    """The converted class among a block's classes; None if the block has been given another class since. It isn't the
    first of them if a parametrization of the block's own tensors, or `fully_shard`, has derived a class from it."""
    return next((kind for kind in type(block).__mro__ if "_rdp_recipe" in kind.__dict__), None)


def original_of(block: nn.Module) -> Any:
    """The class that a converted block had before."""
    kind = class_among(block)
    return type(block) if kind is None else kind.__bases__[0]


def is_observed(block: nn.Module) -> bool:
    """Whether a path of the block has a `call_override`. Its paths are then called in eval mode too."""
    return any(path.binding.call_override is not None for _, path in block.__dict__[CONVERTED])


def fall_back(block: nn.Module, reason: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs the forward that the block had before its conversion, as the trace doesn't hold for this call. Raises
    `RuntimeError` inside an iteration, where that forward would draw its own masks."""
    original = original_of(block)
    for name, path in block.__dict__[CONVERTED]:
        scheme = path.binding.scheme
        if scheme is not None and scheme.phase is not None:
            raise RuntimeError(
                f"path {name!r} of {original.__name__} can't follow the plan: {reason}; call rdp.revert(model) and "
                "rdp.convert(model, example_inputs=...) with what it is called with now"
            )
    warned: set[str] = block.__dict__.setdefault("_rdp_warned", set())
    if reason not in warned:
        warned.add(reason)
        warnings.warn(f"{original.__name__} runs as before its conversion and skips nothing: {reason}", stacklevel=4)
    return original.forward(block, *args, **kwargs)
