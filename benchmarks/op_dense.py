"""Ops on whole batches, where a mask drops some samples."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F

import rdp_kernels as rdp

from . import op_bytes
from .op_bytes import Moved
from .op_kinds import EPS, Op, Tensors, layer_norm, rms_norm, with_rows


class ResidualAdd(Op):
    """`residual + drop_path(γ · update)` on whole batches. As in timm, drop-path multiplies by 0 or 1 / keep."""

    name = "residual_add"
    relu: ClassVar[bool] = False

    @property
    def needed(self) -> Moved:
        return self._moves(self.kept)

    @property
    def compiled_moves(self) -> Moved:
        return self._moves(self.batch)  # multiplying by a mask skips nothing

    def _moves(self, kept: int) -> Moved:
        if self.setting.kept is None and not self.setting.gamma:
            return op_bytes.unmasked(self.batch)
        return (op_bytes.dense_relu if self.relu else op_bytes.dense)(self.batch, kept, self.setting.gamma)

    def inputs(self, number: int) -> Tensors:
        residual, branch, *gamma = self.make(number, self.batch, self.batch, vectors=0)
        if self.relu:  # sums that aren't close to 0, where rounding decides the ReLU's gradient
            with torch.no_grad():
                residual += torch.where(residual < 0, -4, 4)
                branch.clamp_(-1, 1)
        return residual, branch, *gamma

    def eager(self, residual, branch, gamma=None):
        branch = self.scaled(branch, gamma)
        out = residual + (branch if self.setting.kept is None else branch * self.mask)
        return (out.relu() if self.relu else out,)

    def ours(self, residual, branch, gamma=None):
        row_scale = None if self.setting.kept is None else self.row_scale
        options = {"channel_dim": self.channel_dim, "activation": "relu" if self.relu else None}
        return (rdp.residual_add(residual, branch, row_scale=row_scale, gamma=gamma, **options),)

    def reference(self, residual, branch, gamma=None):
        out = with_rows(residual, self.rows, self.scale * self.scaled(branch, gamma)[self.rows])
        return (torch.where(out > 0, out, 0) if self.relu else out,)


class ResidualAddRelu(ResidualAdd):
    """The dense add with a ResNet's ReLU after the sum."""

    name = "residual_add relu"
    relu = True


class ResidualAddNorm(Op):
    """`out = residual + drop_path(γ · update)` and `layer_norm(out)`, on whole batches."""

    name = "residual_add_norm"
    norm = True

    @property
    def needed(self) -> Moved:
        return op_bytes.norm(self.batch, self.kept, self._dbranch, self.batch, self.setting.gamma)

    @property
    def compiled_moves(self) -> Moved:
        return op_bytes.norm(self.batch, self.batch, self._dbranch, self.batch, self.setting.gamma)

    @property
    def _dbranch(self) -> int:
        """Samples of dupdate. With neither mask nor γ it is 0, because dupdate is then dresidual."""
        return 0 if self.setting.kept is None and not self.setting.gamma else self.batch

    def inputs(self, number: int) -> Tensors:
        return self.make(number, self.batch, self.batch, vectors=2)

    def eager(self, residual, branch, weight, bias, gamma=None):
        out = self.add(residual, branch, gamma)
        return out, F.layer_norm(out, out.shape[-1:], weight, bias, EPS)

    def add(self, residual, branch, gamma=None):
        branch = self.scaled(branch, gamma)
        return residual + (branch if self.setting.kept is None else branch * self.mask)

    def ours(self, residual, branch, weight, bias, gamma=None):
        row_scale = None if self.setting.kept is None else self.row_scale
        return rdp.residual_add_norm(residual, branch, weight, bias, row_scale=row_scale, gamma=gamma, eps=EPS)

    def reference(self, residual, branch, weight, bias, gamma=None):
        out = with_rows(residual, self.rows, self.scale * self.scaled(branch, gamma)[self.rows])
        return out, layer_norm(out, weight, bias)


class ResidualAddRMSNorm(ResidualAddNorm):
    """The same with an RMSNorm, which has no bias. Without mask and γ it is the block of a language model."""

    name = "residual_add_norm rms"

    def inputs(self, number: int) -> Tensors:
        return self.make(number, self.batch, self.batch, vectors=1)

    def eager(self, residual, branch, weight, gamma=None):
        out = self.add(residual, branch, gamma)
        return out, F.rms_norm(out, out.shape[-1:], weight, EPS)

    def ours(self, residual, branch, weight, gamma=None):
        row_scale = None if self.setting.kept is None else self.row_scale
        options = {"row_scale": row_scale, "gamma": gamma, "norm": "rms", "eps": EPS}
        return rdp.residual_add_norm(residual, branch, weight, **options)

    def reference(self, residual, branch, weight, gamma=None):
        out = with_rows(residual, self.rows, self.scale * self.scaled(branch, gamma)[self.rows])
        return out, rms_norm(out, weight)
