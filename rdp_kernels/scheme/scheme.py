"""`ResidualDropPath`: opens drop and reuse iterations on a model (arXiv 2411.09475)."""

from __future__ import annotations

import contextlib
import itertools
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._utils.autograd import in_backward
from .._utils.checks import check_bool, check_choice, check_count, check_probability
from .._utils.ranks import rank, world_size
from ..convert.libraries import warn_left_over
from ..paths.freezing import FreezeBN, ParameterRef, check_freeze_bn
from ..paths.path import Decision, Path, PathBinding, PathModule, find_paths, path_modules_among, refuse_batch_norm
from ..plan import MODES, SAMPLINGS, SCHEDULES, PathPlan, draw_keep, plan_generator
from .alternation import Alternation, stepped_by
from .iteration import Iteration, Rules, check_plan, trainable
from .rest import Rest
from .state import COPIED, PHASES, BatchSize, NoScheme, State, forwards_of

if TYPE_CHECKING:
    from ..estimate import Estimate

FREEZES = ("parameters", "branch", "none")
LOOKS_AT_GRADIENTS = 8
"""How many iterations look for gradients of zero when they close: that is a habit of a loop, seen at once or never."""


class ResidualDropPath:
    """Trains `model` by pairs of iterations: *drop*, where random paths are left out and the rest learns, and *reuse*,
    where every path runs and those learn that were left out (ResidualDroppath, arXiv 2411.09475).

    Args:
        model: a network with paths: built from `ResidualBranch`.
        drop_prob: P(drop) of every path; None reads each path's own `drop_prob` at each draw.
        schedule: `"constant"` or `"linear"` (0 → `drop_prob` over depth); for a number only.
        mode: `"block"` decides for the whole batch (the paper's scheme), `"sample"` for each sample.
        freeze: what freezing means in the reuse iteration. `"parameters"` is exact: frozen weights get no gradient,
            activations' gradients flow through every path. `"branch"` is approximate and cheapest: gradients pass a
            frozen branch by the identity only. `"none"` is a control in which everything learns.
        sampling: `"bernoulli"` draws independently, `"fixed"` makes the counts as even as they can be.
        scale_by_keep: kept branches are scaled by 1 / (1 − p) in the drop iteration.
        train_rest: the rest (stem, head, final norm, shortcuts) learns in the reuse iteration too.
        freeze_bn: what frozen BatchNorm does in training mode. True: it normalises by the batch, and its running
            statistics stand still. `"running"`: it normalises by its running statistics, as at inference, and these
            stand still. That saves memory and is for fine-tuning: from scratch, running statistics lag behind the
            weights, and the reuse iterations' loss explodes. False: it normalises by the batch, and its running
            statistics move.
        seed: pass your run's seed. Masks depend on it and on the number of plans drawn alone, in sample mode on the
            rank of `torch.distributed` too.

    Nothing is added to the model's `state_dict`; copies and pickles of the model carry no scheme, and a module that has
    its scheme as an attribute has a `NoScheme` there once it is copied. The scheme itself can't be copied: save its
    `state_dict()`. What belongs to which path, and to the rest, is looked up when an iteration opens.

    Raises `ValueError` or `TypeError` naming the argument, and `RuntimeError` for a model that has a scheme already.
    Warns once of what makes it do nothing: rates that are all 0, paths that the model doesn't run, gradients of zero
    where there should be none.
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
        self.mode, self.freeze, self.sampling = mode, freeze, sampling
        self.seed = check_count("seed", seed, minimum=-(2**63))
        self._rules = Rules(
            freeze,
            check_bool("scale_by_keep", scale_by_keep),
            check_bool("train_rest", train_rest),
            check_freeze_bn(freeze_bn),
        )
        self._rates = drop_prob, schedule
        self.paths = find_paths(model, drop_prob, schedule)
        warn_left_over(model)
        self._check_paths(self.paths)
        self._warned: set[str] = set()
        self._drawn = 0
        self._completed = dict.fromkeys(PHASES, 0)
        self._pending: Iteration | None = None  # a finished drop iteration whose complement is to learn
        self._open: Iteration | None = None
        self._closed: deque[Iteration] = deque(maxlen=16)  # for recomputation by checkpointing
        self._alternation: Alternation | None = None
        self._looks_left = LOOKS_AT_GRADIENTS
        self._on_begin: list[Callable[[Iteration], None]] = []
        """Integrations: called with an iteration before it is open; an error keeps it shut and a pair pending."""

        itself = weakref.ref(self)
        self._rest = Rest(model, self.paths, lambda: _freezes_rest_now(itself()), freeze_bn)
        for path in self.paths:
            path.module.binding.bind(self, path.index)
        self._bindings = [weakref.ref(path.module.binding) for path in self.paths]
        self._remover = weakref.finalize(self, _remove, self._rest.handles, self._bindings)
        if not any(path.drop_prob for path in self.paths):
            self._warn(
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
    def plan(self) -> PathPlan | None:
        """The plan of the pair of iterations that is under way; None before a pair and after it."""
        iteration = self._open or self._pending
        return None if iteration is None else iteration.plan

    @property
    def phase(self) -> str | None:
        """`"drop"` or `"reuse"` while that iteration is open, else None."""
        return None if self._open is None else self._open.phase

    @property
    def reuse_pending(self) -> bool:
        """Whether a drop iteration has ended whose complement has yet to learn."""
        return self._pending is not None

    def learning_parameters(self) -> list[nn.Parameter]:
        """The parameters that can get a gradient in the open iteration, each once; none where no iteration is open.

        In block mode exactly those that the plan lets learn, the same on every rank; in sample mode, where ranks draw
        apart, those that may learn on any rank (that do, after `integrations.distributed.agree`).
        """
        if self._open is None:
            return []
        found = [p for path in self._open.learning_paths() for p in path.parameters()]
        if self._rest_learns(self._open):
            self._rest.refresh()
            found += self._rest.parameters()
        return [p for p in {id(p): p for p in found}.values() if p.requires_grad]

    def idle_parameters(self) -> list[nn.Parameter]:
        """The others of the model's: those that get no gradient in the open iteration; all where none is open."""
        learning = {id(p) for p in self.learning_parameters()}
        return [p for p in self._rest.model.parameters() if id(p) not in learning]

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
        iteration = self._drop(batch_size, plan)
        self._announce(iteration)
        if plan is None and not self._learns_anything(iteration) and self._can_learn(iteration.dropped_paths):
            self._pending = iteration
            raise RuntimeError(
                "drop_iteration(): its plan drops every path that can learn, and nothing else can learn, so that there "
                "is nothing to run. The reuse iteration is pending: go on with reuse_iteration(), or loop over "
                "iterations(), which does so by itself"
            )
        with self._opened(iteration):
            yield iteration.plan

    @contextlib.contextmanager
    def reuse_iteration(self) -> Iterator[PathPlan]:
        """The reuse iteration to the last drop iteration: what that one dropped learns. Yields the plan.

        Raises `RuntimeError` where no drop iteration went before, or where it dropped nothing that can learn (see
        `reuse_pending`; `iterations` takes care of it).
        """
        iteration = self._reuse()
        if not self._starts(iteration):
            self._refuse_reuse()
        with self._opened(iteration):
            yield iteration.plan

    def iterations(self, batch_size: BatchSize = None, *, plan: PathPlan | None = None) -> Generator[str, None, None]:
        """Yields `"drop"`, then `"reuse"` if anything was dropped that can learn: the loop's body is written once.

        Arguments as in `drop_iteration`. Where a reuse iteration is pending, after `load_state_dict` for example, it is
        the only one; likewise where the plan drops all that can learn, as the drop iteration would then learn nothing.
        (Drawing another plan instead would change the rates.) Leaving the loop early (break or an exception) abandons
        the pair.

        The state can't be saved in the loop's body, where an iteration is open. To save between the two iterations of a
        pair, write them out:

            with scheme.drop_iteration(len(images)):
                ...
            torch.save(scheme.state_dict(), ...)
            if scheme.reuse_pending:
                with scheme.reuse_iteration():
                    ...

        What can learn is asked of the scheme's own model: make the scheme of the module that holds all of it.
        """
        if self._pending is None:
            iteration = self._drop(batch_size, plan)
            if self._starts(iteration):
                with self._opened(iteration):
                    yield "drop"
        elif plan is not None:
            raise ValueError("plan can't be set while the reuse iteration of an earlier plan is pending: call reset()")
        elif self.mode == "sample" and batch_size is not None and forwards_of(batch_size) != self._pending.forwards:
            wanted = list(self._pending.forwards)
            raise ValueError(f"batch_size must be {wanted}, that of the pending reuse iteration, got {batch_size}")
        if self._pending is not None:
            iteration = self._reuse()
            if self._starts(iteration):
                with self._opened(iteration):
                    yield "reuse"

    def alternate(self, optimizer: torch.optim.Optimizer) -> Alternation:
        """For loops that others own: every `optimizer.step()` ends an iteration and opens the next, on the next batch.

        The first iteration opens at once. Steps that a GradScaler skips don't count. Returns a handle whose `remove()`
        ends it, leaving no iteration open. Change layers of the model before the next forward, and paths before this
        call or after `remove()`. Block mode only, as the next batch's size is not known. `optimizer` may be
        the wrapper that accelerate or Lightning makes of it. Raises `ValueError` where it has no parameter of the
        model.
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
        self._check_none_open()
        self._alternation = Alternation(self, optimizer)
        return self._alternation

    def reset(self) -> None:
        """Closes whatever is open and forgets the plan, for example after an exception in a notebook."""
        if self._open is not None:
            self._close(completed=False)
        self._pending = None
        if self._alternation is not None:
            self._open_next()

    def remove(self) -> None:
        """Takes the scheme off its model, which is then as before."""
        if self._alternation is not None:
            self._alternation.remove()
        self.reset()
        self._on_begin.clear()
        self._rest.release()
        self._remover()

    def estimate(self, example_inputs: Any, *, timed: bool = True) -> Estimate:
        """What iterations on batches like `example_inputs` cost: FLOPs, saved bytes and time against plain training's,
        in each mode, at the scheme's own rates and at others, and what that speaks for:

            print(scheme.estimate(images))

        Args:
            example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, samples in dimension 0, of
                the batch size and on the device of the training.
            timed: measure seconds, which takes some tens of training steps. Without, FLOPs stand for them.

        Measures a copy of the model, its branches uncompiled; nothing changes. Raises `RuntimeError` inside an
        iteration and `ValueError` for a model that can't be copied or run on `example_inputs`.
        """
        from ..estimate import estimate  # most trainings don't ask

        return estimate(self, example_inputs, timed)

    # State

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs, in plain types: seed, number of plans drawn, pending plan, counters.

        Raises `RuntimeError` inside an iteration. Under `alternate`, where one is always open, it works at any time: an
        iteration whose optimizer step is still to come will be run from its start. In sample mode each rank saves its
        own.
        """
        if not self._at_rest():
            raise RuntimeError(f"state_dict() inside an open {self.phase} iteration: call it after the iteration")
        redrawn = self._open is not None and self._open.phase == "drop"  # opened by alternate, which will draw it again
        pending = self._pending if self._open is None else None if redrawn else self._open
        plan, forwards = (None, ()) if pending is None else (pending.plan, pending.forwards)
        return State(
            self.mode, len(self.paths), self.seed, self._drawn - redrawn, self._completed, plan, forwards
        ).to_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken: the same plans follow, and a pending reuse iteration is pending again.

        Raises `ValueError` for the state of another mode or number of paths or a damaged one, and `RuntimeError` inside
        an iteration; the scheme is then as before.
        """
        if not self._at_rest():
            raise RuntimeError(f"load_state_dict() inside an open {self.phase} iteration: call it after the iteration")
        loaded = State.from_dict(state)
        if (loaded.mode, loaded.num_paths) != (self.mode, len(self.paths)):
            raise ValueError(
                f"state must be of mode {self.mode!r} with {len(self.paths)} paths, got mode {loaded.mode!r} with "
                f"{loaded.num_paths}"
            )
        if loaded.plan is not None:
            check_plan(loaded.plan, self.paths, self.mode, loaded.forwards, self._rules)
        if self._open is not None:
            self._close(completed=False)
        self.seed, self._drawn, self._completed = loaded.seed, loaded.drawn, dict(loaded.completed)
        self._pending = None if loaded.plan is None else self._iteration("drop", loaded.plan, loaded.forwards)
        if self._alternation is not None:
            self._open_next()

    def __copy__(self) -> NoReturn:
        raise TypeError(COPIED)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoScheme:
        if not any(isinstance(copied, nn.Module) for copied in memo.values()):  # of a module that has it
            raise TypeError(COPIED)
        return NoScheme()

    def __reduce__(self) -> tuple:
        warnings.warn(f"in a pickle there will be a NoScheme: {COPIED}", stacklevel=2)
        return NoScheme, ()

    # Internals

    def _decide(self, index: int, x: Tensor) -> Decision | None:
        """What `run_path` does in a training-mode call of path `index`; None where no iteration is open."""
        recomputing = in_backward()
        iteration = self._current(recomputing)
        if iteration is None:
            return None
        if iteration.phase == "reuse" and not recomputing:
            self._look_again(iteration)
            if self._rules.freezes_rest:
                self._rest.check_entry(self.paths[index])
        return iteration.decide(index, x, recomputing)

    def _look_again(self, iteration: Iteration) -> None:
        """Under `alternate` an iteration opens right after a step, and users may change the model before the next."""
        if self._alternation is not None and not iteration.begun and not self._rest.is_entered:
            self._rest.refresh()
            iteration.look_up(self._also_learn(), self._rest.modules)

    def _also_learn(self) -> list[tuple[ParameterRef, ...]]:
        return [tuple(filter(trainable, shared)) for shared in self._rest.shared]

    def _current(self, recomputing: bool) -> Iteration | None:
        """The open iteration; for a forward inside a backward the one whose forward is recomputed."""
        if not recomputing:
            return self._open
        node = torch._C._current_autograd_node()._sequence_nr()
        for iteration in (self._open, *reversed(self._closed)):
            if iteration is not None and iteration.first_node <= node < iteration.last_node:
                return iteration
        if len(self._closed) == self._closed.maxlen and node < self._closed[0].first_node:
            raise RuntimeError(f"checkpointing recomputes a forward from over {len(self._closed)} iterations ago")
        return None

    def _drop(self, batch_size: BatchSize, plan: PathPlan | None) -> Iteration:
        self._check_none_open()
        self._look_up_paths()
        forwards = () if batch_size is None else forwards_of(batch_size)
        if self.mode == "block":
            forwards = ()
        elif batch_size is None:
            if plan is None:
                raise ValueError(
                    "batch_size must be given in sample mode: the number of samples, or one for each forward"
                )
            forwards = () if plan.batch_size is None else (plan.batch_size,)
        if self.mode == "sample" and not forwards:
            raise ValueError("batch_size must have an entry for each forward, got none")
        if plan is None:
            plan = self._draw(forwards)
        else:
            check_plan(plan, self.paths, self.mode, forwards, self._rules)
        return self._iteration("drop", plan, forwards)

    def _reuse(self) -> Iteration:
        self._check_none_open()
        if self._pending is None:
            self._refuse_reuse()
        self._look_up_paths()
        self._rest.refresh()
        if path_modules_among(itertools.chain.from_iterable(self._rest.modules)):
            find_paths(self._rest.model)  # raises: one lies inside another
        return self._iteration("reuse", self._pending.plan, self._pending.forwards)

    def _refuse_reuse(self) -> NoReturn:
        raise RuntimeError(
            "reuse_iteration() needs a drop iteration before it that dropped something that can learn: check "
            "reuse_pending, or loop over iterations()"
        )

    def _iteration(self, phase: str, plan: PathPlan, forwards: tuple[int, ...]) -> Iteration:
        if phase == "drop":
            return Iteration(phase, plan, self.paths, self._rules, forwards)
        return Iteration(phase, plan, self.paths, self._rules, forwards, self._also_learn(), self._rest.modules)

    def _look_up_paths(self) -> None:
        """Finds the model's paths anew where they are others than before. Raises `RuntimeError` between two iterations
        of a pair, whose plan is about the paths as they were."""
        path_modules = self._rest.path_modules()
        if path_modules == [path.module for path in self.paths]:
            return
        if self._pending is not None:
            raise RuntimeError(
                "the model's paths have changed since the drop iteration, and its plan is about those that were there: "
                "call reset()"
            )
        before = {id(path.module): path.module for path in self.paths}
        paths = find_paths(self._rest.model, *self._rates, known=before)
        self._check_paths(paths)
        for path_module in before.values():
            path_module.binding.clear()
        self.paths = self._rest.paths = paths
        self._bindings[:] = [weakref.ref(path.module.binding) for path in paths]
        for path in paths:
            path.module.binding.bind(self, path.index)
        self._rest.refresh()

    def _check_paths(self, paths: Sequence[Path]) -> None:
        if self.mode == "sample" and self.freeze != "none":
            refuse_batch_norm(paths)

    @contextlib.contextmanager
    def _opened(self, iteration: Iteration) -> Iterator[Iteration]:
        self._begin(iteration)
        try:
            yield iteration
        except BaseException:
            if self._open is iteration:  # reset() inside has closed it
                self._close(completed=False)
            raise
        if self._open is iteration:
            self._close(completed=True)

    def _open_next(self) -> None:
        iteration = self._drop(None, None) if self._pending is None else self._reuse()
        while not self._starts(iteration):
            iteration = self._drop(None, None) if self._pending is None else self._reuse()
        self._begin(iteration)

    def _starts(self, iteration: Iteration) -> bool:
        """Whether anything can learn in an iteration, which is about to open: an optimizer step without gradients fails
        under AMP. Where nothing can, what follows it is next. Where nothing of the model ever can, what learns is
        elsewhere, and the iteration is run."""
        self._announce(iteration)
        if self._learns_anything(iteration):
            return True
        if iteration.phase == "reuse":
            self._pending = None
            return False
        if not self._can_learn(iteration.dropped_paths):
            return True
        self._pending = iteration
        return False

    def _announce(self, iteration: Iteration) -> None:
        for call in self._on_begin:
            call(iteration)

    def _begin(self, iteration: Iteration) -> None:
        self._pending = None
        self._open = iteration

    def _close(self, completed: bool) -> None:
        iteration = self._open
        assert iteration is not None
        idle: list[nn.Parameter] = []
        if completed and self._looks_left and iteration.phase == ("drop" if self.freeze == "none" else "reuse"):
            self._looks_left -= 1
            idle = self.idle_parameters()
        self._open = None
        iteration.close()
        self._rest.release()
        self._closed.append(iteration)
        if not completed:
            return
        iteration.check_complete()
        self._completed[iteration.phase] += iteration.begun
        if iteration.phase == "drop" and self._can_learn(iteration.dropped_paths):
            self._pending = iteration
        # Last, as whoever makes errors of warnings wants a scheme that goes on all the same.
        self._warn_not_run(iteration)
        self._warn_of_zeros(idle)

    def _end_alternation(self, alternation: Alternation) -> None:
        if self._alternation is alternation:
            state, self._alternation = self.state_dict(), None
            self.reset()
            self.load_state_dict(state)

    def _can_learn(self, dropped: list[int]) -> bool:
        """Whether a reuse iteration has anything to learn."""
        if not dropped or not self._rules.freezes_rest:
            return bool(dropped)
        return any(p.requires_grad for path in dropped for p in self.paths[path].parameters())

    def _rest_learns(self, iteration: Iteration) -> bool:
        return iteration.phase == "drop" or not self._rules.freezes_rest

    def _learns_anything(self, iteration: Iteration) -> bool:
        # Ranks that draw apart and haven't agreed must not leave out what others run.
        anywhere = iteration.mode == "sample" and world_size() > 1
        paths = iteration.learning_paths() if anywhere else iteration.paths_that_learn()
        if any(p.requires_grad for path in paths for p in path.parameters()):
            return True
        if self._alternation is not None and self._alternation.trains_more():
            return True
        if not self._rest_learns(iteration):
            return False
        self._rest.refresh()
        return any(p.requires_grad for p in self._rest.parameters())

    # Warnings, each once

    def _warn(self, message: str, kind: str | None = None) -> None:
        if (kind or message) not in self._warned:
            self._warned.add(kind or message)
            warnings.warn(f"ResidualDropPath: {message}", stacklevel=3)

    def _warn_not_run(self, iteration: Iteration) -> None:
        if not iteration.begun:
            self._warn_not_begun(f"a {iteration.phase} iteration, which is not counted as completed")
            return
        missed: dict[str, list[str]] = {}
        for path in iteration.not_run():
            missed.setdefault(_why_not_run(path.module), []).append(path.name)
        for why, names in missed.items():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._warn(
                f"the model didn't run path {names[0]!r}{others} in a {iteration.phase} iteration in which it was to "
                f"run. Likely reason: {why}. This is said once",
                kind=why,
            )

    def _warn_not_begun(self, where: str) -> None:
        why = "call the model inside the iteration: the one that the scheme was made for, not a copy"
        if not any(path.module.training for path in self.paths):
            why = "the model is in eval mode: call model.train()"
        self._warn(f"no path ran in {where}. Likely reason: {why}", kind=why)

    def _warn_of_zeros(self, idle: list[nn.Parameter]) -> None:
        """Of gradients of zero on what stands still: weight decay and momentum would move it."""
        found = [p.grad for p in idle if p.requires_grad and p.grad is not None]
        plain = [grad for grad in found if type(grad) is Tensor and grad.layout == torch.strided]
        if plain and not any(bool(grad.any()) for grad in reversed(plain)):  # those near the output are the largest
            self._looks_left = 0  # reading values waits for the device
            self._warn(
                f"{len(found)} parameters that take no part in an iteration have gradients of zero instead of None, "
                "with which momentum and weight decay move them: call optimizer.zero_grad(set_to_none=True)"
            )

    def _at_rest(self) -> bool:
        return self._open is None or self._alternation is not None

    def _begun(self) -> bool:
        return self._open is not None and self._open.begun

    def _check_none_open(self) -> None:
        if self._alternation is not None and self._open is not None:
            raise RuntimeError("alternate() has iterations open already: call its handle's remove() first")
        if self._open is not None:
            raise RuntimeError(
                f"a {self.phase} iteration is open, and iterations don't nest: leave it, or call reset()"
            )

    def _draw(self, forwards: tuple[int, ...]) -> PathPlan:
        generator = plan_generator(self.seed, self._drawn, rank() if self.mode == "sample" else 0)
        self._drawn += 1
        drop_probs = [path.drop_prob for path in self.paths]
        whole = [path.index for path in self.paths if path.module.mode == "block"]
        keep = draw_keep(drop_probs, self.mode, self.sampling, generator, forwards, whole)
        return PathPlan(keep, drop_probs, self.mode)


def _freezes_rest_now(scheme: ResidualDropPath | None) -> bool:
    if scheme is None or not scheme._rules.freezes_rest:
        return False
    recomputing = in_backward()
    iteration = scheme._current(recomputing)
    if iteration is None or iteration.phase != "reuse":
        return False
    if not recomputing:
        scheme._look_again(iteration)
    return True


def _remove(handles: dict[int, list[RemovableHandle]], bindings: Iterable[weakref.ref[PathBinding]]) -> None:
    """Takes a scheme off its model. Holds neither of them, so that a model may own its scheme."""
    for handle in itertools.chain.from_iterable(handles.values()):
        handle.remove()
    for reference in bindings:
        binding = reference()
        if binding is not None:
            binding.clear()


def _why_not_run(path_module: PathModule) -> str:
    if not path_module.training:
        return "it is in eval mode, in which a path follows no plan (call train(), or freeze its parameters)"
    if "forward" in vars(getattr(path_module, "block", path_module)):
        return "its forward was replaced on the instance, which runs without its paths"
    return "the model skips layers by itself (switch off its LayerDrop), or doesn't use this one"
