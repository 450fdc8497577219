"""Ops on the rows that a branch runs on, and whole paths without their branches."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

import rdp_kernels as rdp
from rdp_kernels.kernels.autograd import FusedCall, fused_add
from rdp_kernels.kernels.dispatch import resolve
from rdp_kernels.kernels.spec import Add, NextInput, Operands

from . import op_bytes
from .op_bytes import Moved
from .op_kinds import EPS, Op, Tensors, layer_norm, with_rows


class ResidualAddRows(Op):
    """An update of K rows added to a residual of B rows, out of place."""

    name = "residual_add rows"
    compiled = "compiled index_add"

    @property
    def needed(self) -> Moved:
        return op_bytes.some_rows(self.batch, self.kept, self.setting.gamma)

    @property
    def compiled_moves(self) -> Moved:
        return op_bytes.compiled_some_rows(self.batch, self.kept, self.setting.gamma)

    def inputs(self, number: int) -> Tensors:
        return self.make(number, self.batch, self.kept, vectors=0)

    def eager(self, residual, branch, gamma=None):
        return (torch.index_add(residual, 0, self.rows, self.scaled(branch, gamma), alpha=self.scale),)

    def ours(self, residual, branch, gamma=None):
        return (rdp.residual_add(residual, branch, rows=self.rows, row_scale=self.scale, gamma=gamma),)

    def reference(self, residual, branch, gamma=None):
        return (with_rows(residual, self.rows, self.scale * self.scaled(branch, gamma)),)


class GatherRows(Op):
    name = "gather_rows"
    compiled = "compiled index_select"

    @property
    def needed(self) -> Moved:
        return op_bytes.gather(self.batch, self.kept)

    @property
    def compiled_moves(self) -> Moved:
        return op_bytes.compiled_gather(self.batch, self.kept)

    def inputs(self, number: int) -> Tensors:
        return self.make(number, self.batch, vectors=0)

    def eager(self, residual):
        return (residual.index_select(0, self.rows),)

    def ours(self, residual):
        return (rdp.gather_rows(residual, self.rows),)

    def reference(self, residual):
        return (residual[self.rows],)


class Path(Op):
    """A path without its branch: the gather of its rows, and the add of their update (given here) with γ. Out of place,
    as in `ResidualBranch`."""

    name = "path"
    compiled = "compiled subset"

    @property
    def needed(self) -> Moved:
        return op_bytes.chain(self.batch, self._rows(), self.setting.gamma)

    @property
    def compiled_moves(self) -> Moved:
        return op_bytes.compiled_chain(self.batch, self._rows(), self.setting.gamma)

    def _rows(self) -> list[list[int]]:
        return [rows.index.tolist() for rows in self.row_sets]

    def inputs(self, number: int) -> Tensors:
        paths = self.num_row_sets
        return self.make(number, self.batch, *[self.kept] * paths, vectors=(paths - 1) * self.setting.gamma)

    def paths(self, inputs: Sequence[Tensor]) -> list[tuple]:
        """Returns (rows, update, γ or None) of each path."""
        paths = self.num_row_sets
        branches, gammas = inputs[:paths], list(inputs[paths:]) or [None] * paths
        return list(zip(self.row_sets, branches, gammas, strict=True))

    def eager(self, x, *inputs):
        """Works in place from the second add on, as in the chain: the first sum isn't used elsewhere."""
        gathered = []
        for rows, branch, gamma in self.paths(inputs):
            add = torch.index_add if not gathered else Tensor.index_add_
            gathered.append(x.index_select(0, rows.index))
            x = add(x, 0, rows.index, self.scaled(branch, gamma), alpha=self.scale)
        return (*gathered, x)

    def ours(self, x, *inputs):
        kernels = resolve("path", Operands(x)).kernels
        return self._path_by_path(x, inputs) if kernels is None else self._chain(kernels, x, inputs)

    def _path_by_path(self, x: Tensor, inputs: Sequence[Tensor]) -> Tensors:
        gathered = []
        for rows, branch, gamma in self.paths(inputs):
            entered = fused_add("path", Operands(x), next_input=NextInput(rows))
            gathered.append(entered.next)
            x = fused_add("path", Operands(entered.out, branch, gamma=gamma), Add(rows, self.scale)).out
        return (*gathered, x)

    def _chain(self, kernels: ModuleType, x: Tensor, inputs: Sequence[Tensor]) -> Tensors:
        """The add of a path and the gather of the next path's rows are one fused call, as in `ResidualSequence`."""
        gathered, update, add, tail = [], Operands(), None, None
        for rows, branch, gamma in self.paths(inputs):
            tail = FusedCall(kernels, add, NextInput(rows), tail)
            results = tail(update._replace(residual=x))
            gathered.append(results.next)
            x, update, add = results.out, Operands(update=branch, gamma=gamma), Add(rows, self.scale)
        return (*gathered, FusedCall(kernels, add, None, tail)(update._replace(residual=x)).out)

    def reference(self, x, *inputs):
        gathered = []
        for rows, branch, gamma in self.paths(inputs):
            gathered.append(x[rows.index])
            x = with_rows(x, rows.index, self.scale * self.scaled(branch, gamma))
        return (*gathered, x)


class Chain(Path):
    """Three paths, in place on their own residual, as `ResidualSequence` runs them between its branches."""

    name = "chain of 3 paths"
    num_row_sets = 3


class ResidualAddNormRows(Op):
    """An update of K rows added, and the norm of the K rows that the next branch runs on."""

    name = "residual_add_norm rows"
    compiled = "compiled index ops"
    norm = True
    num_row_sets = 2

    @property
    def needed(self) -> Moved:
        return op_bytes.norm(self.batch, self.kept, self.kept, self.kept, self.setting.gamma)

    @property
    def compiled_moves(self) -> Moved:
        return op_bytes.compiled_norm_rows(self.batch, self.kept, self.kept, self.setting.gamma)

    def inputs(self, number: int) -> Tensors:
        return self.make(number, self.batch, self.kept, vectors=2)

    def eager(self, residual, branch, weight, bias, gamma=None):
        out = torch.index_add(residual, 0, self.rows, self.scaled(branch, gamma), alpha=self.scale)
        normed = F.layer_norm(out.index_select(0, self.row_sets[1].index), out.shape[-1:], weight, bias, EPS)
        return out, normed

    def ours(self, residual, branch, weight, bias, gamma=None):
        rows = {"rows": self.rows, "next_rows": self.row_sets[1].index}
        return rdp.residual_add_norm(
            residual, branch, weight, bias, row_scale=self.scale, gamma=gamma, eps=EPS, **rows
        )  # fmt: skip

    def reference(self, residual, branch, weight, bias, gamma=None):
        out = with_rows(residual, self.rows, self.scale * self.scaled(branch, gamma))
        return out, layer_norm(out[self.row_sets[1].index], weight, bias)
