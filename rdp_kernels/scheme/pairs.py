"""Makes, opens and closes the pairs of iterations of a scheme."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .._utils.autograd import in_backward
from .._utils.ranks import rank, world_size
from ..paths.binding import STOCHASTIC_DEPTH, Decider, PathBinding, PathModule
from ..paths.decision import Decision
from ..paths.path import Path, find_paths, refuse_batch_norm
from ..plan import PathPlan, draw_keep, plan_generator
from .iteration import Iteration, Rules, check_plan
from .notices import Notices
from .rest import Rest
from .state import PHASES, BatchSize, State, forwards_of

MOST_CLOSED = 16
"""How many closed iterations are kept. Loops run an iteration's last backward before so many others have closed."""


class History:
    """Decides for the paths of a scheme while no iteration is open. It holds no reference to the scheme, which would
    then live as long as its paths."""

    def __init__(self, model: nn.Module, paths: Sequence[Path], rules: Rules):
        self.open: Iteration | None = None
        self.closed: deque[Iteration] = deque(maxlen=MOST_CLOSED)
        self._rules = rules
        itself = weakref.ref(self)
        self.rest = Rest(model, paths, lambda: (it := itself()) is not None and it._freezes_rest(), rules.freeze_bn)

    @property
    def phase(self) -> str | None:
        return None if self.open is None else self.open.phase

    @property
    def is_in_frozen_rest(self) -> bool:
        return self.rest.runs_frozen

    def decide(self, module: PathModule, x: Tensor) -> Decision:
        recomputing = in_backward()
        iteration = self._current(recomputing)
        if iteration is None:
            return STOCHASTIC_DEPTH.decide(module, x)
        return iteration.decide(module, x, recomputing)

    def _current(self, recomputing: bool) -> Iteration | None:
        """The open iteration or, in a recomputation, the iteration of that forward, found by the sequence number of the
        autograd node."""
        if not recomputing:
            return self.open
        node = torch._C._current_autograd_node()._sequence_nr()
        for iteration in (self.open, *reversed(self.closed)):
            if iteration is not None and iteration.first_node <= node < iteration.last_node:
                return iteration
        if len(self.closed) == MOST_CLOSED and node < self.closed[0].first_node:
            raise RuntimeError(f"checkpointing recomputes a forward from more than {MOST_CLOSED} iterations ago")
        return None

    def _freezes_rest(self) -> bool:
        """Whether a module of the rest runs frozen if it is called now."""
        recomputing = in_backward()
        iteration = self._current(recomputing) if self._rules.freezes_rest else None
        if iteration is None or iteration.phase != "reuse":
            return False
        if not recomputing:
            iteration.look_again()
        return True


