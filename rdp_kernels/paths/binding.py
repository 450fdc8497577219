"""The protocol of what stands for a path, and its binding to the object that decides about its calls."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._utils.checks import host_has
from .._utils.device import to_device
from .._utils.ranks import world_size
from ..kernels.spec import RowSet, compute_dtype, row_set
from ..plan import kept_scale
from .arguments import Args, Kwargs
from .decision import ALL_ROWS, ROWS, SKIP, Decision
from .freezing import ParameterRef
from .parts import BranchParts
from .promotion import Promotion

GraphMask = tuple[Tensor, Tensor | None]
"""The factors of a branch's rows: where they learn, and where they are detached. Float64 `[]` or `[B]`."""


class PathModule(Protocol):
    """What stands for a path: a module itself, or one of the paths of a converted block.

    `promotion` gives the sum the dtype that torch's own add would give it. Where it is None, the sum has the residual's
    dtype. `norm` is the norm before the branch. It is kept apart so that it can be fused with the gather of rows.
    """

    binding: PathBinding
    training: bool
    drop_prob: float
    scale_by_keep: bool
    gamma: nn.Parameter | None
    shortcut: nn.Module | None
    channel_dim: int

    @property
    def mode(self) -> str: ...
    @property
    def activation(self) -> str | None: ...
    @property
    def promotion(self) -> Promotion | None: ...
    @property
    def norm(self) -> nn.Module | None: ...
    def branch_modules(self) -> list[nn.Module]:
        """The modules whose parameters are the path's."""

    def own_parameters(self) -> list[ParameterRef]:
        """The path's parameters outside of these modules, gamma among them."""

    def run_branch(self, x: Tensor, args: Args, kwargs: Kwargs, normed: bool = False) -> Tensor:
        """The branch's output, before γ. With `normed`, x is the norm's output already."""

    def map_rows(
        self, function: Callable[[Tensor], Tensor], batch_size: int | None, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """The further arguments, with `function` applied to those that have a row for each sample. Raises `ValueError`
        where such an argument doesn't have `batch_size` rows; None skips that check."""


class Decider(Protocol):
    """Decides how calls of a path run, in training mode: `StochasticDepth`, or an iteration of a scheme.

    `phase` is `"drop"` or `"reuse"` while an iteration is open, else None. `is_in_frozen_rest` is True while a module
    around the path runs frozen, which then refuses second derivatives itself.
    """

    @property
    def phase(self) -> str | None: ...
    @property
    def is_in_frozen_rest(self) -> bool: ...
    def decide(self, module: PathModule, x: Tensor) -> Decision: ...


class StochasticDepth:
    """Decides for a path without an iteration: ordinary stochastic depth at the path's own drop probability."""

    phase = None
    is_in_frozen_rest = False

    def decide(self, module: PathModule, x: Tensor) -> Decision:
        """Draws from torch's global CPU generator; in a graph, from the device's."""
        drop_prob = module.drop_prob
        if drop_prob == 0:
            return ALL_ROWS
        scale = kept_scale(drop_prob, module.scale_by_keep)
        count = x.shape[0] if module.mode == "sample" else 1
        device = x.device if torch.compiler.is_compiling() else "cpu"
        drawn = torch.rand(count, dtype=torch.float32, device=device)
        on_host = host_has(drawn)
        if on_host and count and drawn.min().item() >= drop_prob:
            return _all_rows(scale)  # saves the time of a comparison
        keep = drawn >= drop_prob
        if not on_host:
            return Decision(row_scale=to_device(keep.to(compute_dtype(x)) * scale, x.device))
        rows = keep.nonzero().flatten()
        if len(rows) == 0:
            # Every rank gets a gradient, as with other libraries' drop-path: DDP and FSDP need one from each.
            return Decision(SKIP, dummy_calls=("learning",) if world_size() > 1 else ())
        # Other devices get the inverse with the rows, by one copy. The compiled library on a CPU needs none.
        return Decision(ROWS, RowSet(rows, len(rows)) if x.is_cpu else row_set(keep, x.device), scale)


@functools.lru_cache(1024)  # more rates than models have
def _all_rows(scale: float) -> Decision:
    return Decision(scale=scale)


STOCHASTIC_DEPTH = StochasticDepth()


class PathBinding:
    """Ties a path to the scheme that decides for it, which it holds weakly. A copy or pickle of the path's module has a
    binding without a scheme."""

    def __init__(self, decider: Decider = STOCHASTIC_DEPTH):
        self.decider = decider
        self.index, self.name = -1, ""
        """The path's index and name in its scheme."""
        self._scheme: weakref.ref[Any] | None = None
        self.branch_runner: BranchRunner | None = None
        """Runs the branch in place of the path's `run_branch`, for example compiled or captured."""
        self.graph_mask: GraphMask | None = None
        """The plan as data, where the whole model is compiled."""
        self.call_override: Callable[[Any, Tensor], Tensor] | None = None
        """A `CallOverride`: replaces the whole call."""
        self.parts: BranchParts | None = None
        """The modules of the branch when they were last looked up. Ask `path.parts_of`, which looks whether they
        changed."""

    @property
    def scheme(self) -> Any:
        """The `ResidualDropPath`, or None."""
        return None if self._scheme is None else self._scheme()

    def bind(self, scheme: object, decider: Decider, index: int, name: str) -> None:
        self._scheme, self.decider = weakref.ref(scheme), decider
        self.index, self.name = index, name

    def clear(self) -> None:
        self._scheme = self.graph_mask = None
        self.decider, self.name = STOCHASTIC_DEPTH, ""

    def __reduce__(self) -> tuple[type[PathBinding], tuple[()]]:
        return PathBinding, ()


BranchRunner = Callable[[PathModule, Tensor, Args, Kwargs, bool], Tensor]
"""`run_branch` of any path: path_module, x, args, kwargs, normed."""


def not_a_tensor(module: PathModule, what: str, out: object) -> TypeError:
    advice = ""
    if isinstance(out, (tuple, list)):
        advice = "; wrap it in a module whose forward returns that tensor alone, as in `self.attention(...)[0]`"
    return TypeError(f"the {what} of {name_of(module)} must return a tensor, got {type(out).__name__}{advice}")


def name_of(module: PathModule) -> str:
    """A path's name for messages: its name in a scheme, else a description of its module."""
    if module.binding.scheme is not None:
        return f"path {module.binding.name!r}"
    fn = getattr(module, "fn", None)
    return repr(module) if fn is None else f"a {type(module).__name__} of {type(fn).__name__}"
