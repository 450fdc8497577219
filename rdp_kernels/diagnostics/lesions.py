"""What happens to a trained network when paths are removed, or run each other's branch.

Veit, Wilber and Belongie, "Residual Networks Behave Like Ensembles of Relatively Shallow Networks", arXiv 1605.06431,
sections 4.1 and 4.2. Nothing is rescaled or trained again.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .._utils.checks import check_bool, check_count
from .._utils.table import table
from ..paths.call import PathCall
from ..paths.path import find_path_modules
from ..plan import plan_generator
from ._plots import axes_or_new, label_layers
from ._progress import track
from ._subsets import subsets
from .observe import added, finish, standing_in, undisturbed

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Which = int | str
"""A path: its index in registration order, as in `scheme.paths`, or its name."""


@contextlib.contextmanager
def without(model: nn.Module, paths: Which | Iterable[Which]) -> Iterator[None]:
    """`model` without the branches of `paths`, indices or names, within: such a path gives `act(shortcut(x))`.

    In eval mode, for removing paths of a trained network; in training mode a removed path learns nothing and what a
    scheme's plan says of it is not followed. Contexts can be nested. Raises `ValueError` or `TypeError` for a path that
    isn't there.
    """
    names = list(find_path_modules(model))
    removed = {_index(names, path) for path in ([paths] if isinstance(paths, int | str) else paths)}
    with standing_in(model, lambda _, call, x: finish(call, call.without_branch(x)), only=removed):
        yield


@contextlib.contextmanager
def swapped(model: nn.Module, pairs: Iterable[tuple[Which, Which]]) -> Iterator[None]:
    """The two paths of each pair run each other's branch within, norm and γ included; shortcut and activation stay.

    Pairs that share a path are carried out one after the other. Raises as `without`; a forward in which the two map
    different shapes raises `ValueError`, or what the branch does.
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
        residual, branch = call.residual(x), added(PathCall(path_modules[other], x.shape[0], call.args, call.kwargs), x)
        if branch.shape != residual.shape:
            shapes = f"{list(branch.shape)}, where the stream is {list(residual.shape)}"
            raise ValueError(f"path {names[path]!r} can't run the branch of {other!r}, which gives {shapes}")
        return finish(call, residual + branch)

    with standing_in(model, run_other, only=[path for path, other in enumerate(order) if path != other]):
        yield


@dataclass(frozen=True)
class Trials:
    """The same lesion at several random places.

    Args:
        count: paths removed at once, or pairs swapped.
        choices: for each trial the paths, or the pairs of paths, by index.
        values: what `evaluate` gave.
    """

    count: int
    choices: list[tuple]
    values: list[float]

    @property
    def mean(self) -> float:
        return torch.tensor(self.values, dtype=torch.float64).mean().item()

    @property
    def std(self) -> float:
        """Standard deviation over the choices (of these, not estimated for others)."""
        return torch.tensor(self.values, dtype=torch.float64).std(correction=0).item() if self.values else math.nan


@dataclass(frozen=True)
class LesionStudy:
    """What `lesion_study` found; all values are `evaluate`'s.

    Args:
        names: of the paths.
        baseline: of the whole network.
        each: without each path alone; empty where that wasn't asked for.
        removed: without random sets of paths, by their size.
        swapped: with pairs of paths swapped, by their number; `choices` and `values` are empty where there aren't so
            many pairs that map the same shape.
        swappable: those pairs.
    """

    names: list[str]
    baseline: float
    each: list[float]
    removed: list[Trials]
    swapped: list[Trials]
    swappable: list[tuple[int, int]] = field(repr=False)

    @property
    def effects(self) -> list[float]:
        """By path: the value without it, less the baseline."""
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
            lines.append(
                f"Pairs of paths that map the same shape, and can be swapped: {len(self.swappable) or 'none'}."
            )
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Bars from the baseline to the value without each path. Returns the axes."""
        ax = axes_or_new(ax)
        places, baseline = range(len(self.each)), self.baseline
        ax.bar(places, self.effects, bottom=baseline, color="#56B4E9", edgecolor="black", linewidth=0.5)
        ax.axhline(baseline, color="black", linestyle="--", label=f"all paths: {baseline:.4g}")
        label_layers(ax, self.names)
        ax.set_xlabel("path")
        ax.set_ylabel("value without the path")
        ax.legend()
        return ax

    def plot_counts(self, ax: Axes | None = None) -> Axes:
        """Mean ± standard deviation over the number of paths removed, and of pairs swapped. Returns the axes."""
        ax = axes_or_new(ax)
        kinds = ((self.removed, "paths removed", "o-"), (self.swapped, "pairs swapped", "s--"))
        for kind, label, style in kinds:
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
    """`evaluate(model)` with paths of `model` removed and swapped.

    Each evaluation begins in eval mode, from the same state of torch's random generators and without autograd; all of
    these are left as they were, also where `evaluate` raises.

    Args:
        evaluate: accuracy, loss or any number; the whole network is evaluated twice, once to see the paths' shapes.
        each: remove each path alone.
        counts: how many random paths are removed together; None: 2, a quarter and a half of them.
        repeats: random choices for each count, all different; all choices where there are no more.
        swaps: how many random pairs of paths are swapped; only paths that map the same shape are.
        adjacent: swap only neighbours in `scheme.paths`.
        seed: of the choices, which torch's global generators take no part in.
        progress: a bar on stderr; None: where that is a terminal.

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
    places: list[tuple[int, list[tuple]]] = []
    for kind, count in [*((0, count) for count in counts), *((1, check_count("swaps", k, minimum=1)) for k in swaps)]:
        generator = plan_generator(seed, count, rank=kind)
        drawn = subsets(len(pairs) if kind else len(names), count, repeats, generator)
        places.append((count, [tuple(pairs[i] for i in choice) for choice in drawn] if kind else [*drawn]))

    lesions: list[contextlib.AbstractContextManager] = [contextlib.nullcontext()]
    lesions += [without(model, path) for path in range(len(names) if each else 0)]
    for i, (_, choices) in enumerate(places):
        lesions += [(without if i < len(counts) else swapped)(model, choice) for choice in choices]
    values = []
    for lesion in track(lesions, "lesions", progress):
        with lesion:
            values.append(_value(model, evaluate))
    left = iter(values[1 + len(names) * each :])
    trials = [Trials(count, choices, list(itertools.islice(left, len(choices)))) for count, choices in places]
    alone = values[1 : 1 + len(names) * each]
    return LesionStudy(names, values[0], alone, trials[: len(counts)], trials[len(counts) :], pairs)


def _value(model: nn.Module, evaluate: Callable[[Any], float]) -> float:
    with undisturbed(model), torch.no_grad():
        value = evaluate(model)
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"evaluate must return a number, got {type(value).__name__}") from None


def _swappable(model: nn.Module, evaluate: Callable[[Any], float], adjacent: bool) -> list[tuple[int, int]]:
    """Pairs of paths whose calls in an evaluation had arguments, and gave results, of the same shapes."""
    seen: dict[int, set[str]] = {}

    def look(path: int, call: PathCall, x: Tensor) -> Tensor:
        out = call.run(x)
        shapes = pytree.tree_map(_shape, (x, out, call.args, call.kwargs))
        seen.setdefault(path, set()).add(repr(shapes))
        return out

    with standing_in(model, look):
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
