"""The measured ops: their tensors, the formula as users write it (`eager`), our call (`ours`) and the definition.

`eager` is the baseline. Compiled, it is a second comparator. `reference` is the definition in other ops of torch, and
runs in float64. Masks, rows and scales are drawn beforehand, so that drawing isn't timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rdp_kernels.kernels.spec import row_set

from .op_bytes import Moved

CPU = torch.device("cpu")
EPS = 1e-6
SEED = 0
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Setting:
    """The shape and options of an op's inputs.

    Args:
        op: its name in `op_cases.OPS`.
        shape: `[B, ...]` of the residual. Channels are last, or second of four dimensions.
        kept: the number of the B samples that have a branch; None: nothing is dropped or scaled.
        gamma: whether there is a LayerScale.
    """

    op: str
    shape: tuple[int, ...]
    kept: int | None
    dtype: torch.dtype = torch.float32
    gamma: bool = True
    channels_last: bool = False

    @property
    def labels(self) -> dict[str, Any]:
        layout = "NCHW" if len(self.shape) == 4 else "..C"
        return {
            "op": self.op,
            "shape": "x".join(map(str, self.shape)),
            "dtype": str(self.dtype).removeprefix("torch."),
            "layout": "channels_last" if self.channels_last else layout,
            "kept": self.kept,
            "gamma": self.gamma,
        }


class Op:
    """One op in one setting. Its functions take the tensors of `inputs` and return tensors."""

    name: ClassVar[str]
    compiled: ClassVar[str] = "torch.compile"
    """The name of the compiled comparator."""
    norm: ClassVar[bool] = False
    num_row_sets: ClassVar[int] = 1

    def __init__(self, setting: Setting, device: torch.device = CPU):
        self.setting, self.device = setting, device
        self.batch = setting.shape[0]
        self.kept = self.batch if setting.kept is None else setting.kept
        self.channel_dim = 1 if len(setting.shape) == 4 else -1
        self.scale = self.batch / max(self.kept, 1)
        drawn = torch.Generator().manual_seed(SEED)
        keeps = [torch.zeros(self.batch, dtype=torch.bool) for _ in range(self.num_row_sets)]
        for keep in keeps:
            keep[torch.randperm(self.batch, generator=drawn)[: self.kept]] = True
        self.row_sets = [row_set(keep, device) for keep in keeps]
        self.rows = self.row_sets[0].index
        self.row_scale = keeps[0].to(device) * torch.tensor(self.scale, device=device)
        self.mask = self.row_scale.view(-1, *[1] * (len(setting.shape) - 1)).to(setting.dtype)

    @property
    def sample_bytes(self) -> int:
        return math.prod(self.setting.shape[1:]) * self.setting.dtype.itemsize

    @property
    def needed(self) -> Moved:
        """The amount that each pass needs, in samples."""
        raise NotImplementedError

    @property
    def compiled_moves(self) -> Moved:
        """The amount that the compiled comparator moves, in samples."""
        raise NotImplementedError

    def inputs(self, number: int) -> Tensors:
        """Returns input set `number`: leaf tensors that learn (residual, updates, vectors)."""
        raise NotImplementedError

    def eager(self, *inputs: Tensor) -> Tensors:
        raise NotImplementedError

    def ours(self, *inputs: Tensor) -> Tensors:
        raise NotImplementedError

    def reference(self, *inputs: Tensor) -> Tensors:
        raise NotImplementedError

    def make(self, number: int, *num_rows: int, vectors: int) -> Tensors:
        """Returns a big tensor for each of `num_rows`, then γ if the setting has it, and further vectors."""
        setting = self.setting
        generator = torch.Generator(self.device).manual_seed(SEED + number)
        options: dict[str, Any] = dict(generator=generator, dtype=setting.dtype, device=self.device)
        layout = torch.channels_last if setting.channels_last else torch.contiguous_format
        streams = [torch.randn(n, *setting.shape[1:], **options).to(memory_format=layout) for n in num_rows]
        channels = setting.shape[self.channel_dim]
        # of the order of 1: LayerScale's usual 1e-5 would hide a wrong branch
        scales = [torch.rand(channels, **options) + 0.5 for _ in range(vectors + setting.gamma)]
        return tuple(t.requires_grad_() for t in (*streams, *scales))

    def along_channels(self, gamma: Tensor) -> Tensor:
        return gamma.view(-1, 1, 1) if self.channel_dim == 1 else gamma

    def scaled(self, branch: Tensor, gamma: Tensor | None) -> Tensor:
        return branch if gamma is None else branch * self.along_channels(gamma)


def with_rows(x: Tensor, rows: Tensor, update: Tensor) -> Tensor:
    """Returns `x` with `update` added to its `rows`."""
    return torch.index_put(x, (rows,), x[rows] + update)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
