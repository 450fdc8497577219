"""An open iteration: a plan, a phase, and the decision that follows for each call of each path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ._device import to_device
from .frozen import Place
from .paths import Decision, Path, places_of
from .plan import PathPlan, kept_scale
from .rows import RowSet, orders_of


@dataclass(frozen=True)
class Rules:
    """The options of a scheme that decide how a plan is carried out."""

    freeze: str
    scale_by_keep: bool
    train_rest: bool
    freeze_bn: bool

    @property
    def freezes_rest(self) -> bool:
        return self.freeze != "none" and not self.train_rest


@dataclass
class Iteration:
    """One drop or reuse iteration.

    `forwards` holds, in sample mode, the batch size of each forward in order; a single entry serves any number of
    forwards of that size.
    """

    phase: str
    plan: PathPlan
    paths: Sequence[Path]
    rules: Rules
    forwards: tuple[int, ...] = ()
    thaw: Sequence[tuple[Place, ...]] = ()
    """For each path its parameters that the frozen rest shares."""
    first_node: int = field(default_factory=torch._C._autograd._get_sequence_nr)
    last_node: float = float("inf")
    """The iteration's autograd nodes have sequence numbers in [first_node, last_node)."""

    def __post_init__(self) -> None:
        self.begun = False
        self._without_grad: set[int] = set()
        self._with_grad: set[int] = set()
        self._calls = [0] * self.plan.num_paths
        self._orders: dict[tuple[int, torch.device], Tensor] = {}
        learns = self.plan.keep if self.phase == "drop" else ~self.plan.keep
        if self.phase == "reuse" and self.rules.freeze == "none":
            learns = torch.ones_like(learns)
        self._learns = learns
        self._anywhere: Tensor | None = None
        self._decide_for_all_rows()

    def join(self, kept: Tensor, dropped: Tensor) -> None:
        """For sample mode on several ranks, which draw apart: bool [paths] each, whether any rank keeps, or drops, any
        sample of a path.

        The parameters of a path that learns on some rank then get a gradient on all, zeros where none of its rows
        learns: ranks have the same gradients to average, and each a loss to go backward from. Before any forward.
        """
        self._anywhere = torch.stack([kept, dropped])
        self._decide_for_all_rows()

    def _decide_for_all_rows(self) -> None:
        """What holds for every row of a path; a path in block mode never mixes."""
        flags = (self._learns if self.plan.mode == "block" else self._learns.any(dim=1)).tolist()
        self._zeros = self._learns_elsewhere()
        self._uniform = [self._whole(path, bool(flag)) for path, flag in enumerate(flags)]

    def _learns_elsewhere(self) -> list[tuple[Place, ...]]:
        """For each path the parameters that get zeros from a call in which no row of it learns: those that learn in
        another of several forwards or on another rank. A forward in which nothing learns has a backward then."""
        if self._anywhere is not None:
            learns = self._learns_anywhere()
        elif self.plan.mode == "sample" and len(self.forwards) > 1:
            learns = self._learns.any(dim=1)
        else:
            return [()] * len(self.paths)
        return [
            tuple(place for place in places_of(path.module) if flag and trainable(place))
            for path, flag in zip(self.paths, learns.tolist(), strict=True)
        ]

    def _learns_anywhere(self) -> Tensor:
        """bool [paths]: whether any sample of any rank learns; what may be so, where `join` hasn't told."""
        learns = self._learns if self.plan.mode == "block" else self._learns.any(dim=1)
        if self._anywhere is not None:
            everything = self.phase == "reuse" and self.rules.freeze == "none"
            kept, dropped = self._anywhere
            return torch.ones_like(learns) if everything else kept if self.phase == "drop" else dropped
        if self.plan.mode == "sample":
            never = 1.0 if self.phase == "drop" else 0.0
            learns = learns | (torch.tensor(self.plan.drop_probs) != never)
        return learns

    @property
    def dropped_paths(self) -> list[int]:
        """Indices of the paths that are dropped for at least one sample, of any rank where `join` has told."""
        return self.plan.dropped_paths if self._anywhere is None else self._anywhere[1].nonzero().flatten().tolist()

    def decide(self, index: int, x: Tensor, recomputing: bool) -> Decision:
        """The decision for a call of path `index` on `x`. Raises `ValueError` for a batch that doesn't fit the plan."""
        self.begun = True
        if self.phase == "reuse":
            self._note_grad_mode(index)
        if "block" in (self.plan.mode, self.paths[index].module.mode):
            return self._uniform[index]
        forward = self._count_forward(index, recomputing)
        size = self.forwards[forward]
        if x.shape[0] != size:
            raise ValueError(
                f"path {self.paths[index].name!r} got {x.shape[0]} rows where this iteration's forward {forward} has "
                f"batch_size {size}; if its rows are not the samples (windows, patches), give its branch mode='block'"
            )
        start = sum(self.forwards[:forward])
        learns = self._learns[index, start : start + size]
        count = int(learns.sum())
        if count in (0, size):
            return self._whole(index, count > 0)
        order, inverse = self._order(forward, start, size, x.device)[:, index]
        # In a drop iteration the dropped rows, behind the others in the order, have no branch.
        rows = RowSet(order[:count] if self.phase == "drop" else order, count, inverse)
        return self._decision(index, rows=rows)

    def learning_paths(self) -> list[Path]:
        """Those that learn, paths in eval mode among them, which no plan is for; where ranks draw apart, in sample
        mode, those that may learn on any of them."""
        learns = self._learns_anywhere().tolist()
        return [path for path, flag in zip(self.paths, learns, strict=True) if flag or not path.module.training]

    def close(self) -> None:
        self.last_node = torch._C._autograd._get_sequence_nr()
        self._orders.clear()  # made again should a checkpoint ask

    def check_complete(self) -> None:
        """Raises `RuntimeError` where a path ran in some of the announced forwards but not in all of them, and where
        paths that learn ran without grad only, among others that ran with it."""
        learns = self._learns if self.plan.mode == "block" else self._learns.any(dim=1)
        ran_without = [self.paths[i] for i in sorted(self._without_grad - self._with_grad) if learns[i]]
        lost = [path for path in ran_without if any(p.requires_grad for p in path.parameters())]
        if lost and self._with_grad:
            raise RuntimeError(
                f"path {lost[0].name!r} learns in this reuse iteration, but ran without grad only: "
                "reentrant checkpointing gives no gradient where its input requires none, and the frozen rest's output "
                "requires none. Use use_reentrant=False, or let the rest learn with train_rest=True"
            )
        for path, calls in zip(self.paths, self._calls, strict=True):
            if calls not in (0, len(self.forwards)) and len(self.forwards) > 1:
                raise RuntimeError(
                    f"the {self.phase} iteration was opened for {len(self.forwards)} forwards "
                    f"(batch_size={list(self.forwards)}), but path {path.name!r} ran in {calls}"
                )

    def _note_grad_mode(self, index: int) -> None:
        (self._with_grad if torch.is_grad_enabled() else self._without_grad).add(index)

    def _count_forward(self, index: int, recomputing: bool) -> int:
        """Which of the announced forwards this call belongs to: every path counts its own calls."""
        if len(self.forwards) == 1:
            return 0
        if recomputing:
            raise RuntimeError(
                f"path {self.paths[index].name!r} is recomputed by checkpointing, and which of the "
                f"{len(self.forwards)} forwards of this sample-mode iteration is meant can't be told: use "
                "mode='block', or no checkpointing"
            )
        forward = self._calls[index]
        if forward == len(self.forwards):
            raise ValueError(
                f"path {self.paths[index].name!r} was called more than {forward} times in an iteration that was opened "
                f"with batch_size={list(self.forwards)}, an entry a forward"
            )
        self._calls[index] += 1
        return forward

    def _whole(self, index: int, learns: bool) -> Decision:
        return self._decision(index, learns, not learns and self.phase == "reuse")

    def _decision(
        self, index: int, learning: bool = False, frozen: bool = False, rows: RowSet | None = None
    ) -> Decision:
        scale = kept_scale(self.plan.drop_probs[index], self.rules.scale_by_keep) if self.phase == "drop" else 1.0
        thaw = self.thaw[index] if self.thaw else ()
        zeros = () if learning or rows is not None else self._zeros[index]
        return Decision(learning, frozen, rows, scale, self.rules.freeze, self.rules.freeze_bn, thaw, zeros)

    def _order(self, forward: int, start: int, size: int, device: torch.device) -> Tensor:
        """int64 [2, paths, batch] on `device`: each path's learning rows, then the others, and where each row stands.

        One copy for each forward and device: the rows of all paths travel together.
        """
        key = (forward, device)
        if key not in self._orders:
            learns = self._learns[:, start : start + size]
            self._orders[key] = to_device(orders_of(learns), device)
        return self._orders[key]


