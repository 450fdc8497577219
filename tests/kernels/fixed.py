"""The fixed table of correctness cases, at the sizes of real networks and at odd ones. It runs first on a device.

A row is one call and its reason. On a GPU it runs as it is; on a CPU it is cut down (`smaller`), as an interpreter
runs it. Rows whose kernels differ in nothing but sizes share Triton's compilations: where a size doesn't matter, it
is that of another row.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rdp_kernels.kernels.spec import Operands, Results
from tests.conftest import DEVICE

from . import ops
from .cases import Case

CUDA_KERNELS = DEVICE == "cuda" or os.environ.get("RDP_CUDA_ON_HOST") == "1"
"""Whether the compiled library runs CUDA kernels, also in `tests/cuda_on_host`."""

# Of the residual, the branch, γ, and the norm's weight and bias.
FP32, BF16, FP16, FP64 = (((dtype,) * 4) for dtype in ("float32", "bfloat16", "float16", "float64"))
AUTOCAST = ("float32", "bfloat16", "float32", "float32")  # a bfloat16 branch on a float32 residual
WIDE_VECTORS = ("bfloat16", "bfloat16", "float32", "float32")  # a bfloat16 residual, parameters in float32
FP16_WIDE_VECTORS = ("float16", "float16", "float32", "float32")
WIDE_BRANCH = ("bfloat16", "float32", "bfloat16", "bfloat16")

# Of the residual, the branch, the incoming gradients, and the vectors.
DENSE, OFFSET, CHANNELS_LAST = (((layout,) * 4) for layout in ("dense", "offset", "channels_last"))
PADDED = ("padded", "padded", "padded", "dense")
STRIDED = ("strided", "strided", "dense", "strided")
TRANSPOSED = ("transposed", "transposed", "dense", "dense")
ODD_VECTORS = ("dense", "dense", "dense", "offset")
EXPANDED = ("dense", "expanded", "expanded scalar", "dense")

# Sizes: tokens of ViT-S, ViT-B and a wider one with a power of 2 of both, images of ConvNeXt.
SMALL_VIT, BASE_VIT, LARGE_VIT = (64, 197, 384), (32, 197, 768), (16, 256, 1024)
STAGE_1, STAGE_4 = (16, 96, 56, 56), (16, 768, 7, 7)
ODD, ONES = (5, 3, 67), (3, 1, 1)

# Words of the error where the CUDA kernels of the compiled library don't support a call.
NO_FLOAT64 = "float64"
NO_WIDE_BRANCH = "a branch of the residual's dtype"


@dataclass(frozen=True)
class Row:
    """One call.

    Args:
        rows, next_rows: the rows that have an update, and those of the next input; names of `ROWS`.
        options: further arguments of `Case`.
        refused: words of the error where the CUDA kernels of the compiled library don't support it.
        why: which fault would go unnoticed without it.
    """

    name: str
    op: Callable[[Operands, Case], Results]
    shape: tuple[int, ...]
    dtypes: tuple[str, str, str, str]
    why: str
    layouts: tuple[str, str, str, str] = DENSE
    rows: str = "all"
    next_rows: str = "all"
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None

    def case(self, small: bool = DEVICE == "cpu", largest: tuple[int, ...] = (4, 16, 80)) -> Case:
        """The case at its own size, or cut down; `largest` as in `smaller`."""
        shape, options = self.shape, self.options
        if small:
            wide = options.get("norm") is not None and shape[-1] > 4096
            shape, options = smaller(shape, largest), options | {"tiles": "wide" if wide else "medium"}
        rows, num_learning = ROWS[self.rows](shape[0])
        next_rows, num_next_learning = ROWS[self.next_rows](shape[0])
        return Case(
            shape,
            self.dtypes,
            self.layouts,
            rows=rows,
            num_learning=num_learning,
            # Not in the order of `rows`: some samples have an update, some are in the next input, some both.
            next_rows=next_rows and tuple((row + 1) % shape[0] for row in reversed(next_rows)),
            num_next_learning=num_next_learning,
            seed=zlib.crc32(self.name.encode()),
            in_place=self.op is ops.in_place,
            **options,
        )


def smaller(shape: tuple[int, ...], largest: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes of at most `largest` (of the batch, of inner dimensions, of the last one). All but the batch's stay the
    same modulo 16, so that odd sizes and whole packs remain. All inner dimensions of images are small."""
    batch, inner, last = largest
    limits = [*[inner] * (len(shape) - 2), inner if len(shape) > 3 else last]
    sizes = [n if n <= most else most - 16 + (n % 16 or 16) for n, most in zip(shape[1:], limits, strict=True)]
    return min(shape[0], batch), *sizes


