"""docs/models.md, made of docs/models.csv and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterable

from .found import FLOORS, PRECISIONS
from .rows import OUTCOMES, Row, summary

INTRODUCTION = """\
# Models that can be converted

This page lists the block classes of timm, torchvision and transformers that were converted, and what `rdp.convert` makes of
each.

```python
import timm

import rdp_kernels as rdp

model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, drop_path_rate=0.2)
print(rdp.convert(model))  # a table of the residual branches
scheme = rdp.ResidualDropPath(model, seed=0)
```

A *drop-path* is a module that drops the result of a residual branch at random. `rdp.convert` knows no model by name. It
follows a block's own forward to the call of its drop-path, and cuts out the branch: what is computed for that call alone.
[Convert a model](how-to/convert.md) shows how to use it.

This page has every block class of these libraries that owns a drop-path, and some that don't. It is written by
`python -m tests.coverage --csv docs/models.csv --markdown docs/models.md`. This command builds one small model for each
class, with random weights, converts it and measures it.

## What the results mean

**Converted** means that nothing of a dropped branch is computed. For each measured model the following holds:

- The keys of the `state_dict` are the same, and evaluation is bit-identical.
- With all, some and no rows kept, outputs and gradients of inputs and parameters equal those of the unconverted model with
  the same masks. The same holds for a drop and a reuse iteration ([The scheme](concepts/scheme.md)) with half of the paths
  dropped, and with the other half.
- Copies and pickles are converted too, and `rdp.revert` restores the original.

During these measurements dropout is off, and so are drop-paths that stay masked. BatchNorm is measured in eval and in
training mode. In eval mode at least two rows are kept: for a single row, torch's own backward is wrong on CPUs (2.13,
whichever library calls it).

**Stays masked** means that the branch is computed and masked, as in the library. This holds for what was *refused*, with the
reason in the report, and for a drop-path *inside another branch*, which is skipped along with that branch. A model with such
drop-paths is converted *in part*. The scheme then plans only the converted paths. The other drop-paths still draw their own
masks, in both iterations.

**BatchNorm** in the notes: the branch has a BatchNorm. In block mode (one decision for the whole batch) it is skipped.
In sample mode (a decision for each sample) it runs on the whole batch and is masked.

**Whole batch** in the notes: the rows of the branch aren't samples, but windows or patches. It is dropped for the
whole batch in either mode.

**Without drop-path**: `rdp.convert(model, drop_prob=0.2)` adds a drop-path for each residual add. The layers of a DenseNet
get one whose dropped result is zeros.

**Side products** of a branch (attention maps, counters, what hooks store) come from the last call in which the branch ran,
and cover only the rows of that call.
"""


def render(rows: Iterable[Row]) -> str:
    rows = list(rows)
    parts = [INTRODUCTION, _summary(rows), _differences(rows)]
    for library in dict.fromkeys(row.library for row in rows):
        for drop_path, title in (("yes", library), ("no", f"{library}, without drop-path")):
            found = [row for row in rows if row.library == library and row.drop_path == drop_path]
            if found:
                versions = " and ".join(dict.fromkeys(row.versions for row in found)).replace(", ", " on ")
                parts.append(f"## {title}\n\nMeasured with {versions}.\n\n{_classes(found)}")
    return "\n".join(parts)


def _summary(rows: list[Row]) -> str:
    lines = [f"| library | classes | {' | '.join(OUTCOMES)} |", f"|---|---{'|---' * len(OUTCOMES)}|"]
    for name, counts in summary(rows):
        lines.append(f"| {name} | {sum(counts.values())} | {' | '.join(str(counts[o]) for o in OUTCOMES)} |")
    return "\n".join(["## In short", "", *lines, ""])


def _differences(rows: list[Row]) -> str:
    lines = ["Differences to the unconverted model are relative to a tensor's largest element, or to a share of the model's",
             "largest gradient if that is more.", "", "| computes in | models' classes | tolerance | that share | largest seen |",
             "|---|---|---|---|---|"]  # fmt: skip
    for precision, tolerance in PRECISIONS.items():
        found = [row for row in rows if row.precision == precision and row.outcome != "failed"]
        if found:
            worst = max(float(row.error) for row in found)
            lines.append(f"| {precision} | {len(found)} | {tolerance:.0e} | {FLOORS[precision]:g} | {worst:.0e} |")
    return "\n".join([*lines, ""])


def _classes(rows: list[Row]) -> str:
    lines = [
        "| block class, and a model that has it | outcome | paths | what is skipped, or why it isn't | notes |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row.block_class):
        kind = re.sub(r"^(timm|torchvision|transformers)\.models\.", "", row.block_class)
        what = [row.skips, f"**refused** {row.reasons}" if row.reasons else "", row.failures and f"**{row.failures}**"]
        flags = [
            "BatchNorm" if row.batch_norm else "",
            "whole batch" if row.foreign_rows else "",
            f"not measured: {row.not_measured}" if row.not_measured else "",
        ]
        paths = f"{row.converted} of {row.converted + row.nested + row.refused}"
        cells = [f"`{kind}`<br>{row.model}", row.outcome, paths, _joined(what), _joined(flags)]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


def _joined(parts: list[str]) -> str:
    return "; ".join(part for part in parts if part)
