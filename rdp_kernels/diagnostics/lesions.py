"""Removes paths of a trained network, or swaps their branches, and evaluates it.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", arXiv 1605.06431,
sections 4.1 and 4.2. Nothing is rescaled or retrained.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .._utils.checks import check_bool, check_count
from .._utils.table import table
from ..kernels.spec import activated
from ..paths.call import PathCall
from ..paths.path import find_path_modules
from ..plan import plan_generator
from ._display import Axes, axes_or_new, label_layers, track
from .observe import overriding, undisturbed, update_of

Which = int | str
"""A path, by its index in registration order (as in `scheme.paths`) or by its name."""


def without(model: nn.Module, paths: Which | Iterable[Which]) -> contextlib.AbstractContextManager[Any]:
    """Removes the branches of some paths within a context.

    A removed path returns `act(shortcut(x))`. This is meant for trained networks in eval mode. In training mode a
    removed path learns nothing, and ignores the plan of a scheme. Contexts can be nested.

    Args:
        model: a model with paths.
        paths: one path or several, by index (as in `scheme.paths`) or by name.

    Returns:
        A context manager.

    Raises:
        TypeError: if a path is neither an integer nor a string.
        ValueError: if a path doesn't exist.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> x = torch.randn(16, 8)
        >>> with diagnostics.without(model.eval(), [0, 1, 2, "3"]):
        ...     y = model(x)
        >>> torch.equal(x, y)
        True
    """
    names = list(find_path_modules(model))
    removed = {_index(names, path) for path in ([paths] if isinstance(paths, int | str) else paths)}
    return overriding(model, lambda _, call, x: activated(call.without_branch(x), call.module.activation), only=removed)


def swapped(model: nn.Module, pairs: Iterable[tuple[Which, Which]]) -> contextlib.AbstractContextManager[Any]:
    """Swaps the branches of pairs of paths within a context.

    A branch takes its norm and γ with it. Shortcuts and activations stay. Pairs that share a path are swapped one after
    the other. If two paths map different shapes, the forward raises `ValueError`, or what the branch raises.

    Args:
        model: a model with paths.
        pairs: pairs of different paths, each given by index (as in `scheme.paths`) or by name.

    Returns:
        A context manager.

    Raises:
        TypeError: if a path is neither an integer nor a string.
        ValueError: if a path doesn't exist, or if a pair doesn't hold two different paths.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> x = torch.randn(16, 8)
        >>> with diagnostics.swapped(model.eval(), [(0, 3)]):
        ...     y = model(x)
        >>> torch.equal(model(x), y)
        False
    """
    path_modules = find_path_modules(model)
    names = list(path_modules)
    order = list(range(len(names)))
    for pair in pairs:
        both = () if isinstance(pair, int | str) else [_index(names, path) for path in pair]
        if len(both) != 2 or both[0] == both[1]:
            raise ValueError(f"pairs must hold pairs of two different paths, got {pair!r}")
        first, second = both
        order[first], order[second] = order[second], order[first]

    def run_other(path: int, call: PathCall, x: Tensor) -> Tensor:
        other = names[order[path]]
        update = update_of(PathCall(path_modules[other], x.shape[0], call.args, call.kwargs), x)
        residual = call.residual(x)
        if update.shape != residual.shape:
            shapes = f"{list(update.shape)}, where the residual is {list(residual.shape)}"
            raise ValueError(f"path {names[path]!r} can't run the branch of {other!r}, which gives {shapes}")
        return activated(residual + update, call.module.activation)

    return overriding(model, run_other, only=[path for path, other in enumerate(order) if path != other])


@dataclass(frozen=True)
class Trials:
    """Results of one kind of lesion for several random choices of paths.

    `LesionStudy.removed` and `LesionStudy.swapped` hold them.

    Attributes:
        count: the number of paths that are removed, or of pairs that are swapped, in each trial.
        choices: for each trial the paths, or the pairs of paths, by index.
        values: for each trial the result of `evaluate`.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> trials = diagnostics.Trials(count=1, choices=[(0,), (2,)], values=[1.0, 3.0])
        >>> trials.mean, trials.std
        (2.0, 1.0)
    """

    count: int
    choices: list[tuple]
    values: list[float]

    @property
    def mean(self) -> float:
        """The mean of `values`."""
        return torch.tensor(self.values, dtype=torch.float64).mean().item()

    @property
    def std(self) -> float:
        """The standard deviation of `values`. It isn't an estimate for all possible choices."""
        return torch.tensor(self.values, dtype=torch.float64).std(correction=0).item() if self.values else math.nan