def _order(batch_size: int) -> tuple[int, ...]:
    """All rows, in ascending and in descending order."""
    return tuple(sorted(range(batch_size), key=lambda b: (7 * b + 3) % 11))


# By name, as functions of the batch size: the rows (None: all, without a list), and how many learn (None: all).
ROWS: dict[str, Callable[[int], tuple[tuple[int, ...] | None, int | None]]] = {
    "all": lambda size: (None, None),
    "listed": lambda size: (_order(size), None),
    "some": lambda size: (_order(size)[: (size + 1) // 2], None),
    "one": lambda size: (_order(size)[:1], None),
    "none": lambda size: ((), None),
    "mixed": lambda size: (_order(size)[: size - size // 4], (size + 1) // 2),
    "frozen": lambda size: (_order(size)[: size - size // 4], 0),
}

GAMMA = dict(gamma=True)
PER_POSITION = dict(gamma=True, channel_dim=1)
PER_FRAME = dict(gamma=True, channel_dim=2)
SCALED = dict(gamma=True, row_scale=1 / 0.7)
DROPPED = dict(gamma=True, row_scale="tensor")
GATHER = dict(adds=False, gives_next=True, used=("next",))
LAYER = dict(gamma=True, gives_next=True, norm="layer", weight=True, bias=True)
RMS = dict(gamma=True, gives_next=True, norm="rms", weight=True)
HANDOVER = dict(gamma=True, gives_next=True)

# fmt: off
TABLE = [
    # residual_add
    Row("add", ops.residual_add, SMALL_VIT, FP32, "nothing but a sum; its backward copies"),
    Row("add-gamma", ops.residual_add, SMALL_VIT, FP32, "a factor a column, sums over 12,608 rows", options=GAMMA),
    Row("add-frozen-gamma", ops.residual_add, SMALL_VIT, FP32, "γ passes on, without sums", options=GAMMA | {"wanted": ("residual", "update")}),
    Row("add-one-sample", ops.residual_add, (1, 197, 384), FP32, "B = 1", options=GAMMA),
    Row("add-of-a-loss", ops.residual_add, SMALL_VIT, FP32, "one branch row for all, one number for all gradients", layouts=EXPANDED, options=GAMMA),
    Row("add-strided", ops.residual_add, SMALL_VIT, FP32, "copied before a kernel sees it", layouts=STRIDED, options=GAMMA),
    Row("add-padded", ops.residual_add, SMALL_VIT, FP32, "samples 3 elements further apart than they are long", layouts=PADDED, options=GAMMA),
    Row("add-some", ops.residual_add, BASE_VIT, BF16, "half of the batch, out of order", rows="some", options=SCALED),
    Row("add-one-row", ops.residual_add, BASE_VIT, BF16, "one row kept", rows="one", options=SCALED),
    Row("add-no-row", ops.residual_add, BASE_VIT, BF16, "no row kept: dγ is 0", rows="none", options=SCALED),
    Row("add-listed", ops.residual_add, BASE_VIT, BF16, "all rows kept, out of order", rows="listed", options=SCALED),
    Row("add-dropped", ops.residual_add, BASE_VIT, BF16, "a factor a row, 0 for dropped ones, which hold NaN or Inf", options=DROPPED),
    Row("add-offset", ops.residual_add, BASE_VIT, BF16, "no 16-byte packs: every address is odd", layouts=OFFSET, options=DROPPED),
    Row("add-odd-vectors", ops.residual_add, BASE_VIT, BF16, "γ alone is at an odd address", layouts=ODD_VECTORS, options=DROPPED),
    Row("add-autocast", ops.residual_add, BASE_VIT, AUTOCAST, "as under autocast, some of the rows dropped", rows="some", options=DROPPED),
    Row("add-wide-branch", ops.residual_add, BASE_VIT, WIDE_BRANCH, "the branch is wider than the residual", options=SCALED, refused=NO_WIDE_BRANCH),
    Row("add-fp16", ops.residual_add, LARGE_VIT, FP16, "sizes that are powers of 2", rows="some", options=SCALED),
    Row("add-fp64", ops.residual_add, (8, 197, 384), FP64, "a number as factor becomes a tensor", rows="some", options=SCALED, refused=NO_FLOAT64),
    Row("add-transposed", ops.residual_add, (16, 197, 384), FP32, "channels before tokens in memory: a factor a position", layouts=TRANSPOSED, options=GAMMA),
    Row("add-relu", ops.residual_add, (8, 256, 56, 56), BF16, "ResNet: the sum is saved, dropped rows change too", options={"row_scale": "tensor", "activation": "relu"}),
    Row("add-nchw", ops.residual_add, STAGE_1, BF16, "a factor a position, 3,136 columns", options=PER_POSITION | {"row_scale": "tensor"}),
    Row("add-nchw-some", ops.residual_add, STAGE_4, FP32, "a factor a position, 49 columns, some rows", rows="some", options=PER_POSITION),
    Row("add-video", ops.residual_add, (3, 2, 768, 7, 7), FP32, "frames before channels: position p has channel p mod 768", rows="some", options=PER_FRAME),
    Row("add-channels-last", ops.residual_add, STAGE_1, BF16, "images with a factor a column", layouts=CHANNELS_LAST, rows="some", options=PER_POSITION),
    Row("add-channels-last-relu", ops.residual_add, STAGE_4, FP32, "relu and γ on images", layouts=CHANNELS_LAST, options=PER_POSITION | {"activation": "relu"}),
    Row("add-odd", ops.residual_add, ODD, AUTOCAST, "nothing is divisible by anything", rows="some", options=DROPPED),
    Row("add-ones", ops.residual_add, ONES, FP32, "every size but the batch's is 1", options=GAMMA),

    # gather_rows
    Row("gather", ops.gather_rows, SMALL_VIT, FP32, "half of the batch; its backward scatters into zeros", next_rows="some", options=GATHER),
    Row("gather-listed", ops.gather_rows, BASE_VIT, BF16, "all rows, out of order", next_rows="listed", options=GATHER),
    Row("gather-offset", ops.gather_rows, BASE_VIT, BF16, "no 16-byte words", layouts=OFFSET, next_rows="some", options=GATHER),
    Row("gather-channels-last", ops.gather_rows, STAGE_4, FP16, "rows stay in channels last", layouts=CHANNELS_LAST, next_rows="some", options=GATHER),
    Row("gather-padded", ops.gather_rows, (8, 197, 384), FP64, "rows further apart than they are long", layouts=PADDED, next_rows="some", options=GATHER, refused=NO_FLOAT64),
    Row("gather-odd", ops.gather_rows, ODD, BF16, "words of 2 bytes", next_rows="some", options=GATHER),

    # drop_path and drop_path_add
    Row("drop-path", ops.drop_path, BASE_VIT, BF16, "a branch without a residual", options={"residual": False, "drop_prob": 0.3}),
    Row("drop-path-unscaled", ops.drop_path, BASE_VIT, BF16, "kept rows aren't scaled", options={"residual": False, "drop_prob": 0.6, "scale_by_keep": False}),
    Row("drop-path-fp64", ops.drop_path, ODD, FP64, "a scale in float64", options={"residual": False, "drop_prob": 0.3}, refused=NO_FLOAT64),
    Row("drop-path-add", ops.drop_path_add, BASE_VIT, BF16, "mask, γ and sum in one", options={"gamma": True, "drop_prob": 0.3}),
    Row("drop-path-add-all", ops.drop_path_add, BASE_VIT, BF16, "p = 1: all rows are dropped", options={"gamma": True, "drop_prob": 1.0}),
    Row("drop-path-add-autocast", ops.drop_path_add, BASE_VIT, AUTOCAST, "without γ", options={"drop_prob": 0.45}),

    # residual_add_norm
    Row("layer", ops.residual_add_norm, SMALL_VIT, FP32, "LayerNorm of every row, three sums", options=LAYER | DROPPED),
    Row("layer-far-from-zero", ops.residual_add_norm, SMALL_VIT, FP32, "a mean that is 30 times the deviation", options=LAYER | DROPPED | {"offset": -30.0}),
    Row("layer-transposed", ops.residual_add_norm, SMALL_VIT, FP32, "channels aren't innermost: copied first", layouts=TRANSPOSED, options=LAYER | DROPPED),
    Row("layer-some", ops.residual_add_norm, BASE_VIT, WIDE_VECTORS, "some rows, others go on", rows="some", next_rows="some", options=LAYER | DROPPED),
    Row("layer-one-row", ops.residual_add_norm, BASE_VIT, WIDE_VECTORS, "one row kept, one goes on", rows="one", next_rows="one", options=LAYER | DROPPED),
    Row("layer-no-row", ops.residual_add_norm, BASE_VIT, WIDE_VECTORS, "none kept, none goes on", rows="none", next_rows="none", options=LAYER | DROPPED),
    Row("layer-dropped", ops.residual_add_norm, BASE_VIT, WIDE_VECTORS, "all rows of a narrow residual: the norm's backward reads the sum", options=LAYER | DROPPED),
    Row("layer-bare", ops.residual_add_norm, BASE_VIT, BF16, "no γ, no weight, no bias", next_rows="some", options={"gives_next": True, "norm": "layer"}),
    Row("layer-fp64", ops.residual_add_norm, (4, 197, 384), FP64, "all arithmetic in float64", rows="some", next_rows="some", options=LAYER, refused=NO_FLOAT64),
    Row("layer-odd-fp16", ops.residual_add_norm, ODD, FP16_WIDE_VECTORS, "rows that end within a tile, odd addresses", layouts=OFFSET, next_rows="some", options=LAYER),
    Row("layer-ones", ops.residual_add_norm, ONES, FP32, "one channel: the variance is 0", options=LAYER),
    Row("rms", ops.residual_add_norm, (16, 256, 2048), BF16, "RMSNorm of whole tiles", options=RMS | DROPPED),
    Row("rms-4096", ops.residual_add_norm, (2, 500, 4096), WIDE_VECTORS, "the widest row that registers hold", options=RMS),
    Row("rms-5120", ops.residual_add_norm, (4, 50, 5120), WIDE_VECTORS, "wider: the backward goes through it in pieces", next_rows="some", options=RMS),
    Row("layer-5120", ops.residual_add_norm, (2, 50, 5120), FP32, "the same of LayerNorm", rows="some", options=LAYER),

    # The add of one path and the input of the next
    Row("path", ops.joint, BASE_VIT, WIDE_VECTORS, "learning and frozen rows come, learning and frozen ones go", rows="mixed", next_rows="mixed", options=LAYER | SCALED),
    Row("path-autocast", ops.joint, BASE_VIT, AUTOCAST, "the same under autocast", rows="mixed", next_rows="mixed", options=LAYER | SCALED),
    Row("path-detached", ops.joint, BASE_VIT, WIDE_VECTORS, "no gradient passes through frozen rows", rows="mixed", next_rows="mixed", options=LAYER | SCALED | {"detached": "frozen"}),
    Row("path-frozen", ops.joint, BASE_VIT, AUTOCAST, "no row learns", rows="frozen", next_rows="frozen", options=LAYER | SCALED),
    Row("path-no-norm", ops.joint, BASE_VIT, AUTOCAST, "rows are handed over as they are", rows="mixed", next_rows="mixed", options=HANDOVER),
    Row("path-images", ops.joint, STAGE_1, FP16, "a factor a position, over learning rows alone", rows="mixed", next_rows="mixed", options=HANDOVER | PER_POSITION),
    Row("path-channels-last", ops.joint, STAGE_4, AUTOCAST, "ConvNeXt in channels last", layouts=CHANNELS_LAST, rows="mixed", next_rows="mixed", options=HANDOVER | PER_POSITION),
    Row("path-odd", ops.joint, ODD, BF16, "rows that end within a tile", rows="mixed", next_rows="mixed", options=RMS),
    Row("head", ops.joint, BASE_VIT, WIDE_VECTORS, "a first path: rows and norm, nothing is added", next_rows="mixed", options=LAYER | {"adds": False, "gamma": False}),
    Row("last-add", ops.joint, BASE_VIT, WIDE_VECTORS, "a last path: no next branch; learning and frozen rows share the factors", rows="mixed", options=DROPPED),

    # The same in place, as between two branches of a ResidualSequence
    Row("in-place-path", ops.in_place, BASE_VIT, WIDE_VECTORS, "untouched samples keep what they hold", rows="mixed", next_rows="mixed", options=LAYER | SCALED),
    Row("in-place-no-norm", ops.in_place, BASE_VIT, AUTOCAST, "rows are handed over as they are", rows="mixed", next_rows="mixed", options=HANDOVER),
    Row("in-place-last-add", ops.in_place, BASE_VIT, BF16, "the last sum: the gradient is passed on", rows="some", options=SCALED),
    Row("in-place-no-row", ops.in_place, BASE_VIT, AUTOCAST, "nothing is written", rows="none", next_rows="none", options=HANDOVER),
    Row("in-place-channels-last", ops.in_place, STAGE_4, AUTOCAST, "images, dropped rows", layouts=CHANNELS_LAST, next_rows="some", options=HANDOVER | PER_POSITION | {"row_scale": "tensor"}),
    Row("in-place-5120", ops.in_place, (4, 50, 5120), BF16, "wide rows in pieces", rows="some", next_rows="some", options=RMS),
    Row("in-place-odd", ops.in_place, ODD, FP32, "rows that end within a tile; all go on", rows="mixed", options=LAYER),
]
# fmt: on
