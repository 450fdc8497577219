"""The measurements of the command, and their presentation as a table, JSON, Markdown and figures."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._utils.table import table
from ._subject import Data, Problem, output_of
from .effective_depth import EffectiveDepth, effective_depth, participation
from .features import FeatureDistributions, feature_distributions
from .gradients import GradientNorms, gradient_norms
from .layers import LayerSimilarity, layer_similarity
from .lesions import LesionStudy, lesion_study
from .observe import undisturbed
from .sizes import BranchSizes, branch_sizes

PARTS = ("sizes", "similarity", "features", "gradients", "lesions", "depth")


@dataclass(frozen=True)
class Report:
    """The measurements, with notes on how to read them."""

    notes: list[str]
    metric: str
    """What the value of a lesion means."""
    accuracy: float | None
    sizes: BranchSizes
    similarity: LayerSimilarity
    features: FeatureDistributions
    gradients: GradientNorms
    lesions: LesionStudy
    depth: EffectiveDepth | None

    def header(self) -> tuple[str, ...]:
        effect = "loss without it: change" if self.metric == "loss" else "outputs without it: change"
        return "path", "‖branch‖ / ‖residual‖", "‖∂L/∂θ‖", "‖∂L/∂residual‖", effect

    def rows(self) -> list[tuple[str, float, float, float, float]]:
        """Returns the cells by path. The size is measured in the path's first call."""
        sizes = dict(zip(self.sizes.labels, self.sizes.ratio.tolist(), strict=True))
        columns = (self.gradients.parameters, self.gradients.stream, self.lesions.effects)
        return [
            (name, sizes.get(name, math.nan), *values)
            for name, *values in zip(self.lesions.names, *columns, strict=True)
        ]

    def cells(self) -> list[tuple[str, ...]]:
        return [(name, *(f"{value:.3g}" for value in values)) for name, *values in self.rows()]

    def facts(self) -> dict[str, float | None]:
        """Returns single numbers, by description."""
        effects = [abs(effect) for effect in self.lesions.effects]
        ratios = [ratio for ratio in self.sizes.ratio.tolist() if math.isfinite(ratio)]
        facts: dict[str, float | None] = {"loss": self.lesions.baseline} if self.metric == "loss" else {}
        facts |= {} if self.accuracy is None else {"accuracy": self.accuracy}
        facts |= {} if self.depth is None else {"effective depth": self.depth.depth}
        facts["paths that matter, by what removing them does"] = _participation(effects)
        facts["paths that matter, by their size"] = _participation(ratios)
        facts["rebound of the similarity"] = self.similarity.rebound
        for trials in self.lesions.removed:
            facts[f"{self.metric} without {trials.count} random paths"] = trials.mean
        for trials in self.lesions.swapped if self.lesions.swappable else ():
            facts[f"{self.metric} with {trials.count} random pair of paths swapped"] = trials.mean
        return facts

    def text(self) -> str:
        known = [f"{name}: {_shown(value)}" for name, value in self.facts().items()]
        return "\n".join([*table(self.header(), self.cells()), *known, *self.notes])

    def data(self) -> dict[str, Any]:
        """Returns all results in plain types. NaN and Inf become None."""
        paths = [dict(zip(("name", "size", "gradient", "stream", "effect"), row, strict=True)) for row in self.rows()]
        parts = {name: getattr(self, name) for name in PARTS}
        found = {name: None if part is None else asdict(part) for name, part in parts.items()}
        head = {"notes": self.notes, "metric": self.metric, "facts": self.facts(), "paths": paths}
        return _plain(head | found)

    def write(self, folder: Path, title: str, options: dict[str, Any]) -> list[str]:
        """Writes report.json, report.md and, with matplotlib, figures. Returns their names. Raises `Problem`."""
        files = {"report.json": json.dumps(_plain(options) | self.data(), indent=1, allow_nan=False).encode()}
        files |= self._figures()
        rows = ["| " + " | ".join(cells) + " |" for cells in (self.header(), ("---",) * 5, *self.cells())]
        lines = [f"# {title}", *self.notes, "\n".join(rows)]
        lines += ["\n".join(f"- {name}: {_shown(value)}" for name, value in self.facts().items())]
        lines += [f"![{name.removesuffix('.png')}]({name})" for name in files if name.endswith(".png")]
        files["report.md"] = ("\n\n".join(lines) + "\n").encode()
        for name, content in files.items():
            write(folder / name, content)
        return list(files)

    def _figures(self) -> dict[str, bytes]:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return {}
        plots: dict[str, Callable] = {name: getattr(self, name).plot for name in PARTS if name != "depth"}
        if self.lesions.removed or self.lesions.swapped:
            plots["removed"] = self.lesions.plot_counts
        if self.depth is not None:
            plots["effective_depth"] = self.depth.plot
        found = {}
        for name, plot in plots.items():
            figure, buffer = Figure(figsize=(9, 6), layout="constrained"), io.BytesIO()
            plot(figure.subplots())
            figure.savefig(buffer, format="png", dpi=110)
            found[f"{name}.png"] = buffer.getvalue()
        return found