def trainable(place: Place) -> bool:
    module, name = place
    parameter = module._parameters[name]
    return parameter is not None and parameter.requires_grad


def check_plan(plan: object, paths: Sequence[Path], mode: str, forwards: tuple[int, ...], rules: Rules) -> None:
    """Raises `TypeError` or `ValueError` where `plan` can't be carried out on `paths`."""
    if not isinstance(plan, PathPlan):
        raise TypeError(f"plan must be a PathPlan, got {type(plan).__name__}")
    if (plan.mode, plan.num_paths) != (mode, len(paths)):
        raise ValueError(
            f"plan must be of mode {mode!r} with {len(paths)} paths, got mode {plan.mode!r} with {plan.num_paths}"
        )
    if mode == "sample" and sum(forwards) != plan.batch_size:
        raise ValueError(f"plan must be for batch_size {list(forwards)}, got one for {plan.batch_size} samples")
    for path, keep, drop_prob in zip(paths, plan.keep, plan.drop_probs, strict=True):
        if rules.scale_by_keep and drop_prob == 1 and keep.any():
            raise ValueError(f"plan keeps path {path.name!r} at drop_prob 1, where its scale 1 / (1 − p) is infinite")
        if path.module.mode == "block" and keep.any() and not keep.all():
            raise ValueError(
                f"plan mixes samples for path {path.name!r}, which mode='block' decides for the whole batch"
            )
