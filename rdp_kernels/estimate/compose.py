"""What iterations cost, put together from the pieces of a model, for many plans at once.

A branch costs by the rows that it runs on and by its state. The rest runs forward always; backward, where it is frozen,
only from the first path on that learns.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from ..convert.calls import arguments_of, batch_size_of, described
from ..paths.freezing import FreezeBN
from ..plan import PathPlan
from .bench import Bench, Unmeasurable
from .pieces import Pieces, Quantity


@dataclass(frozen=True)
class Shares:
    """What an iteration does with each path, for many plans: float64 `[plans, paths]` shares of the rows on which the
    branch learns and is frozen.

    Args:
        rest_learns: whether the rest does.
        bypassed: gradients bypass what is frozen (`freeze="branch"`).
    """

    learning: Tensor
    frozen: Tensor
    rest_learns: bool = True
    bypassed: bool = False


@dataclass(frozen=True)
class ModelCost:
    """FLOPs, saved bytes and seconds of iterations of one model on one batch.

    Matmuls and convolutions count as FLOPs, as in `torch.utils.flop_counter`. Saved bytes are what autograd keeps
    between forward and backward, without parameters and buffers. A model whose calls don't feed on all calls before
    them (two towers side by side) is taken to need more gradients than it does.
    """

    pieces: Pieces
    batch_size: int

    @classmethod
    def of(cls, model: nn.Module, example_inputs: Any, *, freeze_bn: FreezeBN = True, timed: bool = False) -> ModelCost:
        """Measures a copy of `model` in training mode; the model, its gradients and statistics and torch's generators
        stay as they are.

        Args:
            model: with paths.
            example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, samples in dimension 0.
            freeze_bn: as of the scheme.
            timed: seconds too: each kind of branch runs forward and backward some forty times.

        Raises `ValueError` where the model can't be copied or run, or where it recomputes calls of its paths.
        """
        batch_size = batch_size_of(example_inputs)
        try:
            copied = copy.deepcopy(model)
        except Exception as error:
            raise ValueError(f"model can't be copied, which measuring it needs: {_told(error)}") from error
        if not model.training:
            copied.train()
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), arguments_of(example_inputs))
        devices = {t.device.index for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.is_cuda}
        with torch.random.fork_rng(devices=[d for d in devices if d is not None]), torch.enable_grad():
            try:
                return cls(Bench(copied, args, kwargs, freeze_bn).pieces(timed), batch_size)
            except Unmeasurable:
                raise
            except Exception as error:  # models raise what they like
                raise ValueError(
                    f"example_inputs: the model can't be run on {described(example_inputs)}: {_told(error)}"
                ) from error

    # Of one plan, given as the fraction of the rows that each path keeps

    def plain(self) -> float:
        """FLOPs of an ordinary training step."""
        return self.flops(self.plain_shares()).item()

    def drop(self, kept: Sequence[float]) -> float:
        """FLOPs of a drop iteration."""
        return self.flops(self.drop_shares(_rows(kept))).item()

    def reuse(self, kept: Sequence[float], freeze: str = "parameters", train_rest: bool = False) -> float:
        """FLOPs of its reuse iteration."""
        return self.flops(self.reuse_shares(_rows(kept), freeze, train_rest)).item()

    # Of many, float64 [plans, paths] in the place of fractions

    def plain_shares(self) -> Shares:
        ones = torch.ones(1, self.pieces.num_paths, dtype=torch.float64)
        return Shares(ones, torch.zeros_like(ones))

    def computed(self, kept: Tensor) -> Tensor:
        """Of the rows that drop iterations keep, the shares on which branches run: with BatchNorm on all or none."""
        whole = torch.zeros(self.pieces.num_paths, dtype=torch.bool)
        whole[self.pieces.path] = self.pieces.whole
        return torch.where(whole & (kept > 0), 1.0, kept)

    def drop_shares(self, computed: Tensor) -> Shares:
        return Shares(computed, torch.zeros_like(computed))

    def reuse_shares(self, kept: Tensor, freeze: str = "parameters", train_rest: bool = False) -> Shares:
        if freeze == "none":
            return Shares(torch.ones_like(kept), torch.zeros_like(kept))
        return Shares(1 - kept, kept, train_rest, freeze == "branch")

    def flops(self, shares: Shares) -> Tensor:
        """Float64 `[plans]`."""
        return self._sum(self.pieces.flops, shares)

    def seconds(self, shares: Shares) -> Tensor:
        """Float64 `[plans]`, of forward and backward; only where timed."""
        assert self.pieces.seconds is not None
        return self._sum(self.pieces.seconds, shares)

    def saved_bytes(self, shares: Shares) -> Tensor:
        """Float64 `[plans]`."""
        pieces, streams = self.pieces, self.pieces.streams
        learning, frozen, passes, after = self._states(shares)
        saves = {
            "learn": (learning, passes),
            "first": (learning, ~passes),
            "frozen": (frozen, passes & (not shares.bypassed)),
        }
        total = self._sum(pieces.saved, shares)
        alone, behind_learning = streams.by_rest[_kind(shares)]
        around = (torch.arange(len(streams.bytes)) + 1) // 2
        held = torch.where(after[:, around], behind_learning, alone).double()
        for state, (share, here) in saves.items():
            by_branch = streams.by_branch[state] & here
            held.index_add_(1, streams.entry, (by_branch & (share == 1)).double())
            # Some rows are gathered from the stream, into a tensor of their own.
            total += (by_branch * share * (share < 1) * streams.bytes[streams.entry]).sum(dim=1)
        held[:, 1::2] += streams.activation & (passes | ((learning > 0) & pieces.learns))
        for call in reversed(streams.passed_on.nonzero().flatten().tolist()):
            given = held[:, 2 * call + 1] * ((learning + frozen)[:, call] == 0)  # left out, it gives what it gets
            held[:, streams.entry[call]] += given
            held[:, 2 * call + 1] -= given
        return total + (held > 0).double() @ streams.bytes

    def branch_share(self) -> float:
        """Of a plain step's time, or of its FLOPs where not timed: what branches take."""
        quantity, shares = self.pieces.seconds or self.pieces.flops, self.plain_shares()
        nothing = Shares(torch.zeros_like(shares.learning), shares.frozen)
        return 1 - (self._sum(quantity, nothing) / self._sum(quantity, shares)).item()

    def _states(self, shares: Shares) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shares by call that learn and that are frozen; whether a gradient is wanted of each call's input; and by
        piece, whether a path before it learns."""
        pieces = self.pieces
        learning, frozen = shares.learning[:, pieces.path], shares.frozen[:, pieces.path]
        learned = ((learning > 0) & pieces.learns).cumsum(dim=1) > 0
        after = torch.cat([torch.zeros_like(learned[:, :1]), learned], dim=1)
        return learning, frozen, after[:, :-1] | pieces.follows[_kind(shares)], after

    def _sum(self, quantity: Quantity, shares: Shares) -> Tensor:
        learning, frozen, passes, after = self._states(shares)

        def part(share: Tensor, state: str) -> Tensor:
            whole, fixed = quantity.branch[state], quantity.fixed[state]
            return torch.where(share > 0, whole * share + fixed * (1 - share), 0.0)

        alone, behind_learning = quantity.rest[_kind(shares)]
        rest = torch.where(after, behind_learning, alone).sum(dim=1)
        branches = torch.where(passes, part(learning, "learn"), part(learning, "first"))
        branches += torch.where(passes & (not shares.bypassed), part(frozen, "frozen"), part(frozen, "still"))
        return quantity.forward + rest + branches.sum(dim=1)


def kept_fractions(plan: PathPlan) -> list[float]:
    """The share of the rows that each path keeps."""
    return plan.keep.view(plan.num_paths, -1).double().mean(dim=1).tolist()


def _rows(kept: Sequence[float]) -> Tensor:
    return torch.tensor([kept], dtype=torch.float64)


def _kind(shares: Shares) -> str:
    return "learns" if shares.rest_learns else "frozen"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
