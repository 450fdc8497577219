"""What happens to a trained network when paths are removed, or swap their branches.

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
"""A path: its index in registration order, as in `scheme.paths`, or its name."""


def without(model: nn.Module, paths: Which | Iterable[Which]) -> contextlib.AbstractContextManager[Any]:
    """Removes the branches of `paths`, given by index or name, within: such a path returns `act(shortcut(x))`.

    It is meant for trained networks in eval mode. In training mode a removed path learns nothing, and the plan of a
    scheme is ignored for it. Contexts can be nested. Raises `ValueError` or `TypeError` for a path that doesn't exist.
    """
    names = list(find_path_modules(model))
    removed = {_index(names, path) for path in ([paths] if isinstance(paths, int | str) else paths)}
    return overriding(model, lambda _, call, x: activated(call.without_branch(x), call.module.activation), only=removed)


def swapped(model: nn.Module, pairs: Iterable[tuple[Which, Which]]) -> contextlib.AbstractContextManager[Any]:
    """Swaps the branches of the two paths of each pair within, norm and γ included. Shortcuts and activations stay.

    Pairs that share a path are swapped one after the other. Raises the same errors as `without`. Where two paths map
    different shapes, the forward raises `ValueError`, or what the branch raises.
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
    """The same lesion at several random places.

    Args:
        count: how many paths are removed, or pairs swapped, in each trial.
        choices: for each trial the paths, or the pairs of paths, by index.
        values: for each trial the result of `evaluate`.
    """

    count: int
    choices: list[tuple]
    values: list[float]

    @property
    def mean(self) -> float:
        return torch.tensor(self.values, dtype=torch.float64).mean().item()

    @property
    def std(self) -> float:
        """Standard deviation over these choices (not an estimate for all choices)."""
        return torch.tensor(self.values, dtype=torch.float64).std(correction=0).item() if self.values else math.nan


@dataclass(frozen=True)
class LesionStudy:
    """The result of `lesion_study`. All values are results of `evaluate`.

    Args:
        names: the paths' names.
        baseline: the whole network.
        each: the network without each single path; empty where `each=False`.
        removed: the network without random sets of paths, by the size of the sets.
        swapped: the network with random pairs of paths swapped, by the number of pairs. `choices` and `values` are
            empty where too few pairs can be swapped.
        swappable: the pairs of paths that map the same shape, and so can be swapped.
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
        """Draws bars from the baseline to the value without each path. Returns the axes."""
        ax = axes_or_new(ax)
        places, baseline = range(len(self.each)), self.baseline
        ax.bar(places, self.effects, bottom=baseline, color="#56B4E9", edgecolor="black", linewidth=0.5)
        ax.axhline(baseline, color="black", linestyle="--", label=f"all paths: {baseline:.4g}")
        label_layers(ax, self.names)
        ax.set(xlabel="path", ylabel="value without the path")
        ax.legend()
        return ax

    def plot_counts(self, ax: Axes | None = None) -> Axes:
        """Draws mean ± standard deviation over the number of paths removed, and of pairs swapped. Returns the axes."""
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
    """Runs `evaluate(model)` with paths of `model` removed and swapped.

    Each evaluation begins in eval mode, without autograd, and from the same state of torch's random generators. All of
    these are restored, also where `evaluate` raises.

    Args:
        evaluate: returns an accuracy, a loss or any number. It runs twice on the whole network, the first time to see
            the paths' shapes.
        each: remove each path alone.
        counts: how many random paths are removed together; None: 2, a quarter and a half of them.
        repeats: how many random choices are tried for each count, all different, or all choices if there are no more.
        swaps: how many random pairs of paths are swapped. Only paths that map the same shape are.
        adjacent: swap only neighbours in `scheme.paths`.
        seed: for the choices. Torch's global generators aren't used.
        progress: draw a progress bar on stderr; None draws it where stderr is a terminal.

    Raises `ValueError` or `TypeError` naming the argument.
    """
    names = list(find_path_modules(model))
    check_bool("each", each)
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
    """All subsets of `range(n)` with `k` elements, or `limit` different random ones where there are more."""
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
    """The pairs of paths whose arguments and outputs have the same shapes in an evaluation."""
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