def measure(model: nn.Module, data: Data, *, lesions: int, samples: int, seed: int, notes: list[str]) -> Report:
    """Measures `model` in eval mode.

    `lesions` is the number of random sets of each size, and `samples` that of random sets for each length.
    """
    notes = notes + data.notes
    with undisturbed(model), torch.no_grad():
        whole = [output_of(model(images)) for images in data.images]
    labels = data.labels
    accuracy, outputs = None, list(whole[0].shape[1:])
    if labels is not None and outputs != [data.classes]:
        notes.append(f"No labels are used: the data has {data.classes} classes, and the model's outputs are {outputs}.")
        labels = None
    if labels is not None:
        accuracy = (torch.cat(whole).argmax(dim=1) == torch.cat(labels)).double().mean().item()
        count = sum(map(len, labels))
        notes.append(f"L is the cross-entropy of {count} images, for gradients of the first {len(labels[0])}.")
    else:
        notes.append(
            "L is the mean square of the outputs of the first batch; the change of the outputs y is "
            "‖y without the path − y‖ / ‖y‖ over all batches."
        )

    def evaluate(model: Any) -> float:
        outputs = [output_of(model(images)) for images in data.images]
        if labels is not None:
            return F.cross_entropy(torch.cat(outputs).double(), torch.cat(labels)).item()
        y = torch.cat(whole).double()
        return ((torch.cat(outputs).double() - y).norm() / y.norm()).item()

    def loss(model: Any) -> Tensor:
        output = output_of(model(data.images[0]))
        return output.square().mean() if labels is None else F.cross_entropy(output, labels[0])

    depth = None
    if samples:
        try:
            depth = effective_depth(model, loss, samples=samples, seed=seed)
        except ValueError as error:  # for example with an output layer of zeros
            notes.append(f"No effective depth: {error}.")
    counts, swaps = (None, (1,)) if lesions else ((), ())
    study = lesion_study(model, evaluate, counts=counts, repeats=max(lesions, 1), swaps=swaps, seed=seed)
    if lesions and not study.swappable:
        notes.append("No paths were swapped, as no two map the same shape.")
    return Report(
        notes,
        "outputs' change" if labels is None else "loss",
        accuracy,
        branch_sizes(model, data.images),
        layer_similarity(model, data.images),
        feature_distributions(model, data.images, seed=seed),
        gradient_norms(model, loss),
        study,
        depth,
    )


def prepare(folder: Path) -> None:
    """Creates the folder and checks that files can be written to it. Raises `Problem`."""
    write(folder / ".probe", b"")
    (folder / ".probe").unlink()


def write(file: Path, content: bytes) -> None:
    """Replaces the file atomically, and creates its folder. Raises `Problem`."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except OSError as error:
        raise Problem(f"argument --out: can't write to {file.parent}: {error.strerror or error}") from error


def _participation(values: list[float]) -> float | None:
    try:
        return participation(values)
    except ValueError:  # NaN and Inf, from a model that overflows
        return None


def _shown(value: float | None) -> str:
    return "unknown" if value is None or math.isnan(value) else f"{value:.4g}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
