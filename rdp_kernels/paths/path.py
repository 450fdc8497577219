"""Paths: where a model has them, and which modules and parameters are theirs."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..plan import drop_path_rates
from .binding import PathBinding, PathModule
from .freezing import ParameterRef
from .parts import BranchParts

CONVERTED = "_rdp_paths"
"""The attribute under which a converted block keeps its paths: pairs of name and path."""

ROWS_OF_BATCH_NORM = (
    "BatchNorm in a branch can't be frozen for some samples only: its statistics are those of the whole batch. "
    'Use mode="block", or freeze="none", or give this branch mode="block", or another norm'
)


class Path:
    """One residual path of a scheme's model, an entry of `scheme.paths`.

    `index`, `name` and `module` are also attributes.

    Args:
        index: the path's number, in the order in which the model registers its paths. Row `index` of `PathPlan.keep`
            decides about it.
        name: its name in the model, as in `model.named_modules()`.
        module: what stands for the path: a `ResidualBranch`, or a path of a converted block.
        drop_prob: P(drop) from the scheme, or None for the module's own.

    Example:
        >>> model = rdp.ResidualSequence(*(rdp.ResidualBranch(nn.Linear(2, 2)) for _ in range(3)))
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, schedule="linear")
        >>> scheme.paths
        [Path(0, '0', drop_prob=0), Path(1, '1', drop_prob=0.25), Path(2, '2', drop_prob=0.5)]
        >>> [tuple(p.shape) for p in scheme.paths[1].parameters()]
        [(2, 2), (2,)]
    """

    def __init__(self, index: int, name: str, module: PathModule, drop_prob: float | None):
        self.index, self.name, self.module = index, name, module
        self._drop_prob = drop_prob

    @property
    def drop_prob(self) -> float:
        """P(drop) under the scheme. The module's own is read anew at each draw."""
        return self.module.drop_prob if self._drop_prob is None else self._drop_prob

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of the path.

        Returns:
            The parameters of the branch, of its norm, and its gamma, each once.
        """
        return list({id(p): p for p in parameters_of(self.module)}.values())

    def __repr__(self) -> str:
        return f"Path({self.index}, {self.name!r}, drop_prob={self.drop_prob:g})"


def find_paths(
    model: nn.Module, drop_prob: float | None = None, schedule: str = "constant", known: Container[int] = ()
) -> list[Path]:
    """The paths of `model` in registration order. With `drop_prob` None each keeps its own. Path modules whose ids are
    in `known` may have a scheme already, which is the caller's.

    Raises `TypeError` or `ValueError` for a model without paths or with one inside another, and `RuntimeError` for a
    path that has a scheme.
    """
    path_modules = find_path_modules(model)
    for name, path_module in path_modules.items():
        if path_module.binding.scheme is not None and id(path_module) not in known:
            raise RuntimeError(f"path {name!r} has a scheme already: call its remove() first, or delete the scheme")
    count = len(path_modules)
    rates = [None] * count if drop_prob is None else drop_path_rates(drop_prob, count, schedule)
    found = zip(path_modules.items(), rates, strict=True)
    return [Path(index, name, module, rate) for index, ((name, module), rate) in enumerate(found)]


def find_path_modules(model: nn.Module, nested: bool = False) -> dict[str, PathModule]:
    """The path modules of `model` by name, in registration order. Raises as `find_paths`, except for schemes and, with
    `nested`, for paths inside of paths."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    path_modules: dict[str, PathModule] = {}
    inside: dict[int, str] = {}
    for prefix, module in model.named_modules():
        named = {".".join(filter(None, (prefix, name))): path_module for name, path_module in paths_of(module)}
        for path in named:
            if id(module) in inside and not nested:
                raise ValueError(
                    f"path {path!r} lies inside path {inside[id(module)]!r}: a plan can't decide about nested paths"
                )
        path_modules |= named
        for path, path_module in named.items():
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
    """The paths that `module` itself owns, each with its name within the module."""
    if isinstance(module.__dict__.get("binding"), PathBinding):
        return [("", module)]  # type: ignore[list-item]
    return list(module.__dict__.get(CONVERTED, ()))


def path_modules_among(modules: Iterable[nn.Module]) -> list[PathModule]:
    """The paths that these modules themselves own."""
    return [
        path_module
        for module in modules
        if "binding" in module.__dict__ or CONVERTED in module.__dict__  # saves a call for most modules
        for _, path_module in paths_of(module)
    ]


def parameters_of(path_module: PathModule) -> Iterator[nn.Parameter]:
    """All parameters of a path. A parameter that several modules share comes more than once."""
    for module in path_module.branch_modules():
        yield from module.parameters()
    yield from own_parameters_of(path_module)


def own_parameters_of(path_module: PathModule) -> list[nn.Parameter]:
    return [getattr(module, name) for module, name in path_module.own_parameters()]


def parts_of(path_module: PathModule) -> BranchParts:
    """The modules of a path's branch as they are now."""
    binding, tops = path_module.binding, path_module.branch_modules()
    parts = binding.parts
    if parts is None or not parts.hold_for(tops):
        parts = binding.parts = BranchParts(tops)
    return parts


def parameter_refs_of(path_module: PathModule) -> list[ParameterRef]:
    """All parameters of a path."""
    return parts_of(path_module).parameter_refs() + path_module.own_parameters()


def modules_of(path_module: PathModule) -> list[nn.Module]:
    """All modules of a path's branch."""
    return parts_of(path_module).modules


def batch_norms_of(path_module: PathModule) -> list[_BatchNorm]:
    """The BatchNorms of a path's branch."""
    return parts_of(path_module).batch_norms
