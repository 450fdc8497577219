"""Paths: what stands for one, where it finds its scheme, which parameters are its own, and the `Decision` about a call.

How a path is run under a decision stands in `path_call.py`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..kernels.spec import RowSet
from ..plan import drop_path_rates
from .freezing import FreezeBN, ParameterRef

if TYPE_CHECKING:
    from ..scheme.scheme import ResidualDropPath
    from .call import PathCall
    from .promotion import Promotion


@dataclass(frozen=True)
class Decision:
    """How one call of a path is run: its branch on all rows, where it learns or is frozen, or not at all; with `rows`,
    on these, some of which may be frozen."""

    learning: bool = True
    frozen: bool = False
    rows: RowSet | None = None
    scale: float = 1.0
    freeze: str = "parameters"
    freeze_bn: FreezeBN = True
    modules: Sequence[nn.Module] | None = None
    """Those of the branch, where somebody has looked them up."""
    also_learns: tuple[ParameterRef, ...] = ()
    """Parameters of this path that the frozen rest shares: they learn inside the branch's call."""
    row_scale: Tensor | None = None
    """A factor a row, or one for all, where the host doesn't know which are 0: all rows are computed."""
    dummy_calls: tuple[str, ...] = ()
    """"learning", "frozen": which calls of the branch other ranks make and this one has no rows for."""

    @property
    def runs(self) -> bool:
        return self.learning or self.frozen or self.rows is not None


WHOLE = Decision()

CONVERTED = "_rdp_paths"
"""The attribute under which a converted block keeps its paths: pairs of name and path."""

ROWS_OF_BATCH_NORM = (
    "BatchNorm in a branch can't be frozen for some samples only: its statistics are those of the whole batch. "
    'Use mode="block", or freeze="none", or give this branch mode="block", or another norm'
)


class PathBinding:
    """What ties a path to the scheme that decides for it. A copy or pickle of the path's module has an empty one."""

    def __init__(self) -> None:
        self._scheme: weakref.ref[ResidualDropPath] | None = None
        self._index = -1
        self.branch_runner: BranchRunner | None = None
        """What runs the branch in the place of the path_module's `run_branch`: compiled, or captured."""
        self.graph_mask: GraphMask | None = None
        """Where the whole model is compiled: what the plan says, as data."""
        self.call_override: CallOverride | None = None
        """Who looks on at every call, and decides what comes out (`estimate`)."""

    @property
    def scheme(self) -> ResidualDropPath | None:
        return None if self._scheme is None else self._scheme()

    def bind(self, scheme: ResidualDropPath, index: int) -> None:
        self._scheme, self._index = weakref.ref(scheme), index

    def clear(self) -> None:
        self._scheme = self.graph_mask = None

    def decide(self, x: Tensor) -> Decision | None:
        """The scheme's decision for a call on `x`; None without a scheme, or where no iteration is open."""
        scheme = self.scheme
        return None if scheme is None else scheme._decide(self._index, x)

    def __reduce__(self) -> tuple:
        return PathBinding, ()


