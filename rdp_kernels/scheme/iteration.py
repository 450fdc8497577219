"""An open iteration: a plan, a phase, and the decision that follows for each call of each path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from .._utils.device import to_device
from ..kernels.spec import RowSet, orders_of
from ..paths.freezing import FreezeBN, ParameterRef
from ..paths.path import Decision, Path
from ..plan import PathPlan, kept_scale


@dataclass(frozen=True)
class Rules:
    """The options of a scheme that decide how a plan is carried out."""

    freeze: str
    scale_by_keep: bool
    train_rest: bool
    freeze_bn: FreezeBN

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
    also_learns: Sequence[tuple[ParameterRef, ...]] = ()
    """For each path its parameters that the frozen rest shares."""
    modules: Sequence[Sequence[nn.Module]] = ()
    """For each path those of its branch."""
    first_node: int = field(default_factory=torch._C._autograd._get_sequence_nr)
    last_node: float = float("inf")
    """The iteration's autograd nodes have sequence numbers in [first_node, last_node)."""

    def __post_init__(self) -> None:
        self._ran = [False] * self.plan.num_paths
        self._without_grad: set[int] = set()
        self._with_grad: set[int] = set()
        self._calls = [0] * self.plan.num_paths
        self._orders: dict[tuple[int, torch.device], Tensor] = {}
        learns = self.plan.keep if self.phase == "drop" else ~self.plan.keep
        if self.phase == "reuse" and self.rules.freeze == "none":
            learns = torch.ones_like(learns)
        self._learns = learns
        sample = self.plan.mode == "sample"
        self._num_learning = [part.sum(dim=1).tolist() for part in learns.split(self.forwards, dim=1)] if sample else []
        """By forward and path: how many rows learn."""
        self._presence: Tensor | None = None  # on any rank
        several = sample and len(self.forwards) > 1
        self._dummy_calls = self._dummy_calls_among(self.presence()) if several else {}
        self.look_up(self.also_learns, self.modules)

    def look_up(self, also_learns: Sequence[tuple[ParameterRef, ...]], modules: Sequence[Sequence[nn.Module]]) -> None:
        """`also_learns` and `modules` as they are now."""
        self.also_learns, self.modules = also_learns, modules
        flags = (self._learns if self.plan.mode == "block" else self._learns.any(dim=1)).tolist()
        # What holds for every row of a path; a path in block mode never mixes.
        self._uniform = [self._whole(path, bool(flag)) for path, flag in enumerate(flags)]

    def decide(self, index: int, x: Tensor, recomputing: bool) -> Decision:
        """The decision for a call of path `index` on `x`. Raises `ValueError` for a batch that doesn't fit the plan."""
        self._ran[index] = True
        if self.phase == "reuse":
            self._note_grad_mode(index)
        if self.plan.mode == "block":
            return self._uniform[index]
        if self.paths[index].module.mode == "block":
            return self._among_ranks(self._uniform[index], index, 0)
        forward = self._count_forward(index, recomputing)
        size = self.forwards[forward]
        if x.shape[0] != size:
            raise ValueError(
                f"path {self.paths[index].name!r} got {x.shape[0]} rows where this iteration's forward {forward} has "
                f"batch_size {size}; if its rows are not the samples (windows, patches), give its branch mode='block'"
            )
        start = sum(self.forwards[:forward])
        count = self._num_learning[forward][index]
        if count in (0, size):
            return self._among_ranks(self._whole(index, count > 0), index, forward)
        order, inverse = self._order(forward, start, size, x.device)[:, index]
        # In a drop iteration the dropped rows, behind the others in the order, have no branch.
        rows = RowSet(order[:count] if self.phase == "drop" else order, count, inverse)
        return self._decision(index, rows=rows)

    def graph_masks(self) -> Tensor:
        """Float64 `[2, paths]` or `[2, paths, batch]`: what the plan multiplies branches by in a whole forward, where
        they learn and where they are frozen. Counts as a forward."""
        self._ran = [True] * len(self.paths)
        learns = self._learns
        if self.forwards:
            forward = self._count_forward(0, recomputing=False)
            start = sum(self.forwards[:forward])
            learns = learns[:, start : start + self.forwards[forward]]
        scales = [self._whole(index, True).scale for index in range(len(self.paths))]
        scale = torch.tensor(scales, dtype=torch.float64).view([-1] + [1] * (learns.dim() - 1))
        frozen = ~learns if self.phase == "reuse" else torch.zeros_like(learns)
        return torch.stack([torch.where(learns, scale, 0.0), frozen.double()])

    @property
    def begun(self) -> bool:
        """Whether a path ran in it, in training mode."""
        return any(self._ran)

    def learns(self, index: int) -> bool:
        """Whether path `index` learns, of any row of this process."""
        return self._uniform[index].learning

    @property
    def mode(self) -> str:
        return self.plan.mode

    def paths_that_learn(self) -> Iterator[Path]:
        """Those of which any row of this process learns, and those in eval mode."""
        return (path for path in self.paths if self.learns(path.index) or not path.module.training)

    def learning_paths(self) -> list[Path]:
        """Those that learn, paths in eval mode among them, which no plan is for; where ranks draw apart, in sample
        mode, those that learn on any of them, or may, where `join` hasn't told."""
        if self._presence is not None:
            learns = self._branch_calls(self._presence)["learning"].any(dim=0)
        else:
            learns = self._learns if self.plan.mode == "block" else self._learns.any(dim=1)
            if self.plan.mode == "sample":
                never = 1.0 if self.phase == "drop" else 0.0
                learns = learns | (torch.tensor(self.plan.drop_probs) != never)
        flags = learns.tolist()
        return [path for path, flag in zip(self.paths, flags, strict=True) if flag or not path.module.training]

    @property
    def dropped_paths(self) -> list[int]:
        """Indices of the paths that are dropped for at least one sample, of any rank where `join` has told."""
        if self._presence is None:
            return self.plan.dropped_paths
        return self._presence[1].any(dim=0).nonzero().flatten().tolist()

    def presence(self) -> Tensor:
        """Bool [2, forwards, paths], in sample mode: whether a path keeps, and whether it drops, any sample."""
        parts = self.plan.keep.split(self.forwards, dim=1)
        return torch.stack([torch.stack([k.any(dim=1) for k in keep]) for keep in (parts, [~part for part in parts])])

    def join(self, presence: Tensor) -> None:
        """For sample mode on several ranks, which draw apart: `presence`, as of `presence()`, on any rank.

        All ranks then make the same calls, and have the same gradients to average or scatter. Before any forward.
        """
        self._presence, self._dummy_calls = presence, self._dummy_calls_among(presence)

    def _dummy_calls_among(self, presence: Tensor) -> dict[tuple[int, int], tuple[str, ...]]:
        """By forward and path: which calls of the branch, on rows that learn or on frozen ones, other ranks make, or
        other forwards, and this one has no rows for. It makes them too, with a row of zeros: every path that learns
        has a gradient from each forward, so that each has a backward."""
        dummy_calls: dict[tuple[int, int], tuple[str, ...]] = {}
        here = self._branch_calls(self.presence())
        for kind, anywhere in self._branch_calls(presence).items():
            for forward, path in (anywhere.any(dim=0) & ~here[kind]).nonzero().tolist():
                dummy_calls[forward, path] = (*dummy_calls.get((forward, path), ()), kind)
        return dummy_calls

    def _branch_calls(self, presence: Tensor) -> dict[str, Tensor]:
        """Bool [forwards, paths]: which branches are called on rows that learn, and on frozen ones."""
        kept, dropped = presence
        if self.phase == "drop":
            return {"learning": kept}
        return {"learning": kept | dropped} if self.rules.freeze == "none" else {"learning": dropped, "frozen": kept}

    def close(self) -> None:
        self.last_node = torch._C._autograd._get_sequence_nr()
        self._orders.clear()  # made again should a checkpoint ask

    def not_run(self) -> list[Path]:
        """The paths that the plan runs, on any row of this process, and that the model didn't run in training mode.
        Those in eval mode in which nothing could learn aren't among them: that is how users freeze a part."""
        return [
            path
            for path, decision, ran in zip(self.paths, self._uniform, self._ran, strict=True)
            if decision.runs and not ran
            if path.module.training or any(p.requires_grad for p in path.parameters())
        ]

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

    def _among_ranks(self, decision: Decision, index: int, forward: int) -> Decision:
        dummy_calls = self._dummy_calls.get((forward, index))
        return decision if dummy_calls is None else replace(decision, dummy_calls=dummy_calls)

    def _whole(self, index: int, learns: bool) -> Decision:
        return self._decision(index, learns, not learns and self.phase == "reuse")

    def _decision(
        self, index: int, learning: bool = False, frozen: bool = False, rows: RowSet | None = None
    ) -> Decision:
        scale = kept_scale(self.plan.drop_probs[index], self.rules.scale_by_keep) if self.phase == "drop" else 1.0
        also_learns = self.also_learns[index] if self.also_learns else ()
        modules = self.modules[index] if self.modules else None
        return Decision(learning, frozen, rows, scale, self.rules.freeze, self.rules.freeze_bn, modules, also_learns)

    def _order(self, forward: int, start: int, size: int, device: torch.device) -> Tensor:
        """int64 [2, paths, batch] on `device`: each path's learning rows, then the others, and where each row stands.

        One copy for each forward and device: the rows of all paths travel together.
        """
        key = (forward, device)
        if key not in self._orders:
            learns = self._learns[:, start : start + size]
            with torch.inference_mode(False):  # a forward with grad may be the next to read them
                self._orders[key] = to_device(orders_of(learns), device)
        return self._orders[key]


def trainable(place: ParameterRef) -> bool:
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