class Pairs:
    """Makes the iterations of a scheme and opens them: drop, then reuse if anything was dropped that can learn.

    Args:
        scheme: the `ResidualDropPath`, held weakly. Paths are bound to it, and released when it dies.
        model: the scheme's model.
        rules: the scheme's options that decide how a plan is carried out.
        rates: the drop probability and the schedule.
        mode: as in `ResidualDropPath`.
        sampling: as in `ResidualDropPath`.
    """

    def __init__(
        self, scheme: object, model: nn.Module, rules: Rules, rates: tuple[float | None, str], mode: str, sampling: str
    ):
        self.rules, self._rates, self.mode, self.sampling = rules, rates, mode, sampling
        self.paths = find_paths(model, *rates)
        self._check_paths(self.paths)
        self.seed, self.drawn = 0, 0
        """The seed of the plans, and how many of them have been drawn."""
        self.completed = dict.fromkeys(PHASES, 0)
        self.pending: Iteration | None = None
        """A finished drop iteration whose dropped paths are still to learn."""
        self.on_begin: list[Callable[[Iteration], None]] = []
        """Called with an iteration before it opens. If a call raises, the iteration doesn't open, and its pair stays
        pending."""
        self.trains_more: Callable[[], bool] | None = None
        """Under `alternate`: whether the optimizer has parameters outside of the model that can learn."""
        self.notices = Notices()
        self.history, self._scheme = History(model, self.paths, rules), weakref.ref(scheme)
        self.rest, self._bindings = self.history.rest, list[weakref.ref[PathBinding]]()
        self._bind()
        self.remove = weakref.finalize(scheme, _remove, self.rest.handles, self._bindings)

    @property
    def open(self) -> Iteration | None:
        return self.history.open

    # What can learn

    def learning_parameters(self) -> list[nn.Parameter]:
        """See `ResidualDropPath.learning_parameters`."""
        if self.open is None:
            return []
        found = [p for path in self.open.learning_paths() for p in path.parameters()]
        if self._rest_learns(self.open):
            self.rest.refresh()
            found += self.rest.parameters()
        return [p for p in {id(p): p for p in found}.values() if p.requires_grad]

    def idle_parameters(self) -> list[nn.Parameter]:
        """The other parameters of the model: all of them, where no iteration is open."""
        learning = {id(p) for p in self.learning_parameters()}
        return [p for p in self.rest.model.parameters() if id(p) not in learning]

    def drops_all(self, iteration: Iteration) -> bool:
        """Whether nothing learns in a drop iteration because its plan drops everything that can learn."""
        return not self._learns_anything(iteration) and self._can_learn(iteration.dropped_paths)

    def _can_learn(self, dropped: list[int]) -> bool:
        """Whether anything can learn in a reuse iteration with these `dropped` paths."""
        if not dropped or not self.rules.freezes_rest:
            return bool(dropped)
        return any(p.requires_grad for path in dropped for p in self.paths[path].parameters())

    def _rest_learns(self, iteration: Iteration) -> bool:
        return iteration.phase == "drop" or not self.rules.freezes_rest

    def _learns_anything(self, iteration: Iteration) -> bool:
        # Where ranks draw their own plans and haven't agreed, none may leave out an iteration that others run.
        paths = iteration.learning_paths(anywhere=iteration.mode == "sample" and world_size() > 1)
        if any(p.requires_grad for path in paths for p in path.parameters()):
            return True
        if self.trains_more is not None and self.trains_more():
            return True
        if not self._rest_learns(iteration):
            return False
        self.rest.refresh()
        return any(p.requires_grad for p in self.rest.parameters())

    # Making iterations

    def drop(self, batch_size: BatchSize = None, plan: PathPlan | None = None) -> Iteration:
        """The drop iteration of a new pair. Draws its plan unless one is given."""
        self.check_none_open()
        self._look_up_paths()
        forwards = self._forwards(batch_size, plan)
        if plan is None:
            plan = self._draw(forwards)
        else:
            check_plan(plan, self.paths, self.mode, forwards, self.rules)
        return self._announced(self._iteration("drop", plan, forwards))

    def reuse(self) -> Iteration:
        """The reuse iteration that is pending."""
        self.check_none_open()
        if self.pending is None:
            self.refuse_reuse()
        self._look_up_paths()
        self.rest.refresh()
        if self.rest.nested:
            find_paths(self.rest.model)  # raises
        return self._announced(self._iteration("reuse", self.pending.plan, self.pending.forwards))

    def refuse_reuse(self) -> NoReturn:
        raise RuntimeError(
            "reuse_iteration() needs a drop iteration before it that dropped something that can learn: check "
            "reuse_pending, or loop over iterations()"
        )

    def check_none_open(self) -> None:
        if self.open is not None and self.trains_more is not None:
            raise RuntimeError("alternate() has iterations open already: call its handle's remove() first")
        if self.open is not None:
            raise RuntimeError(
                f"a {self.open.phase} iteration is open, and iterations don't nest: leave it, or call reset()"
            )

    def _announced(self, iteration: Iteration) -> Iteration:
        for call in self.on_begin:
            call(iteration)
        return iteration

    def _iteration(self, phase: str, plan: PathPlan, forwards: tuple[int, ...]) -> Iteration:
        return Iteration(phase, plan, self.rules, self.rest, self.history, forwards)

    def _forwards(self, batch_size: BatchSize, plan: PathPlan | None) -> tuple[int, ...]:
        forwards = () if batch_size is None else forwards_of(batch_size)
        if self.mode == "block":
            return ()
        if batch_size is None:
            if plan is None:
                raise ValueError(
                    "batch_size must be given in sample mode: the number of samples, or one for each forward"
                )
            forwards = () if plan.batch_size is None else (plan.batch_size,)
        if not forwards:
            raise ValueError("batch_size must have an entry for each forward, got none")
        return forwards

    def _draw(self, forwards: tuple[int, ...]) -> PathPlan:
        generator = plan_generator(self.seed, self.drawn, rank() if self.mode == "sample" else 0)
        self.drawn += 1
        drop_probs = [path.drop_prob for path in self.paths]
        blockwise = [path.index for path in self.paths if path.module.mode == "block"]
        keep = draw_keep(drop_probs, self.mode, self.sampling, generator, forwards, blockwise)
        return PathPlan(keep, drop_probs, self.mode)

    # Opening and closing

    def starts(self, iteration: Iteration) -> bool:
        """Whether `iteration` is to be opened: whether anything can learn in it.

        An optimizer step without gradients fails under AMP. An iteration in which nothing can learn is therefore left
        out, and the next one follows. If nothing in the model can ever learn, something outside of it does, and the
        iteration runs.
        """
        if iteration.phase == "drop":
            if not self.drops_all(iteration):
                return True
            self.pending = iteration
            return False
        if self._learns_anything(iteration):
            return True
        self.pending = None
        return False

    @contextlib.contextmanager
    def opened(self, iteration: Iteration) -> Iterator[None]:
        self.begin(iteration)
        try:
            yield
        except BaseException:
            if self.open is iteration:  # reset() inside has closed it
                self.close(completed=False)
            raise
        if self.open is iteration:
            self.close(completed=True)

    def open_next(self) -> None:
        """Under `alternate`: opens the next iteration in which anything can learn."""
        while True:
            iteration = self.drop() if self.pending is None else self.reuse()
            if self.starts(iteration):
                break
        iteration.is_provisional = iteration.phase == "reuse"
        self.begin(iteration)

    def begin(self, iteration: Iteration) -> None:
        self.pending, self.history.open = None, iteration
        self._hand_over(iteration)

    def close(self, completed: bool) -> None:
        iteration, idle = self.open, []
        assert iteration is not None
        leaves_idle = iteration.phase == ("drop" if self.rules.freeze == "none" else "reuse")
        if completed and leaves_idle and self.notices.looks_at_gradients():
            idle = self.idle_parameters()
        iteration.close()
        self.rest.release()
        self.history.open = None
        self.history.closed.append(iteration)
        self._hand_over(self.history)
        if not completed:
            return
        iteration.check_complete()
        self.completed[iteration.phase] += iteration.begun
        if iteration.phase == "drop" and self._can_learn(iteration.dropped_paths):
            self.pending = iteration
        # These come last: a filter may turn warnings into errors, and the scheme has to be in order then too.
        self.notices.warn_not_run(iteration)
        self.notices.warn_of_zeros(idle)

    def reset(self) -> None:
        """Closes the open iteration and forgets the plan."""
        if self.open is not None:
            self.close(completed=False)
        self.pending = None

    def load(self, state: State) -> None:
        """Continues from `state`, which must fit the paths."""
        self.reset()
        self.seed, self.drawn, self.completed = state.seed, state.drawn, dict(state.completed)
        if state.plan is not None:
            self.pending = self._iteration("drop", state.plan, state.forwards)

    def _hand_over(self, decider: Decider) -> None:
        for path in self.paths:
            path.module.binding.decider = decider

    # The paths

    def _look_up_paths(self) -> None:
        """Finds the model's paths again if they changed. Raises `RuntimeError` between the iterations of a pair."""
        path_modules = self.rest.path_modules()
        if path_modules == [path.module for path in self.paths]:
            return
        if self.pending is not None:
            raise RuntimeError(
                "the model's paths have changed since the drop iteration, whose plan is for the earlier paths: "
                "call reset()"
            )
        before = {id(path.module): path.module for path in self.paths}
        paths = find_paths(self.rest.model, *self._rates, known=before)
        self._check_paths(paths)
        for path_module in before.values():
            path_module.binding.clear()
        self.paths = self.rest.paths = paths
        self._bind()
        self.rest.refresh()

    def _bind(self) -> None:
        scheme = self._scheme()
        assert scheme is not None
        self._bindings[:] = [weakref.ref(path.module.binding) for path in self.paths]
        for path in self.paths:
            path.module.binding.bind(scheme, self.history, path.index, path.name)

    def _check_paths(self, paths: Sequence[Path]) -> None:
        if self.mode == "sample" and self.rules.freeze != "none":
            refuse_batch_norm(paths)


def _remove(handles: dict[int, list[RemovableHandle]], bindings: Iterable[weakref.ref[PathBinding]]) -> None:
    """Removes a scheme from its model. It holds neither of the two, so that a model may own its scheme."""
    for handle in itertools.chain.from_iterable(handles.values()):
        handle.remove()
    for reference in bindings:
        binding = reference()
        if binding is not None:
            binding.clear()