class PathModule(Protocol):
    """What `run_path` asks of what stands for a path: the module itself, or one of the paths of a converted block."""

    binding: PathBinding
    training: bool
    drop_prob: float
    mode: str
    scale_by_keep: bool
    gamma: nn.Parameter | None
    shortcut: nn.Module | None
    activation: str | None
    channel_dim: int

    @property
    def promotion(self) -> Promotion | None:
        """For a sum as wide as that of torch's own add; None: it has the residual's dtype."""

    @property
    def norm(self) -> nn.Module | None:
        """Before the branch, given apart so that it can fuse with the gather of rows."""

    def branch_modules(self) -> list[nn.Module]:
        """The modules whose parameters are the path's."""

    def own_parameters(self) -> list[ParameterRef]:
        """Parameters of the path outside of these modules, gamma among them."""

    def run_branch(self, x: Tensor, args: tuple, kwargs: dict, normed: bool = False) -> Tensor:
        """The branch's output, before γ; `normed`: x is `norm(x)` already."""

    def map_rows(
        self, function: Callable[[Tensor], Tensor], batch_size: int | None, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """The further arguments with `function` of those that carry a row per sample, `batch_size` of them if given."""


GraphMask = tuple[Tensor, Tensor | None]
"""What a branch's rows are multiplied by where they learn, and where they are constants, float64 `[]` or `[B]`."""

BranchRunner = Callable[[PathModule, Tensor, tuple, dict, bool], Tensor]
"""`run_branch` of any path_module: path_module, x, args, kwargs, normed."""


CallOverride = Callable[["PathCall", Tensor], Tensor]
"""The call, its input; returns the path's output."""


class Path:
    """One residual path of a scheme's model: row `index` of `plan.keep` is about it."""

    def __init__(self, index: int, name: str, module: PathModule, drop_prob: float | None):
        self.index, self.name, self.module = index, name, module
        self._drop_prob = drop_prob

    @property
    def drop_prob(self) -> float:
        """P(drop) under the scheme: from the scheme's number and schedule, else the module's own, read at each draw."""
        return self.module.drop_prob if self._drop_prob is None else self._drop_prob

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the branch (its norm included) and its gamma, each once."""
        return list({id(p): p for p in parameters_of(self.module)}.values())

    def __repr__(self) -> str:
        return f"Path({self.index}, {self.name!r}, drop_prob={self.drop_prob:g})"


def find_paths(
    model: nn.Module, drop_prob: float | None = None, schedule: str = "constant", known: Container[int] = ()
) -> list[Path]:
    """The paths of `model` in registration order; `drop_prob` None keeps each its own. `known`: ids of the modules
    whose scheme is the one that asks.

    Raises `TypeError` or `ValueError` for a model without paths or with one inside another, and `RuntimeError` for a
    path that has a scheme.
    """
    path_modules = find_path_modules(model)
    for name, path_module in path_modules.items():
        if path_module.binding.scheme is not None and id(path_module) not in known:
            raise RuntimeError(f"path {name!r} has a scheme already: call its remove() first, or let go of it")
    rates: list[float | None] = [None] * len(path_modules)
    if drop_prob is not None:
        rates = [*drop_path_rates(drop_prob, len(path_modules), schedule)]
    return [
        Path(index, name, path_modules[name], rate)
        for index, (name, rate) in enumerate(zip(path_modules, rates, strict=True))
    ]


def find_path_modules(model: nn.Module) -> dict[str, PathModule]:
    """What stands for the paths of `model`, by name, in registration order. Raises as `find_paths`, but for schemes."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    path_modules: dict[str, PathModule] = {}
    inside: dict[int, str] = {}
    for name, module in model.named_modules():
        for label, path_module in paths_of(module):
            path = ".".join(part for part in (name, label) if part)
            if id(module) in inside:
                raise ValueError(
                    f"path {path!r} lies inside path {inside[id(module)]!r}: nested paths can't be planned apart"
                )
            path_modules[path] = path_module
        for label, path_module in paths_of(module):
            path = ".".join(part for part in (name, label) if part)
            around = [*path_module.branch_modules(), path_module.shortcut]
            inside |= {id(m): path for inner in around if inner is not None for m in inner.modules()}
    if not path_modules:
        raise ValueError("model has no paths: call rdp.convert(model) first, or build it from ResidualBranch")
    return path_modules


def refuse_batch_norm(paths: Iterable[Path]) -> None:
    """Raises `ValueError` where freezing single samples of a path is not exact."""
    for path in paths:
        if path.module.mode == "sample" and batch_norms_of(path.module):
            raise ValueError(f"path {path.name!r}: {ROWS_OF_BATCH_NORM}")


def paths_of(module: nn.Module) -> list[tuple[str, PathModule]]:
    """What stands for the paths that `module` itself owns, each with its name within the module."""
    if isinstance(module.__dict__.get("binding"), PathBinding):
        return [("", module)]  # type: ignore[list-item]
    return list(module.__dict__.get(CONVERTED, ()))


def walk(model: nn.Module, without: Iterable[int] = ()) -> list[nn.Module]:
    """As `model.modules()`, with a fraction of its function calls; `without`: ids of modules to pass over with all in
    them."""
    found: dict[int, nn.Module | None] = dict.fromkeys(without)
    stack: list[nn.Module | None] = [model]
    while stack:
        module = stack.pop()
        if module is None or (key := id(module)) in found:
            continue
        found[key] = module
        if module._modules:
            stack += reversed(module._modules.values())
    return [module for module in found.values() if module is not None]


def path_modules_among(modules: Iterable[nn.Module]) -> list[PathModule]:
    """What stands for the paths that these modules themselves own. As `paths_of`, called for those that have some."""
    return [
        path_module
        for module in modules
        if "binding" in module.__dict__ or CONVERTED in module.__dict__
        for _, path_module in paths_of(module)
    ]


def parameters_of(path_module: PathModule) -> Iterator[nn.Parameter]:
    """All that are a path's; those that modules share more than once."""
    for module in path_module.branch_modules():
        yield from module.parameters()
    yield from own_parameters_of(path_module)


def own_parameters_of(path_module: PathModule) -> list[nn.Parameter]:
    return [getattr(module, name) for module, name in path_module.own_parameters()]


def places_of(path_module: PathModule, modules: Sequence[nn.Module] | None = None) -> list[ParameterRef]:
    """Where a path's parameters are; `modules`: those of its branch, where somebody has looked them up."""
    modules = modules_of(path_module) if modules is None else modules
    return [(module, name) for module in modules for name in module._parameters] + path_module.own_parameters()


def modules_of(path_module: PathModule) -> list[nn.Module]:
    """All modules of a path's branch."""
    return [m for module in path_module.branch_modules() for m in walk(module)]


def batch_norms_of(path_module: PathModule, modules: Sequence[nn.Module] | None = None) -> list[_BatchNorm]:
    """As `places_of`."""
    modules = modules_of(path_module) if modules is None else modules
    return [m for m in modules if isinstance(m, _BatchNorm)]
