"""An open iteration carries out a plan: it makes a decision for each call of each path."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._utils.autograd import NO_BACKWARD
from .._utils.device import to_device
from ..kernels.spec import RowSet, orders_of
from ..paths.binding import Decider, PathModule
from ..paths.decision import FROZEN, LEARN, ROWS, SKIP, Decision
from ..paths.freezing import FreezeBN, ParameterRef
from ..paths.path import Path
from ..plan import PathPlan, kept_scale
from .rest import Rest


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


class Iteration:
    """One drop or reuse iteration. While it is open, it is the decider of its paths' bindings.

    Args:
        phase: `"drop"` or `"reuse"`.
        plan: the paths that the drop iteration keeps, for which samples.
        rules: the scheme's options.
        rest: the rest of the model, which also holds the paths.
        history: decides about recomputations. It is held weakly, because it holds the iteration.
        forwards: in sample mode, the batch size of each forward in order. A single entry holds for any number of
            forwards of that size.
    """

    def __init__(
        self, phase: str, plan: PathPlan, rules: Rules, rest: Rest, history: Decider, forwards: tuple[int, ...]
    ):
        self.phase, self.plan, self.mode, self.rules, self.forwards = phase, plan, plan.mode, rules, forwards
        self.rest, self.paths, self._history = rest, rest.paths, weakref.ref(history)
        self.first_node, self.last_node = torch._C._autograd._get_sequence_nr(), float("inf")
        """The autograd nodes of the iteration have sequence numbers in [first_node, last_node)."""
        self.is_provisional = False
        """Under `alternate` the iteration opens right after a step, and users may change the model before they call it.
        It therefore looks up what belongs to which path again, until a path has run."""
        self._freezes_rest = phase == "reuse" and rules.freezes_rest
        self._blockwise = [self.mode == "block" or path.module.mode == "block" for path in self.paths]
        self._ran, self._calls = [False] * len(self.paths), [0] * len(self.paths)
        self._without_grad, self._with_grad = set[int](), set[int]()
        learns = plan.keep if phase == "drop" else ~plan.keep
        self._learns = torch.ones_like(learns) if phase == "reuse" and rules.freeze == "none" else learns
        self._any_learns = self._learns if self.mode == "block" else self._learns.any(dim=1)
        self._presence: Tensor | None = None
        """After `join`, the `presence()` over all ranks."""
        several = self.mode == "sample" and len(forwards) > 1
        self._dummy_calls = self._missing_calls(self.presence()) if several else {}
        self.look_up()

    def look_up(self) -> None:
        """Makes the decisions again, with the modules and shared parameters that the paths have now."""
        self._parts = self.rest.parts
        # In a drop iteration nothing is frozen, and the rest has not been looked up since the last pair.
        shared = self.rest.shared if self.phase == "reuse" else []
        self._also_learn = [tuple(filter(_requires_grad, refs)) for refs in shared]
        self._decisions: dict[tuple[int, torch.device], list[Decision]] = {}
        """The decisions of all paths, by the forward's number and the device of its rows."""
        self._blockwise_decisions = [self._decision(path, flag) for path, flag in enumerate(self._any_learns.tolist())]
        """The decisions of all paths that are decided for the whole batch."""

    def decide(self, module: PathModule, x: Tensor, recomputing: bool = False) -> Decision:
        """The decision for a call of `module` on `x`. Raises `ValueError` for a batch that doesn't fit the plan.

        In a backward, checkpointing recomputes a forward. The history finds the iteration of that forward, and this
        iteration then decides with `recomputing`.
        """
        if not recomputing and torch._C._current_graph_task_id() != NO_BACKWARD:
            return self._history().decide(module, x)  # type: ignore[union-attr]  # bindings are cleared before it dies
        index = module.binding.index
        if self.phase == "reuse":
            rest = self.rest
            to_check = self.is_provisional or (self._freezes_rest and rest.names)
            if to_check and not (recomputing or rest.runs_frozen):
                self._check_entry(index)
            (self._with_grad if torch.is_grad_enabled() else self._without_grad).add(index)
        self._ran[index] = True
        if self._blockwise[index]:
            return self._blockwise_decisions[index]
        forward = 0
        if len(self.forwards) > 1:
            forward = self._calls[index]  # every path counts its own calls
            if recomputing or forward == len(self.forwards):
                raise self._no_such_forward(index, recomputing)
            self._calls[index] += 1
        if x.shape[0] != self.forwards[forward]:
            raise ValueError(
                f"path {self.paths[index].name!r} got {x.shape[0]} rows where this iteration's forward {forward} has "
                f"batch_size {self.forwards[forward]}; if its rows are not the samples (windows, patches), give its "
                "branch mode='block'"
            )
        decisions = self._decisions.get((forward, x.device))
        return (self._decide_forward(forward, x.device) if decisions is None else decisions)[index]

    @property
    def is_in_frozen_rest(self) -> bool:
        return self.rest.runs_frozen

    def look_again(self) -> None:
        """Looks up what belongs to which path again, if that may have changed since the iteration opened."""
        if self.is_provisional and not self.begun and not self.rest.runs_frozen:
            self.rest.refresh()
            self.look_up()

    def graph_masks(self) -> Tensor:
        """The factors of branches, where they learn and where they are frozen, for a forward whose paths can't ask for
        decisions. Float64 `[2, paths]` or `[2, paths, batch]`. The call counts as a forward."""
        self._ran = [True] * len(self.paths)
        learns = self._learns
        if self.forwards:
            forward = self._calls[0] if len(self.forwards) > 1 else 0
            if forward == len(self.forwards):
                raise self._no_such_forward(0, recomputing=False)
            self._calls[0] += 1
            start = sum(self.forwards[:forward])
            learns = learns[:, start : start + self.forwards[forward]]
        scales = [decision.scale for decision in self._blockwise_decisions]
        scale = torch.tensor(scales, dtype=torch.float64, device="cpu").view([-1] + [1] * (learns.dim() - 1))
        frozen = ~learns if self.phase == "reuse" else torch.zeros_like(learns)
        return torch.stack([torch.where(learns, scale, 0.0), frozen.double()])

    @property
    def begun(self) -> bool:
        """Whether a path has run in this iteration, in training mode."""
        return any(self._ran)

    def learns(self, index: int) -> bool:
        """Whether path `index` learns, on any row of this process."""
        return self._blockwise_decisions[index].kind is LEARN

    def learning_paths(self, anywhere: bool = True) -> list[Path]:
        """The paths that learn, and those in eval mode, which follow no plan. In sample mode, where each rank draws its
        own plan, `anywhere` adds the paths that learn on other ranks or, before `join`, those that may."""
        learns = self._any_learns
        if anywhere and self._presence is not None:
            learns = self._branch_calls(self._presence)["learning"].any(dim=0)
        elif anywhere and self.mode == "sample":
            never = 1.0 if self.phase == "drop" else 0.0
            learns = learns | (torch.tensor(self.plan.drop_probs, device="cpu") != never)
        return [p for p, flag in zip(self.paths, learns.tolist(), strict=True) if flag or not p.module.training]

    @property
    def dropped_paths(self) -> list[int]:
        """Indices of the paths that are dropped for at least one sample of this rank or, after `join`, of any rank."""
        if self._presence is None:
            return self.plan.dropped_paths
        return self._presence[1].any(dim=0).nonzero().flatten().tolist()

    def presence(self) -> Tensor:
        """In sample mode, whether each path keeps any sample, and whether it drops any. Bool [2, forwards, paths]."""
        parts = self.plan.keep.split(self.forwards, dim=1)
        return torch.stack([torch.stack([k.any(dim=1) for k in keep]) for keep in (parts, [~part for part in parts])])

    def join(self, presence: Tensor) -> None:
        """Sets the `presence()` over all ranks, before any forward. In sample mode each rank draws its own plan.

        All ranks then make the same calls, and have gradients for the same parameters to average or scatter.
        """
        self._presence, self._dummy_calls = presence, self._missing_calls(presence)
        self.look_up()

    def _missing_calls(self, presence: Tensor) -> dict[tuple[int, int], tuple[str, ...]]:
        """The dummy calls, by forward and path: calls of a branch, on rows that learn or on frozen rows, that other
        ranks or other forwards make, and for which this forward has no rows. With these calls every path that learns
        gets a gradient from each forward, so that each forward has a backward."""
        missing: dict[tuple[int, int], tuple[str, ...]] = {}
        here = self._branch_calls(self.presence())
        for kind, anywhere in self._branch_calls(presence).items():
            for forward, path in (anywhere.any(dim=0) & ~here[kind]).nonzero().tolist():
                missing[forward, path] = (*missing.get((forward, path), ()), kind)
        return missing

    def _branch_calls(self, presence: Tensor) -> dict[str, Tensor]:
        """Which branches are called on rows that learn, and which on frozen rows. Bool [forwards, paths]."""
        kept, dropped = presence
        if self.phase == "drop":
            return {"learning": kept}
        return {"learning": kept | dropped} if self.rules.freeze == "none" else {"learning": dropped, "frozen": kept}

    def close(self) -> None:
        self.last_node = torch._C._autograd._get_sequence_nr()
        self._decisions.clear()  # they hold rows, and are made again for a recomputation

    def not_run(self) -> list[Path]:
        """The paths that the plan runs, on any row of this process, but that the model didn't run in training mode.

        Paths in eval mode without anything that can learn are left out, because users freeze a part in this way.
        """
        return [
            path
            for path, decision, ran in zip(self.paths, self._blockwise_decisions, self._ran, strict=True)
            if decision.kind is not SKIP and not ran
            if path.module.training or any(p.requires_grad for p in path.parameters())
        ]

    def check_complete(self) -> None:
        """Raises `RuntimeError` if a path ran in some but not all of the announced forwards, or if a path that learns
        never ran with grad although others did."""
        ran_without = [self.paths[i] for i in sorted(self._without_grad - self._with_grad) if self._any_learns[i]]
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

    def _check_entry(self, index: int) -> None:
        self.look_again()
        if self._freezes_rest:
            self.rest.check_entry(self.paths[index])

    def _no_such_forward(self, index: int, recomputing: bool) -> Exception:
        name, forwards = self.paths[index].name, self.forwards
        if recomputing:
            return RuntimeError(
                f"path {name!r} is recomputed by checkpointing, which can't tell the {len(forwards)} forwards of this "
                "sample-mode iteration apart: use mode='block', or no checkpointing"
            )
        return ValueError(
            f"path {name!r} was called more than {len(forwards)} times in an iteration that was opened with "
            f"batch_size={list(forwards)}, one entry for each forward"
        )

    def _decide_forward(self, forward: int, device: torch.device) -> list[Decision]:
        """The decisions of all paths for a forward on `device`. The rows of all paths take one copy to the device."""
        start, size = sum(self.forwards[:forward]), self.forwards[forward]
        learns, decisions = self._learns[:, start : start + size], []
        counts = learns.sum(dim=1).tolist()
        with torch.inference_mode(False):  # a later forward may read the rows with grad
            orders, inverses = to_device(orders_of(learns), device)
            if self.phase == "drop":  # the rows after the learning ones are dropped: the branch doesn't get them
                indices = orders.flatten().split([part for count in counts for part in (count, size - count)])[::2]
            else:
                indices = orders.unbind()
            for path, (count, index, inverse) in enumerate(zip(counts, indices, inverses.unbind(), strict=True)):
                rows = RowSet(index, count, inverse) if 0 < count < size else None
                decisions.append(self._decision(path, count > 0, rows, forward))
        self._decisions[forward, device] = decisions
        return decisions

    def _decision(self, index: int, learns: bool, rows: RowSet | None = None, forward: int = 0) -> Decision:
        kind = LEARN if learns else SKIP
        if rows is not None:
            kind = ROWS
        elif not learns and self.phase == "reuse":
            kind = FROZEN
        dummy_calls = self._dummy_calls.get((forward, index), ()) if self._dummy_calls else ()
        options = self.rules.freeze, self.rules.freeze_bn
        if self.phase == "drop":
            scale = kept_scale(self.plan.drop_probs[index], self.rules.scale_by_keep)
            return Decision(kind, rows, scale, *options, dummy_calls=dummy_calls)
        also_learns = self._also_learn[index] if self._also_learn else ()
        return Decision(kind, rows, 1.0, *options, self._parts[index], also_learns, dummy_calls=dummy_calls)


def _requires_grad(ref: ParameterRef) -> bool:
    module, name = ref
    parameter = module._parameters[name]
    return parameter is not None and parameter.requires_grad


def check_plan(plan: object, paths: Sequence[Path], mode: str, forwards: tuple[int, ...], rules: Rules) -> None:
    """Raises `TypeError` or `ValueError` if `plan` can't be carried out on `paths`."""
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
