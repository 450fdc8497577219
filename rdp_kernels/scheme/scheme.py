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
    """Trains a model by the two-iteration ResidualDroppath scheme (arXiv 2411.09475).

    A path is a residual branch with its add. A *drop* iteration leaves out random paths, and everything that runs
    learns. The *reuse* iteration that follows runs every path, and only the paths that were left out learn. At
    inference the model is the ordinary one.

    Nothing is added to the model's `state_dict`, and copies and pickles of the model carry no scheme. If a module has
    its scheme as an attribute, its copies have a `NoScheme` there. The scheme itself can't be copied: save its
    `state_dict`. When an iteration opens, the scheme looks up what belongs to which path and to the rest, which is
    everything outside of the branches.

    The scheme warns once if all rates are 0, if the model is in eval mode or doesn't run a path, and if parameters that
    don't learn have gradients of zero instead of None.

    Args:
        model: a network with paths, built from `ResidualBranch` or converted by `convert`.
        drop_prob: P(drop) of every path, in [0, 1]. None, the default, reads each path's own `drop_prob` at each draw.
        schedule: `"constant"` (default), or `"linear"`, which grows from 0 to `drop_prob` over depth. It needs a
            number as `drop_prob`.
        mode: `"block"` (default) decides for the whole batch, as in the paper; `"sample"` decides for each sample.
        freeze: what frozen means in the reuse iteration. `"parameters"` (default) is exact: frozen weights get no
            gradient, and the gradients of activations flow through every path. `"branch"` is approximate and cheapest:
            gradients pass a frozen path through the residual only. `"none"` is a control in which everything learns.
        sampling: `"bernoulli"` (default) draws independently. `"fixed"` has the same rates, but counts that vary as
            little as possible.
        scale_by_keep: whether kept branches are scaled by 1 / (1 − p) in the drop iteration. Default: True.
        train_rest: whether the rest of the model (stem, head, final norm, shortcuts) learns in the reuse iteration
            too. Default: False.
        freeze_bn: what frozen BatchNorm does in training mode. With True, the default, it normalises by the batch and
            leaves its running statistics as they are. With `"running"` it normalises by its running statistics, as at
            inference, and leaves them as they are. That saves memory and is meant for fine-tuning: from scratch, the
            running statistics lag behind the weights, and the loss of reuse iterations can explode. With False it
            normalises by the batch and updates its running statistics.
        seed: the seed of the masks; pass your run's. Masks depend only on it and on the number of plans that were drawn
            before, and in sample mode on the rank of `torch.distributed`. Default: 0.

    Raises:
        ValueError: if an argument has a wrong value, if the model has no paths or has a path inside another, or if a
            branch has a BatchNorm that would have to be frozen for some samples only.
        TypeError: if an argument has a wrong type.
        RuntimeError: if a path of the model has a scheme already.

    Example:
        >>> branches = [rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)]
        >>> model = nn.Sequential(*branches, nn.Linear(8, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> loader = [(torch.randn(16, 8), torch.randint(2, (16,)))]
        >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
        >>> for images, labels in loader:
        ...     for phase in scheme.iterations(len(images)):  # "drop", then "reuse"
        ...         nn.functional.cross_entropy(model(images), labels).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad(set_to_none=True)
        ...         print(phase, scheme.plan.dropped_paths)
        drop [0, 1, 2]
        reuse [0, 1, 2]
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
                "every path's drop_prob is 0: until that changes, drawn plans drop nothing, which is plain training"
            )

    def __repr__(self) -> str:
        drop_probs = {path.drop_prob for path in self.paths}
        rates = "–".join(f"{p:g}" for p in sorted({min(drop_probs), max(drop_probs)}))
        pending = ", reuse_pending=True" if self.reuse_pending and self.phase is None else ""
        return (
            f"ResidualDropPath({len(self.paths)} paths, drop_prob={rates}, mode={self.mode!r}, freeze={self.freeze!r}, "
            f"sampling={self.sampling!r}, seed={self.seed}, phase={self.phase!r}{pending})"
        )

    @property
    def paths(self) -> list[Path]:
        """The model's paths, in the order of the rows of a plan: that in which the model registers them."""
        return self._pairs.paths

    @property
    def mode(self) -> str:
        """`"block"` or `"sample"`, as it was given."""
        return self._pairs.mode

    @property
    def freeze(self) -> str:
        """`"parameters"`, `"branch"` or `"none"`, as it was given."""
        return self._rules.freeze

    @property
    def sampling(self) -> str:
        """`"bernoulli"` or `"fixed"`, as it was given."""
        return self._pairs.sampling

    @property
    def seed(self) -> int:
        """The seed of the masks. It can be set, and then holds for the plans that are drawn from then on."""
        return self._pairs.seed

    @seed.setter
    def seed(self, seed: int) -> None:
        self._pairs.seed = seed

    @property
    def plan(self) -> PathPlan | None:
        """The plan of the open or pending iteration; None before a pair of iterations and after it."""
        iteration = self._pairs.open or self._pairs.pending
        return None if iteration is None else iteration.plan

    @property
    def phase(self) -> str | None:
        """`"drop"` or `"reuse"` while that iteration is open, else None."""
        return self._pairs.history.phase

    @property
    def reuse_pending(self) -> bool:
        """Whether a reuse iteration is next, because the last plan dropped paths that can learn and haven't yet."""
        return self._pairs.pending is not None

    def learning_parameters(self) -> list[nn.Parameter]:
        """Lists the parameters that can get a gradient in the open iteration.

        In block mode these are exactly the parameters that learn under the plan, and they are the same on every rank.
        In sample mode each rank draws its own plan. There the list has the parameters that may learn on any rank or,
        after `integrations.distributed.agree`, those that do.

        Returns:
            The parameters, each once. The list is empty if no iteration is open.
        """
        return self._pairs.learning_parameters()

    def idle_parameters(self) -> list[nn.Parameter]:
        """Lists the model's other parameters, which get no gradient in the open iteration.

        Returns:
            The parameters, each once. If no iteration is open, these are all parameters of the model.
        """
        return self._pairs.idle_parameters()

    # Opening and closing

    @contextlib.contextmanager
    def drop_iteration(self, batch_size: BatchSize = None, *, plan: PathPlan | None = None) -> Iterator[PathPlan]:
        """Opens a drop iteration, in which random paths are left out and everything that runs learns.

        The forward, the backward and the optimizer step go inside. An exception inside closes the iteration and
        discards its plan.

        Args:
            batch_size: in sample mode the number of samples, or a sequence with one entry for each forward, in order.
                Block mode doesn't need it and fits any number and size of forwards. Default: None.
            plan: a `PathPlan` to carry out, whatever it drops. None, the default, draws a plan.

        Yields:
            PathPlan: the plan of the iteration.

        Raises:
            RuntimeError: if an iteration is open, or if the plan that is drawn drops everything that can learn. In the
                second case its reuse iteration is pending, as after a drop iteration.
            ValueError: if `batch_size` is missing in sample mode, or if `plan` doesn't fit the scheme.
            TypeError: if an argument has a wrong type.

        Example:
            >>> model = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)))
            >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
            >>> with scheme.drop_iteration() as plan:
            ...     model(torch.randn(16, 8)).square().mean().backward()
            >>> plan.dropped_paths, scheme.reuse_pending
            ([0, 1, 2], True)
        """
        pairs = self._pairs
        iteration = pairs.drop(batch_size, plan)
        if plan is None and pairs.drops_all(iteration):
            pairs.pending = iteration
            raise RuntimeError(
                "drop_iteration(): its plan drops every path that can learn, and nothing else can learn, so that there "
                "is nothing to run. The reuse iteration is pending: continue with reuse_iteration(), or loop over "
                "iterations(), which does so by itself"
            )
        with pairs.opened(iteration):
            yield iteration.plan

    @contextlib.contextmanager
    def reuse_iteration(self) -> Iterator[PathPlan]:
        """Opens the reuse iteration that follows the last drop iteration.

        Every path runs, and the paths that were dropped learn. The forward, the backward and the optimizer step go
        inside.

        Yields:
            PathPlan: the plan of the drop iteration.

        Raises:
            RuntimeError: if an iteration is open, if there was no drop iteration before or it dropped nothing that can
                learn, or if the model's paths have changed since. Check `reuse_pending`, or use `iterations`, which
                does so.

        Example:
            >>> model = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)))
            >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
            >>> x = torch.randn(16, 8)
            >>> with scheme.drop_iteration():
            ...     model(x).square().mean().backward()
            >>> if scheme.reuse_pending:
            ...     with scheme.reuse_iteration():
            ...         model(x).square().mean().backward()
        """
        iteration = self._pairs.reuse()
        if not self._pairs.starts(iteration):
            self._pairs.refuse_reuse()
        with self._pairs.opened(iteration):
            yield iteration.plan

    def iterations(self, batch_size: BatchSize = None, *, plan: PathPlan | None = None) -> Generator[str, None, None]:
        """Opens the iterations of one pair in turn, so that a loop's body is written once.

        A pending reuse iteration, after `load_state_dict` for example, is the only one. If the plan drops everything
        that can learn, the drop iteration is left out, as nothing would learn in it. (Drawing another plan would change
        the rates.) Only the scheme's own model counts here, so make the scheme for the module that holds everything
        that learns. Leaving the loop early, by `break` or by an exception, abandons the pair.

        An iteration is open in the loop's body, so the state can't be saved there. To save between the two iterations
        of a pair, use `drop_iteration` and `reuse_iteration`.

        Args:
            batch_size: as in `drop_iteration`.
            plan: as in `drop_iteration`.

        Yields:
            str: `"drop"`, then `"reuse"` if anything was dropped that can learn.

        Raises:
            RuntimeError: if an iteration is open, or if the model's paths have changed between the iterations of a
                pair.
            ValueError: if an argument is wrong as in `drop_iteration`, or if it contradicts a pending reuse iteration.
            TypeError: if an argument has a wrong type.

        Example:
            >>> model = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)))
            >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, mode="sample", seed=0)
            >>> for phase in scheme.iterations([16, 8]):  # two forwards in each iteration
            ...     for x in torch.randn(24, 8).split([16, 8]):
            ...         model(x).square().mean().backward()
            ...     print(phase)
            drop
            reuse
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
        """Lets every `optimizer.step()` end an iteration and open the next, for loops that can't be rewritten.

        The first iteration opens at once, and each iteration gets the loop's next batch. Steps that a GradScaler skips
        don't count. Between a step and the next forward the layers of the model may be changed, but its paths may only
        be changed before this call or after `remove()`. Only block mode is supported, as the size of the next batch
        isn't known.

        Args:
            optimizer: the optimizer that the loop steps, also as accelerate or Lightning wraps it.

        Returns:
            A handle. Its `remove()` ends the alternation and leaves no iteration open.

        Raises:
            ValueError: if the scheme is in sample mode, or if the optimizer has no parameter of the model.
            TypeError: if `optimizer` isn't an optimizer.
            RuntimeError: if an iteration is open.

        Example:
            >>> model = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)))
            >>> optimizer = torch.optim.AdamW(model.parameters())
            >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
            >>> handle = scheme.alternate(optimizer)
            >>> for x in torch.randn(2, 16, 8):  # a loop that knows nothing of the scheme
            ...     model(x).square().mean().backward()
            ...     print(scheme.phase)
            ...     optimizer.step()
            ...     optimizer.zero_grad()
            drop
            reuse
            >>> handle.remove()
        """
        if self.mode != "block":
            raise ValueError(
                "alternate needs mode='block': in sample mode it would have to know the size of the next batch"
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
        """Closes the open iteration and forgets the plan, for example after an exception in a notebook.

        Under `alternate` the next iteration then opens.
        """
        self._pairs.reset()
        if self._alternation is not None:
            self._pairs.open_next()

    def remove(self) -> None:
        """Removes the scheme from its model. The model is then as before."""
        if self._alternation is not None:
            self._alternation.remove()
        self.reset()
        self._on_begin.clear()
        self._rest.release()
        self._pairs.remove()

    def estimate(self, example_inputs: Any, *, timed: bool = True) -> Any:
        """Estimates what iterations cost on batches like `example_inputs`, before training.

        It compares FLOPs, bytes saved for the backward and time with those of plain training, in each mode, at the
        scheme's own rates and at others, and gives a recommendation. It measures a copy of the model, whose branches
        aren't compiled. The model and the scheme don't change.

        Args:
            example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments, samples in dimension 0, of
                the batch size and on the device of the training.
            timed: whether to measure time, in seconds, which takes some tens of training steps. With False, FLOPs are
                used instead. Default: True.

        Returns:
            An `rdp_kernels.estimate.Estimate`; `print` shows it as a table.

        Raises:
            RuntimeError: if an iteration is open.
            TypeError: if `timed` isn't a bool.
            ValueError: if the model can't be copied, can't run on `example_inputs`, or recomputes calls of its paths.

        Example:
            >>> model = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)))
            >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
            >>> estimate = scheme.estimate(torch.randn(16, 8), timed=False)
        """
        from ..estimate import estimate  # the one import of a higher floor, which most trainings don't need

        return estimate(self, example_inputs, timed)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Returns what resuming needs, in plain types: seed, number of plans drawn, pending plan, counters.

        Under `alternate`, where an iteration is always open, it works at any time: resuming starts over with the open
        iteration, whose optimizer step was still to come. In sample mode each rank saves its own state.

        Returns:
            A dict of plain types: `mode` and `num_paths`, which the loading scheme must have too; `seed`; `drawn`, the
            number of plans drawn so far; `completed`, the number of iterations of each kind; `phase`, the iteration
            that comes next. If that is `"reuse"`, `plan` is its plan, with `keep` False for a path (in sample mode: a
            path and sample) that was dropped and is to learn, and `forwards` has the batch sizes of its forwards (empty
            if none were given).

        Raises:
            RuntimeError: if an iteration is open, except under `alternate`.

        Example:
            >>> model = nn.Sequential(*(rdp.ResidualBranch(nn.Linear(8, 8)) for _ in range(4)))
            >>> scheme = rdp.ResidualDropPath(model, drop_prob=0.5, seed=0)
            >>> state = {"model": model.state_dict(), "scheme": scheme.state_dict()}
            >>> scheme.load_state_dict(state["scheme"])
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
        """Continues where `state_dict` was taken.

        The same plans follow, and a reuse iteration that was pending is pending again. If an error is raised, the
        scheme is as before.

        Args:
            state: a result of `state_dict`, of a scheme with the same mode and number of paths.

        Raises:
            ValueError: if the state is damaged, or is of another mode or number of paths.
            RuntimeError: if an iteration is open, except under `alternate`.
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
        if not any(isinstance(copied, nn.Module) for copied in memo.values()):  # the scheme is copied by itself
            raise TypeError(COPIED)
        return NoScheme()

    def __reduce__(self) -> tuple[type[NoScheme], tuple[()]]:
        warnings.warn(f"the scheme is pickled as a NoScheme: {COPIED}", stacklevel=2)
        return NoScheme, ()

    def _end_alternation(self, alternation: Alternation) -> None:
        if self._alternation is alternation:
            state, self._alternation, self._pairs.trains_more = self.state_dict(), None, None
            self._pairs.reset()
            self.load_state_dict(state)
