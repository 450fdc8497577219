"""Networks of tiny paths, which compute almost nothing, and the ways to run a pair of iterations on them. Their time is
host time."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rdp_kernels as rdp
from examples.methods import nothing_runs
from rdp_kernels.plan import draw_keep, plan_generator

from .cases import SEED
from .harness import Case, Check, Provider, Row
from .pairs import Exact, Plain
from .textbook import largest_difference, state_after

DROP_PROB, BATCH, WIDTH = 0.3, 10, 2  # sample mode keeps 7 of 10 rows of every path
BOUND = 1e-10
PLAIN, BY_HAND, PLAN, OURS = Plain.name, "by hand", "plan", Exact.name


Branch = Callable[[Tensor], Tensor]


class Tiny(nn.Module):
    """Computes `x · weight`: one op in the forward, one in the backward. It has as many modules as an MLP and its
    norm."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.others = nn.ModuleList(nn.Identity() for _ in range(3))
        self.weight = nn.Parameter(torch.full((width,), 1e-3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

    def constant(self, x: Tensor) -> Tensor:
        return x * self.weight.detach()


def tiny_paths(count: int, width: int = WIDTH, normed: bool = False) -> rdp.ResidualSequence:
    norms = (nn.LayerNorm(width) if normed else None for _ in range(count))
    return rdp.ResidualSequence(*(rdp.ResidualBranch(Tiny(width), norm=norm) for norm in norms))


@dataclass(frozen=True)
class ByHand:
    """The iterations of one plan, written for this plan alone: all decisions are made beforehand."""

    x: Tensor
    branches: list[Branch]
    constants: list[Branch]
    """The branches without gradients to their parameters."""
    keep: list[Tensor | bool]
    """For each path: whether it is kept, or in sample mode its kept rows and its dropped rows."""

    @classmethod
    def of(cls, paths: nn.Sequential, x: Tensor, plan: rdp.PathPlan) -> ByHand:
        kept = [_rows(keep, x.device) if keep.dim() else bool(keep) for keep in plan.keep]
        return cls(x, [_branch(path) for path in paths], [_constant(path) for path in paths], kept)

    def pair(self) -> Iterator[None]:
        self.drop()
        yield
        self.reuse()
        yield

    def drop(self) -> None:
        x, scale = self.x, 1 / (1 - DROP_PROB)
        for branch, keep in zip(self.branches, self.keep, strict=True):
            if keep is True:
                x = torch.add(x, branch(x), alpha=scale)
            elif keep is not False:
                x = x.index_add(0, keep[0], branch(x.index_select(0, keep[0])), alpha=scale)
        x.sum().backward()

    def reuse(self) -> None:
        x = self.x
        for branch, constant, keep in zip(self.branches, self.constants, self.keep, strict=True):
            if isinstance(keep, bool):
                x = x + (constant(x) if keep else branch(x))
            else:
                frozen, learning = (x.index_select(0, rows) for rows in keep)
                x = x.index_add(0, keep[0], constant(frozen)).index_add(0, keep[1], branch(learning))
        x.sum().backward()


def _branch(path: rdp.ResidualBranch) -> Branch:
    fn, norm = path.fn, path.norm
    return fn if norm is None else lambda x: fn(norm(x))


def _constant(path: rdp.ResidualBranch) -> Branch:
    fn, norm = path.fn, path.norm
    if norm is None:
        return fn.constant
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return lambda x: fn.constant(F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps))


def _rows(keep: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    return keep.nonzero().flatten().to(device), (~keep).nonzero().flatten().to(device)


class Ways:
    """The ways to run a pair on `count` paths, each on its own network.

    Args:
        turns: the number of plans.
        make: makes the network.
        sample: the shape of a sample.
    """

    def __init__(
        self,
        mode: str,
        count: int,
        turns: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        make: Callable[[int], nn.Sequential] = tiny_paths,
        sample: tuple[int, ...] = (WIDTH,),
    ):
        generator = torch.Generator().manual_seed(SEED)
        self.x = torch.randn(BATCH, *sample, generator=generator, dtype=dtype).to(device)
        self.plain_paths, self.paths = (make(count).to(device, dtype) for _ in range(2))
        self.scheme = rdp.ResidualDropPath(self.paths, DROP_PROB, mode=mode, sampling="fixed", seed=SEED)
        with nothing_runs():  # the plan alone is measured too; the scheme warns once that no path ran
            list(self.scheme.iterations(BATCH))
        rates = [DROP_PROB] * count
        keeps = [draw_keep(rates, mode, "fixed", plan_generator(SEED, turn), [BATCH]) for turn in range(turns)]
        self.plans = [rdp.PathPlan(keep, rates, mode) for keep in keeps]
        self._by_hand = [ByHand.of(self.plain_paths, self.x, plan) for plan in self.plans]

    def plain(self) -> Iterator[None]:
        for _ in range(2):
            x = self.x
            for path in self.plain_paths:
                x = x + path.fn(x)
            x.sum().backward()
            yield

    def by_hand(self, turn: int) -> Iterator[None]:
        return self._by_hand[turn % len(self.plans)].pair()

    def ours(self, plan: rdp.PathPlan | None = None) -> Iterator[None]:
        """Runs the pair of `plan`, or of a drawn plan."""
        for _ in self.scheme.iterations(BATCH, plan=plan):
            self.paths(self.x).sum().backward()
            yield

    def iteration(self, phase: str) -> None:
        """Runs the drop or the reuse iteration of the first plan. A reuse iteration follows a drop iteration in which
        nothing runs."""
        with self.scheme.drop_iteration(plan=self.plans[0]):
            if phase == "drop":
                self.paths(self.x).sum().backward()
        if phase == "reuse":
            with self.scheme.reuse_iteration():
                self.paths(self.x).sum().backward()

    def iteration_by_hand(self, phase: str) -> None:
        by_hand = self._by_hand[0]
        by_hand.drop() if phase == "drop" else by_hand.reuse()

    def verify(self, name: str) -> Check:
        """Compares gradients after each backward: by hand with ours, and plain with ours in eval mode."""
        plan = self.plans[0]
        if name == PLAIN:
            wanted, got = state_after(self.paths.eval(), self._inferred()), state_after(self.plain_paths, self.plain())
            self.paths.train()
        elif name == PLAN:
            return Check(0.0 if list(self.scheme.iterations(BATCH)) == ["drop", "reuse"] else math.inf, BOUND)
        else:
            wanted = state_after(self.plain_paths, self.by_hand(0))
            got = state_after(self.paths, self.ours(plan))
        return Check(largest_difference(wanted, got), BOUND)

    def _inferred(self) -> Iterator[None]:
        for _ in range(2):
            self.paths(self.x).sum().backward()
            yield


def path_case(mode: str, count: int, turns: int, kind: str) -> Case:
    """Returns a case. A turn is a pair of iterations on `count` paths."""
    device = torch.device(kind)
    ways = Ways(mode, count, turns, device)
    runs: dict[str, Callable[[int], Iterable[object]]] = {
        PLAIN: lambda turn: ways.plain(),
        BY_HAND: ways.by_hand,
        PLAN: lambda turn: ways.scheme.iterations(BATCH),
        OURS: lambda turn: ways.ours(),
    }

    def provider(name: str) -> Provider:
        def run(turn: int) -> None:
            for _ in runs[name](turn):
                for path in ways.paths if name in (OURS, PLAN) else ways.plain_paths:
                    path.fn.weight.grad = None

        return Provider(name, run, verify=lambda: Ways(mode, count, 1, device, torch.float64).verify(name))

    labels = {"network": "tiny", "depth": None, "width": WIDTH, "batch": BATCH, "paths": count, "mode": mode}
    return Case(labels, "pair of iterations", PLAIN, [provider(name) for name in runs])


def calls_of(provider: Provider) -> Row:
    """Returns the number of function calls in a turn."""
    return {"calls": count_calls(lambda: provider.run(0))}


def count_calls(run: Callable[[], object]) -> int:
    """Counts the function calls of `run()`: those of Python functions, and those from Python to C."""
    count = 0

    def called(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    gc.disable()  # finalisers would be counted too
    sys.setprofile(called)
    try:
        run()
    finally:
        sys.setprofile(before)
        gc.enable()
    return count
