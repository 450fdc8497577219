"""Computes what iterations cost from the pieces of a model, for many plans at once.

The cost of a branch depends on the rows that it runs on and on its state. The rest always runs forward. If it is
frozen, it runs backward only from the first path that learns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from .._utils.example_inputs import arguments_of, batch_size_of, described
from ..paths.freezing import FreezeBN, tensors_of
from ..plan import PathPlan
from .bench import Bench, Unmeasurable
from .pieces import PieceCosts, Quantity


@dataclass(frozen=True)
class Shares:
    """The fractions of rows on which each path learns or is frozen, for many plans.

    Attributes:
        learning: float64 `[plans, paths]`, the fraction of the rows on which the branch learns.
        frozen: float64 `[plans, paths]`, the fraction of the rows on which the branch is frozen.
        rest_learns: whether the rest learns.
        bypassed: whether no gradient passes through frozen branches (`freeze="branch"`).

    Example:
        >>> from rdp_kernels.estimate import ModelCost
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(2)]
        >>> model = nn.Sequential(*branches)
        >>> cost = ModelCost.of(model, torch.randn(4, 8))
        >>> kept = torch.tensor([[1.0, 0.0]], dtype=torch.float64)  # one plan, which drops path 1
        >>> shares = cost.reuse_shares(kept)
        >>> shares.learning.tolist(), shares.frozen.tolist(), shares.rest_learns
        ([[0.0, 1.0]], [[1.0, 0.0]], False)
    """

    learning: Tensor
    frozen: Tensor
    rest_learns: bool = True
    bypassed: bool = False

    @property
    def rest_state(self) -> str:
        """`"learning"` or `"frozen"`."""
        return "learning" if self.rest_learns else "frozen"


@dataclass(frozen=True)
class ModelCost:
    """Computes what iterations of a model cost in FLOPs, saved bytes and seconds.

    `ModelCost.of` measures the model. FLOPs are those of matmuls and convolutions, as `torch.utils.flop_counter` counts
    them. Saved bytes are what autograd keeps between forward and backward, without parameters and buffers.

    Each call of a path is assumed to depend on all calls before it. In a model with two towers side by side this isn't
    so, and costs are overestimated.

    Attributes:
        pieces: the measured costs of each call of a path and of the rest between calls.
        batch_size: the number of samples in the batch.

    Example:
        >>> from rdp_kernels.estimate import ModelCost
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(2)]
        >>> model = nn.Sequential(*branches)
        >>> cost = ModelCost.of(model, torch.randn(4, 8))
        >>> cost.plain()  # FLOPs of a plain training step
        2560.0
        >>> cost.drop([1.0, 0.0]), cost.reuse([1.0, 0.0])  # if path 1 is dropped
        (1024.0, 1536.0)
    """

    pieces: PieceCosts
    batch_size: int

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, *, freeze_bn: FreezeBN = True, timed: bool = False) -> ModelCost:
        """Measures a copy of `model` in training mode.

        The model, its gradients and statistics and torch's generators don't change.

        Args:
            model: a model with paths.
            example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, with samples in dimension 0.
            freeze_bn: the scheme's option.
            timed: whether to measure seconds too. Each kind of branch then runs forward and backward some forty times.

        Returns:
            The costs.

        Raises:
            ValueError: if the model can't be copied, can't run on `example_inputs`, or recomputes calls of its paths.
        """
        batch_size = batch_size_of(example_inputs)
        try:
            copied = copy.deepcopy(model)
        except Exception as error:
            raise ValueError(f"model can't be copied, which measuring it needs: {_told(error)}") from error
        if not model.training:
            copied.train()
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), arguments_of(example_inputs))
        devices = {t.device for t in tensors_of((args, kwargs)) if t.is_cuda}
        with torch.random.fork_rng(devices=devices), torch.enable_grad():
            try:
                return cls(Bench(copied, args, kwargs, freeze_bn).costs(timed), batch_size)
            except Unmeasurable:
                raise
            except Exception as error:  # a model may raise any exception
                raise ValueError(
                    f"example_inputs: the model can't be run on {described(example_inputs)}: {_told(error)}"
                ) from error

    # One plan: the fraction of the rows that each path keeps

    def plain(self) -> float:
        """FLOPs of a plain training step.

        Returns:
            The FLOPs of forward and backward.
        """
        return self.flops(self.plain_shares()).item()

    def drop(self, kept: Sequence[float]) -> float:
        """FLOPs of a drop iteration.

        Args:
            kept: for each path, the fraction of the rows that the plan keeps, from 0 to 1. See `kept_fractions`.

        Returns:
            The FLOPs of forward and backward.
        """
        return self.flops(self.drop_shares(_rows(kept))).item()

    def reuse(self, kept: Sequence[float], freeze: str = "parameters", train_rest: bool = False) -> float:
        """FLOPs of a reuse iteration.

        Args:
            kept: for each path, the fraction of the rows that the drop iteration kept, from 0 to 1.
            freeze: the scheme's option.
            train_rest: the scheme's option.

        Returns:
            The FLOPs of forward and backward.
        """
        return self.flops(self.reuse_shares(_rows(kept), freeze, train_rest)).item()

    # Many plans: float64 [plans, paths]

    def plain_shares(self) -> Shares:
        """The shares of a plain training step, in which every path learns on all rows.

        Returns:
            The shares of one plan.
        """
        return self.drop_shares(torch.ones(1, self.pieces.num_paths, dtype=torch.float64))

    def computed(self, kept: Tensor) -> Tensor:
        """The fractions of the rows on which branches run in a drop iteration.

        A branch with BatchNorm runs on all rows if any row is kept. Other branches run on the kept rows.

        Args:
            kept: float64 `[plans, paths]`, the fraction of the rows that each path keeps.

        Returns:
            float64 `[plans, paths]`.
        """
        whole = torch.zeros(self.pieces.num_paths, dtype=torch.bool)
        whole[self.pieces.path] = self.pieces.whole
        return torch.where(whole & (kept > 0), 1.0, kept)

    def drop_shares(self, computed: Tensor) -> Shares:
        """The shares of a drop iteration.

        Args:
            computed: float64 `[plans, paths]`, the fraction of the rows on which each branch runs. See `computed`.

        Returns:
            The shares for these plans. What runs learns, and nothing is frozen.
        """
        return Shares(computed, torch.zeros_like(computed))

    def reuse_shares(self, kept: Tensor, freeze: str = "parameters", train_rest: bool = False) -> Shares:
        """The shares of a reuse iteration.

        Args:
            kept: float64 `[plans, paths]`, the fraction of the rows that the drop iteration kept.
            freeze: the scheme's option.
            train_rest: the scheme's option.

        Returns:
            The shares for these plans. Paths learn on the rows that weren't kept. With `freeze="none"` they learn on
            all rows.
        """
        if freeze == "none":
            return self.drop_shares(torch.ones_like(kept))
        return Shares(1 - kept, kept, train_rest, freeze == "branch")

    def flops(self, shares: Shares) -> Tensor:
        """FLOPs of iterations.

        Args:
            shares: what the iterations do with each path.

        Returns:
            float64 `[plans]`.
        """
        return self._sum(self.pieces.flops, shares)

    def seconds(self, shares: Shares) -> Tensor:
        """Seconds of forward and backward. They have to be measured, with `timed=True`.

        Args:
            shares: what the iterations do with each path.

        Returns:
            float64 `[plans]`.
        """
        assert self.pieces.seconds is not None
        return self._sum(self.pieces.seconds, shares)

    def saved_bytes(self, shares: Shares) -> Tensor:
        """Bytes that autograd saves in iterations.

        Args:
            shares: what the iterations do with each path.

        Returns:
            float64 `[plans]`.
        """
        pieces, tensors = self.pieces, self.pieces.boundaries
        learning, frozen, passes, after = self._states(shares)
        saves = {
            "learning": (learning, passes),
            "learning_first": (learning, ~passes),
            "frozen": (frozen, passes & (not shares.bypassed)),
        }
        total = self._sum(pieces.saved, shares)
        alone, behind_learning = tensors.by_rest[shares.rest_state]
        around = (torch.arange(len(tensors.bytes)) + 1) // 2
        held = torch.where(after[:, around], behind_learning, alone).double()  # [plans, tensors], saved where > 0
        for state, (share, here) in saves.items():
            by_branch = tensors.by_branch[state] & here
            held.index_add_(1, tensors.input_index, (by_branch & (share == 1)).double())
            # A branch that runs on some rows saves these rows in a tensor of its own.
            total += (by_branch * share * (share < 1) * tensors.bytes[tensors.input_index]).sum(dim=1)
        held[:, 1::2] += tensors.has_activation & (passes | ((learning > 0) & pieces.learns))
        for call in reversed(tensors.returns_input.nonzero().flatten().tolist()):
            moved = held[:, 2 * call + 1] * ((learning + frozen)[:, call] == 0)  # without its branch, output is input
            held[:, tensors.input_index[call]] += moved
            held[:, 2 * call + 1] -= moved
        return total + (held > 0).double() @ tensors.bytes

    def branch_share(self) -> float:
        """The part of a plain training step that branches take.

        Returns:
            The part of its time, or of its FLOPs if time wasn't measured. From 0 to 1.
        """
        quantity, shares = self.pieces.seconds or self.pieces.flops, self.plain_shares()
        nothing = Shares(torch.zeros_like(shares.learning), shares.frozen)
        return 1 - (self._sum(quantity, nothing) / self._sum(quantity, shares)).item()

    def _states(self, shares: Shares) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns four tensors. The first two are the fractions of the rows on which each call learns and is frozen.
        The third says whether each call's input needs a gradient. The fourth says whether a path before each piece
        of the rest learns.
        """
        pieces = self.pieces
        learning, frozen = shares.learning[:, pieces.path], shares.frozen[:, pieces.path]
        learned = ((learning > 0) & pieces.learns).cumsum(dim=1) > 0
        after = torch.cat([torch.zeros_like(learned[:, :1]), learned], dim=1)
        return learning, frozen, after[:, :-1] | pieces.input_needs_grad[shares.rest_state], after

    def _sum(self, quantity: Quantity, shares: Shares) -> Tensor:
        learning, frozen, passes, after = self._states(shares)

        def part(share: Tensor, state: str) -> Tensor:
            whole, fixed = quantity.branch[state], quantity.fixed[state]
            return torch.where(share > 0, whole * share + fixed * (1 - share), 0.0)

        alone, behind_learning = quantity.rest[shares.rest_state]
        rest = torch.where(after, behind_learning, alone).sum(dim=1)
        branches = torch.where(passes, part(learning, "learning"), part(learning, "learning_first"))
        branches += torch.where(passes & (not shares.bypassed), part(frozen, "frozen"), part(frozen, "detached"))
        return quantity.forward + rest + branches.sum(dim=1)


def kept_fractions(plan: PathPlan) -> list[float]:
    """The fraction of the rows that each path keeps in a plan.

    Args:
        plan: a plan of either mode.

    Returns:
        For each path a number from 0 to 1. In block mode it is 0 or 1.

    Example:
        >>> from rdp_kernels.estimate import kept_fractions
        >>> keep = torch.tensor([[True, True], [True, False]])
        >>> plan = rdp.PathPlan(keep, drop_probs=[0.1, 0.5], mode="sample")
        >>> kept_fractions(plan)
        [1.0, 0.5]
    """
    return plan.keep.view(plan.num_paths, -1).double().mean(dim=1).tolist()


def _rows(kept: Sequence[float]) -> Tensor:
    return torch.tensor([kept], dtype=torch.float64)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