@dataclass(frozen=True)
class LesionStudy:
    """The values of a network before and after paths are removed or swapped.

    `lesion_study` returns it. All values are results of `evaluate`. `str(study)` is a table.

    Attributes:
        names: the paths' names.
        baseline: the value of the whole network.
        each: the value without each single path. Empty with `each=False`.
        removed: values without random sets of paths, by the size of the sets.
        swapped: values with random pairs of paths swapped, by the number of pairs. `choices` and `values` are empty if
            too few pairs can be swapped.
        swappable: the pairs of paths that map the same shape and can be swapped.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches)
        >>> x, targets = torch.randn(16, 8), torch.randint(8, (16,))
        >>> accuracy = lambda m: (m(x).argmax(dim=1) == targets).double().mean().item()
        >>> study = diagnostics.lesion_study(model, accuracy, counts=(2,))
        >>> len(study.each), [(trials.count, len(trials.values)) for trials in study.removed]
        (4, [(2, 6)])
    """

    names: list[str]
    baseline: float
    each: list[float]
    removed: list[Trials]
    swapped: list[Trials]
    swappable: list[tuple[int, int]] = field(repr=False)

    @property
    def effects(self) -> list[float]:
        """For each path, the value without it minus the baseline."""
        return [value - self.baseline for value in self.each]

    def __str__(self) -> str:
        lines = [f"baseline: {self.baseline:.4g}"]
        cells = zip(self.names, self.each, self.effects, strict=True) if self.each else ()
        lines += table(("path", "without it", "difference"), [(n, f"{v:.4g}", f"{e:+.4g}") for n, v, e in cells])
        several = [("removed", trials) for trials in self.removed] + [("pairs swapped", t) for t in self.swapped]
        lines += table(
            ("lesion", "mean", "standard deviation", "choices"),
            [(f"{t.count} {what}", f"{t.mean:.4g}", f"{t.std:.4g}", str(len(t.values))) for what, t in several],
        )
        if any(not trials.values for trials in self.swapped):
            lines.append(f"Pairs of paths that map the same shape and can be swapped: {len(self.swappable) or 'none'}.")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws bars from the baseline to the value without each path.

        Args:
            ax: where to draw. None makes a new pyplot figure.

        Returns:
            The axes.
        """
        ax = axes_or_new(ax)
        places, baseline = range(len(self.each)), self.baseline
        ax.bar(places, self.effects, bottom=baseline, color="#56B4E9", edgecolor="black", linewidth=0.5)
        ax.axhline(baseline, color="black", linestyle="--", label=f"all paths: {baseline:.4g}")
        label_layers(ax, self.names)
        ax.set(xlabel="path", ylabel="value without the path")
        ax.legend()
        return ax

    def plot_counts(self, ax: Axes | None = None) -> Axes:
        """Draws mean ± standard deviation over the number of paths removed, and of pairs swapped.

        Args:
            ax: where to draw. None makes a new pyplot figure.

        Returns:
            The axes.
        """
        ax = axes_or_new(ax)
        for kind, label, style in ((self.removed, "paths removed", "o-"), (self.swapped, "pairs swapped", "s--")):
            found = [trials for trials in kind if trials.values]
            if found:
                counts = [0, *(trials.count for trials in found)]
                means = [self.baseline, *(trials.mean for trials in found)]
                ax.errorbar(counts, means, [0, *(t.std for t in found)], fmt=style, capsize=3, label=label)
        ax.set(xlabel="paths removed, or pairs swapped", ylabel="value, mean ± standard deviation over choices")
        if ax.has_data():
            ax.legend()
        return ax


def lesion_study(
    model: nn.Module,
    evaluate: Callable[[Any], float],
    *,
    each: bool = True,
    counts: Sequence[int] | None = None,
    repeats: int = 12,
    swaps: Sequence[int] = (1,),
    adjacent: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> LesionStudy:
    """Evaluates a network with paths removed and swapped (Veit et al., arXiv 1605.06431, sections 4.1 and 4.2).

    Each evaluation begins in eval mode, without autograd, and from the same state of torch's random generators. All of
    these are restored afterwards, even if `evaluate` raises.

    Args:
        model: a model with paths.
        evaluate: `evaluate(model)` returns an accuracy, a loss or any other number. It runs twice on the whole network,
            the first time to see the paths' shapes.
        each: whether to remove each path alone.
        counts: how many random paths are removed together. None means 2, a quarter and a half of them.
        repeats: how many different random choices are tried for each count, or all choices if there are no more.
        swaps: how many random pairs of paths are swapped. Only paths that map the same shape are swapped.
        adjacent: whether to swap only neighbours in `scheme.paths`.
        seed: for the choices. Torch's global generators aren't used.
        progress: whether to draw a progress bar on stderr, which needs rich. None draws it if stderr is a terminal.

    Returns:
        The values of the whole network and with each lesion.

    Raises:
        TypeError: if `evaluate` doesn't return a number, or if an argument has another type than described.
        ValueError: if an argument has another value than described, or if the model has no paths or `evaluate` calls
            none.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> doubles = [rdp.ResidualBranch(nn.Identity()) for _ in range(2)]
        >>> model = nn.Sequential(*doubles)
        >>> value = lambda m: m(torch.ones(1, 1)).item()
        >>> study = diagnostics.lesion_study(model, value, counts=(), swaps=())
        >>> study.baseline, study.each, study.effects
        (4.0, [2.0, 2.0], [-2.0, -2.0])
        >>> print(study)
        baseline: 4
        ...
    """
    names = list(find_path_modules(model))
    check_bool("each", each)
    check_bool("adjacent", adjacent)
    check_count("seed", seed, minimum=-(2**63))
    check_count("repeats", repeats, minimum=1)
    if counts is None:
        counts = sorted({count for count in (2, round(len(names) / 4), len(names) // 2) if 1 < count < len(names)})
    for count in counts:
        if check_count("counts", count, minimum=1) > len(names):
            raise ValueError(f"counts must be at most {len(names)}, the number of paths, got {count}")
    pairs = _swappable(model, evaluate, adjacent)
    swaps = [check_count("swaps", count, minimum=1) for count in swaps]

    def drawn(kind: int, counts: Sequence[int], things: Sequence[Any]) -> list[Trials]:
        """For each count, trials with random choices of as many things, without values yet."""
        places = [subsets(len(things), k, repeats, plan_generator(seed, k, rank=kind)) for k in counts]
        choices = [[tuple(things[i] for i in place) for place in found] for found in places]
        return [Trials(count, chosen, []) for count, chosen in zip(counts, choices, strict=True)]

    baseline: list[float] = []
    alone: list[float] = []
    removed, exchanged = drawn(0, counts, range(len(names))), drawn(1, swaps, pairs)
    runs: list[tuple[list[float], contextlib.AbstractContextManager]] = [(baseline, contextlib.nullcontext())]
    runs += [(alone, without(model, path)) for path in range(len(names) if each else 0)]
    runs += [(trials.values, without(model, choice)) for trials in removed for choice in trials.choices]
    runs += [(trials.values, swapped(model, choice)) for trials in exchanged for choice in trials.choices]
    for values, lesion in track(runs, "lesions", progress):
        with lesion:
            values.append(_value(model, evaluate))
    return LesionStudy(names, baseline[0], alone, removed, exchanged, pairs)


def subsets(n: int, k: int, limit: int, generator: torch.Generator) -> list[tuple[int, ...]]:
    """Returns all subsets of `range(n)` with `k` elements, or `limit` different random ones if there are more."""
    if math.comb(n, k) <= limit:
        return list(itertools.combinations(range(n), k))
    drawn: dict[tuple[int, ...], None] = {}
    while len(drawn) < limit:
        drawn[tuple(sorted(torch.randperm(n, generator=generator)[:k].tolist()))] = None
    return list(drawn)


def _value(model: nn.Module, evaluate: Callable[[Any], float]) -> float:
    with undisturbed(model), torch.no_grad():
        value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"evaluate must return a number, got {type(value).__name__}") from None


def _swappable(model: nn.Module, evaluate: Callable[[Any], float], adjacent: bool) -> list[tuple[int, int]]:
    """Returns the pairs of paths whose arguments and outputs have the same shapes in an evaluation."""
    seen: dict[int, set[str]] = {}

    def note_shapes(path: int, call: PathCall, x: Tensor) -> Tensor:
        out = call.run(x)
        shapes = pytree.tree_map(_shape, (x, out, call.args, call.kwargs))
        seen.setdefault(path, set()).add(repr(shapes))
        return out

    with overriding(model, note_shapes):
        _value(model, evaluate)
    if not seen:
        raise ValueError("evaluate must run the model it is given, but called none of its paths")
    pairs = itertools.combinations(sorted(seen), 2)
    return [(i, j) for i, j in pairs if seen[i] == seen[j] and (not adjacent or j == i + 1)]


def _shape(value: Any) -> Any:
    return list(value.shape[1:]) if isinstance(value, Tensor) else type(value).__name__


def _index(names: Sequence[str], path: object) -> int:
    if isinstance(path, bool) or not isinstance(path, int | str):
        raise TypeError(f"a path must be an index or a name, got {path!r} ({type(path).__name__})")
    if isinstance(path, str) and path in names:
        return names.index(path)
    if isinstance(path, int) and 0 <= path < len(names):
        return path
    listed = [f"{index} {name!r}" for index, name in enumerate(names)]
    there = ", ".join(listed if len(listed) <= 40 else [*listed[:20], f"… {len(listed) - 21} more …", listed[-1]])
    raise ValueError(f"no path {path!r}; the model has {there}")
