"""`ResidualDropPath`: opens drop and reuse iterations on a model (arXiv 2411.09475)."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Generator, Iterator
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from .._utils.checks import check_bool, check_choice, check_count, check_probability
from ..convert.libraries import warn_left_over
from ..paths.freezing import FreezeBN, check_freeze_bn
from ..paths.path import Path
from ..plan import MODES, SAMPLINGS, SCHEDULES, PathPlan
from .alternation import Alternation, stepped_by
from .iteration import Rules, check_plan
from .pairs import Pairs
from .state import COPIED, BatchSize, NoScheme, State, forwards_of

FREEZES = ("parameters", "branch", "none")


class ResidualDropPath:
    """Trains `model` by pairs of iterations: *drop*, where random paths are left out and the rest learns, and *reuse*,
    where every path runs and those that were left out learn (ResidualDroppath, arXiv 2411.09475).

    Args:
        model: a network with paths: built from `ResidualBranch`.
        drop_prob: P(drop) of every path; None reads each path's own `drop_prob` at each draw.
        schedule: `"constant"` or `"linear"` (0 → `drop_prob` over depth); for a number only.
        mode: `"block"` decides for the whole batch (the paper's scheme), `"sample"` for each sample.
        freeze: what freezing means in the reuse iteration. `"parameters"` is exact: frozen weights get no gradient,
            activations' gradients flow through every path. `"branch"` is approximate and cheapest: no gradient flows
            through frozen branches, only past them. `"none"` is a control in which everything learns.
        sampling: `"bernoulli"` draws independently, `"fixed"` makes the counts as even as they can be.
        scale_by_keep: kept branches are scaled by 1 / (1 − p) in the drop iteration.
        train_rest: the rest (stem, head, final norm, shortcuts) learns in the reuse iteration too.
        freeze_bn: what frozen BatchNorm does in training mode. True: it normalises by the batch, and its running
            statistics don't move. `"running"`: it normalises by its running statistics, as at inference, and these
            don't move. That saves memory and is for fine-tuning: from scratch, running statistics lag behind the
            weights, and the reuse iterations' loss explodes. False: it normalises by the batch, and its running
            statistics move.
        seed: pass your run's seed. Masks depend only on it and on the number of plans drawn, and in sample mode on the
            rank of `torch.distributed`.

    Nothing is added to the model's `state_dict`. Copies and pickles of the model carry no scheme: a module that has its
    scheme as an attribute has a `NoScheme` there once it is copied. The scheme itself can't be copied: save its
    `state_dict()`. What belongs to which path, and to the rest, is looked up when an iteration opens.

    Raises `ValueError` or `TypeError` naming the argument, and `RuntimeError` for a model that has a scheme already.
    Warns once of whatever makes it do nothing: rates that are all 0, paths that the model doesn't run, gradients of
    zero where there should be none.
    """

    def __init__(
        self,
        model: nn.Module,
        drop_prob: float | None = None,
        *,
        schedule: Literal["constant", "linear"] = "constant",
        mode: Literal["block", "sample"] = "block",
        freeze: Literal["parameters", "branch", "none"] = "parameters",
        sampling: Literal["bernoulli", "fixed"] = "bernoulli",
        scale_by_keep: bool = True,
        train_rest: bool = False,
        freeze_bn: FreezeBN = True,
        seed: int = 0,
    ):
        check_choice("schedule", schedule, SCHEDULES)
        check_choice("mode", mode, MODES)
        check_choice("freeze", freeze, FREEZES)
        check_choice("sampling", sampling, SAMPLINGS)
        if drop_prob is not None:
            check_probability("drop_prob", drop_prob)
        elif schedule != "constant":
            raise ValueError(f"schedule={schedule!r} spreads a number over the paths: give drop_prob")
        seed = check_count("seed", seed, minimum=-(2**63))
        flags = check_bool("scale_by_keep", scale_by_keep), check_bool("train_rest", train_rest)
        self._rules = Rules(freeze, *flags, check_freeze_bn(freeze_bn))
        self._pairs = Pairs(self, model, self._rules, (drop_prob, schedule), mode, sampling)
        self._rest, self._on_begin, self.seed = self._pairs.rest, self._pairs.on_begin, seed
        self._alternation: Alternation | None = None
        warn_left_over(model)
        if not any(path.drop_prob for path in self.paths):
            self._pairs.notices.warn(
                "every path's drop_prob is 0: as long as it is, the plans that are drawn drop nothing, which is plain "
                "training"
            )

    def __repr__(self) -> str:
        drop_probs = {path.drop_prob for path in self.paths}
        rates = "–".join(f"{p:g}" for p in sorted({min(drop_probs), max(drop_probs)}))
        return (
            f"ResidualDropPath({len(self.paths)} paths, drop_prob={rates}, mode={self.mode!r}, freeze={self.freeze!r}, "
            f"sampling={self.sampling!r}, seed={self.seed}, phase={self.phase!r})"
        )

    @property
    def paths(self) -> list[Path]:
        """The model's paths, in the order of the rows of a plan."""
        return self._pairs.paths

    @property
    def mode(self) -> str:
        return self._pairs.mode

    @property
    def freeze(self) -> str:
        return self._rules.freeze

    @property
    def sampling(self) -> str:
        return self._pairs.sampling

    @property
    def seed(self) -> int:
        return self._pairs.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._pairs.seed = seed

    @property
    def plan(self) -> PathPlan | None:
        """The plan of the pair of iterations that is under way; None before a pair and after it."""
        iteration = self._pairs.open or self._pairs.pending
        return None if iteration is None else iteration.plan

    @property
    def phase(self) -> str | None:
        """`"drop"` or `"reuse"` while that iteration is open, else None."""
        return self._pairs.history.phase

    @property
    def reuse_pending(self) -> bool:
        """Whether a drop iteration has ended whose complement has yet to learn."""
        return self._pairs.pending is not None

    def learning_parameters(self) -> list[nn.Parameter]:
        """The parameters that can get a gradient in the open iteration, each once; none where no iteration is open.

        In block mode these are exactly the ones that the plan lets learn, the same on every rank. In sample mode, where
        each rank draws its own plan, they are the ones that may learn on any rank, or that do, after
        `integrations.distributed.agree`.
        """
        return self._pairs.learning_parameters()

    def idle_parameters(self) -> list[nn.Parameter]:
        """The model's other parameters, which get no gradient in the open iteration; all where none is open."""
        return self._pairs.idle_parameters()

    # Opening and closing

    @contextlib.contextmanager
    def drop_iteration(self, batch_size: BatchSize = None, *, plan: PathPlan | None = None) -> Iterator[PathPlan]:
        """The drop iteration: forward, backward and optimizer step go inside. Yields its plan.

        Args:
            batch_size: sample mode: the number of samples, or a sequence with one entry for each forward, in order.
                Block mode fits any number and size of forwards and doesn't need it.
            plan: a `PathPlan` to carry out instead of drawing one.

        An exception inside closes the iteration and discards its plan. Raises `RuntimeError` inside another iteration,
        and where a plan is drawn that drops all that can learn: its reuse iteration is then pending, as after a drop
        iteration. A plan of your own is carried out whatever it drops.
        """
        pairs = self._pairs
        iteration = pairs.drop(batch_size, plan)
        if plan is None and pairs.drops_all(iteration):
            pairs.pending = iteration
            raise RuntimeError(
                "drop_iteration(): its plan drops every path that can learn, and nothing else can learn, so that there "
                "is nothing to run. The reuse iteration is pending: go on with reuse_iteration(), or loop over "
                "iterations(), which does so by itself"
            )
        with pairs.opened(iteration):
            yield iteration.plan

    @contextlib.contextmanager
    def reuse_iteration(self) -> Iterator[PathPlan]:
        """The reuse iteration that follows the last drop iteration, in which the dropped paths learn. Yields the plan.

        Raises `RuntimeError` where no drop iteration went before, or where it dropped nothing that can learn (see
        `reuse_pending`; `iterations` takes care of it).
        """
        iteration = self._pairs.reuse()
        if not self._pairs.starts(iteration):
            self._pairs.refuse_reuse()
        with self._pairs.opened(iteration):
            yield iteration.plan

    def iterations(self, batch_size: BatchSize = None, *, plan: PathPlan | None = None) -> Generator[str, None, None]:
        """Yields `"drop"`, then `"reuse"` if anything was dropped that can learn: the loop's body is written once.

        Arguments as in `drop_iteration`. Where a reuse iteration is pending, after `load_state_dict` for example, it is
        the only one. So it is where the plan drops all that can learn, because nothing would learn in the drop
        iteration. (Drawing another plan instead would change the rates.) Leaving the loop early, by break or an
        exception, abandons the pair.

        The state can't be saved in the loop's body, where an iteration is open. To save between the two iterations of a
        pair, write them out:

            with scheme.drop_iteration(len(images)):
                ...
            torch.save(scheme.state_dict(), ...)
            if scheme.reuse_pending:
                with scheme.reuse_iteration():
                    ...

        Whether anything can learn is decided by the scheme's own model: make the scheme of the module that holds all
        that learns.
        """
        pairs = self._pairs
        if pairs.pending is None:
            iteration = pairs.drop(batch_size, plan)
            if pairs.starts(iteration):
                with pairs.opened(iteration):
                    yield "drop"
        elif plan is not None:
            raise ValueError("plan can't be set while the reuse iteration of an earlier plan is pending: call reset()")
        elif self.mode == "sample" and batch_size is not None and forwards_of(batch_size) != pairs.pending.forwards:
            wanted = list(pairs.pending.forwards)
            raise ValueError(f"batch_size must be {wanted}, that of the pending reuse iteration, got {batch_size}")
        if pairs.pending is not None:
            iteration = pairs.reuse()
            if pairs.starts(iteration):
                with pairs.opened(iteration):
                    yield "reuse"

    def alternate(self, optimizer: torch.optim.Optimizer) -> Alternation:
        """For loops that others own: every `optimizer.step()` ends an iteration and opens the next, on the next batch.

        The first iteration opens at once. Steps that a GradScaler skips don't count. Returns a handle whose `remove()`
        ends the alternation and leaves no iteration open. Between a step and the next forward layers of the model may
        be changed, but paths only before this call or after `remove()`. Block mode only, as the next batch's size is
        not known. `optimizer` may be the wrapper that accelerate or Lightning makes of it. Raises `ValueError` where it
        has no parameter of the model.
        """
        if self.mode != "block":
            raise ValueError(
                "alternate needs mode='block': in sample mode the next batch's size would have to be known"
            )
        optimizer = stepped_by(optimizer)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
        owned = {id(p) for p in self._rest.model.parameters()}
        if not any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "optimizer must have parameters of the scheme's model, but has none of them: make it from "
                "model.parameters(), after whatever replaces these"
            )
        pairs = self._pairs
        pairs.check_none_open()
        pairs.open_next()
        self._alternation = Alternation(pairs, optimizer, self._end_alternation)
        pairs.trains_more = self._alternation.trains_more
        return self._alternation

    def reset(self) -> None:
        """Closes whatever is open and forgets the plan, for example after an exception in a notebook."""
        self._pairs.reset()
        if self._alternation is not None:
            self._pairs.open_next()

    def remove(self) -> None:
        """Takes the scheme off its model, which is then as before."""
        if self._alternation is not None:
            self._alternation.remove()
        self.reset()
        self._on_begin.clear()
        self._rest.release()
        self._pairs.remove()

    def estimate(self, example_inputs: Any, *, timed: bool = True) -> Any:
        """The costs of iterations on batches like `example_inputs`: FLOPs, saved bytes and time against those of plain
        training, in each mode, at the scheme's own rates and at others; and a recommendation:

            print(scheme.estimate(images))

        Args:
            example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, samples in dimension 0, of
                the batch size and on the device of the training.
            timed: measure seconds, which takes some tens of training steps. Otherwise FLOPs stand for them.

        Measures a copy of the model, its branches uncompiled; nothing changes. Returns an
        `rdp_kernels.estimate.Estimate`. Raises `RuntimeError` inside an iteration and `ValueError` for a model that
        can't be copied or run on `example_inputs`.
        """
        from ..estimate import estimate  # the one import of what stands above: most trainings never ask

        return estimate(self, example_inputs, timed)

    # State

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, in plain types: seed, number of plans drawn, pending plan, counters.

        Raises `RuntimeError` inside an iteration. Under `alternate`, where one is always open, it works at any time:
        resuming starts over with an iteration whose optimizer step was still to come. In sample mode each rank saves
        its own.
        """
        self._check_at_rest("state_dict")
        pairs = self._pairs
        drawn, pair = pairs.drawn, pairs.pending
        if pairs.open is not None and pairs.open.phase == "drop":
            drawn, pair = drawn - 1, None  # its plan will be drawn again
        elif pairs.open is not None:
            pair = pairs.open
        plan, forwards = (None, ()) if pair is None else (pair.plan, pair.forwards)
        return State(self.mode, len(self.paths), self.seed, drawn, pairs.completed, plan, forwards).to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken: the same plans follow, and a pending reuse iteration is pending again.

        Raises `ValueError` for a damaged state or one of another mode or number of paths, and `RuntimeError` inside an
        iteration; the scheme is then as before.
        """
        self._check_at_rest("load_state_dict")
        loaded = State.from_dict(state)
        if (loaded.mode, loaded.num_paths) != (self.mode, len(self.paths)):
            raise ValueError(
                f"state must be of mode {self.mode!r} with {len(self.paths)} paths, got mode {loaded.mode!r} with "
                f"{loaded.num_paths}"
            )
        if loaded.plan is not None:
            check_plan(loaded.plan, self.paths, self.mode, loaded.forwards, self._rules)
        self._pairs.load(loaded)
        if self._alternation is not None:
            self._pairs.open_next()

    def _check_at_rest(self, method: str) -> None:
        if self._pairs.open is not None and self._alternation is None:
            raise RuntimeError(f"{method}() inside an open {self.phase} iteration: call it after the iteration")

    def __copy__(self) -> NoReturn:
        raise TypeError(COPIED)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoScheme:
        if not any(isinstance(copied, nn.Module) for copied in memo.values()):  # not the copy of a module that has it
            raise TypeError(COPIED)
        return NoScheme()

    def __reduce__(self) -> tuple[type[NoScheme], tuple[()]]:
        warnings.warn(f"in a pickle there will be a NoScheme: {COPIED}", stacklevel=2)
        return NoScheme, ()

    def _end_alternation(self, alternation: Alternation) -> None:
        if self._alternation is alternation:
            state, self._alternation, self._pairs.trains_more = self.state_dict(), None, None
            self._pairs.reset()
            self.load_state_dict(state)
