"""What is dropped: rates over depth, the plan of an iteration, and how plans are drawn.

Pure functions of their arguments and of an explicit generator: nothing here reads or moves torch's global generator.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._utils.checks import check_choice, check_count, check_probability

MODES = ("sample", "block")
SCHEDULES = ("constant", "linear")
SAMPLINGS = ("bernoulli", "fixed")


def drop_path_rates(drop_prob: float, num_paths: int, schedule: str = "constant") -> list[float]:
    """Computes a list of drop probabilities, constant or growing over depth.

    Args:
        drop_prob: P(drop) in [0, 1]: of every path, or of the last one.
        num_paths: the number of paths, at least 0.
        schedule: `"constant"` gives every path `drop_prob`. `"linear"` grows from 0 at the first path to `drop_prob` at
            the last (Huang et al., arXiv 1603.09382). It has the values of timm's linspace, so a single path gets 0.

    Returns:
        A list of `num_paths` probabilities.

    Raises:
        TypeError: if `drop_prob` isn't a number, or `num_paths` isn't an integer.
        ValueError: if `drop_prob` isn't in [0, 1], `num_paths` is negative, or `schedule` is unknown.

    Example:
        >>> rdp.drop_path_rates(0.5, 5, schedule="linear")
        [0.0, 0.125, 0.25, 0.375, 0.5]
    """
    drop_prob = check_probability("drop_prob", drop_prob)
    num_paths = check_count("num_paths", num_paths)
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return [drop_prob] * num_paths
    return [drop_prob * path / max(num_paths - 1, 1) for path in range(num_paths)]


def kept_scale(drop_prob: float, scale_by_keep: bool) -> float:
    """The factor of a branch's kept rows in training: 1 / (1 − p), or 1 (with p = 1 nothing is kept)."""
    return 1.0 / (1.0 - drop_prob) if scale_by_keep and drop_prob < 1 else 1.0


class PathPlan:
    """The choice of which paths a drop iteration keeps, for the whole batch or for each sample.

    A `ResidualDropPath` scheme draws a plan for each drop iteration. A plan of your own goes to its `iterations` or
    `drop_iteration` as `plan=`. The arguments are also attributes. Plans are compared by value.

    Args:
        keep: bool CPU tensor, `[paths]` in block mode, `[paths, batch]` in sample mode; False means dropped. It is
            copied, so that a plan doesn't change once it is made.
        drop_probs: the drop probability p of each path, in [0, 1], from which the scale 1 / (1 − p) of kept branches
            follows.
        mode: `"block"` (one decision for the whole batch) or `"sample"` (one for each sample).

    Raises:
        TypeError: if `keep` isn't a bool tensor, or an entry of `drop_probs` isn't a number.
        ValueError: if `keep` has the wrong shape or isn't on the CPU, if `drop_probs` has another length than `keep` or
            an entry outside of [0, 1], or if `mode` is unknown.

    Example:
        >>> plan = rdp.PathPlan(torch.tensor([True, False, True]), [0.1, 0.2, 0.3], mode="block")
        >>> plan
        PathPlan(mode='block', keep=2 of 3 kept)
        >>> plan.dropped_paths
        [1]
    """

    def __init__(self, keep: Tensor, drop_probs: Sequence[float], mode: str):
        check_choice("mode", mode, MODES)
        if not isinstance(keep, Tensor) or keep.dtype != torch.bool:
            came = keep.dtype if isinstance(keep, Tensor) else type(keep).__name__
            raise TypeError(f"keep must be a bool tensor, got {came}")
        if keep.device.type != "cpu":
            raise ValueError(
                f"keep must be on the CPU, where row counts are known without synchronising, got {keep.device}"
            )
        wanted = "[paths]" if mode == "block" else "[paths, batch]"
        if keep.dim() != (1 if mode == "block" else 2):
            raise ValueError(f"keep must have shape {wanted} in {mode} mode, got {list(keep.shape)}")
        if len(drop_probs) != keep.shape[0]:
            raise ValueError(
                f"drop_probs must have an entry for each of the {keep.shape[0]} rows of keep, got {len(drop_probs)}"
            )
        self.keep = keep.clone()
        self.drop_probs = tuple(  # most are plain floats, which take no call
            p if type(p) is float and 0.0 <= p <= 1.0 else check_probability(f"drop_probs[{i}]", p)
            for i, p in enumerate(drop_probs)
        )
        self.mode = mode

    @property
    def num_paths(self) -> int:
        """The number of paths that the plan decides for."""
        return self.keep.shape[0]

    @property
    def batch_size(self) -> int | None:
        """The number of samples that the plan decides for. It is None in block mode, where a plan fits any batch."""
        return self.keep.shape[1] if self.mode == "sample" else None

    @property
    def dropped_paths(self) -> list[int]:
        """Indices of the paths that are dropped for at least one sample. They learn in the reuse iteration."""
        dropped = ~self.keep if self.mode == "block" else (~self.keep).any(dim=1)
        return dropped.nonzero().flatten().tolist()

    def state_dict(self) -> dict[str, Any]:
        """The plan in plain Python types.

        Returns:
            A dict for `from_state_dict`, which JSON can hold as well.
        """
        return {"keep": self.keep.tolist(), "drop_probs": list(self.drop_probs), "mode": self.mode}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> PathPlan:
        """Makes the plan that `state_dict` described.

        Args:
            state: what `state_dict` returned.

        Returns:
            A plan equal to that one.

        Raises:
            KeyError: if an entry is missing.
            TypeError: if an entry has the wrong type.
            ValueError: if the entries don't fit each other.
            RuntimeError: if `keep` can't have a row for each of `drop_probs`.
        """
        keep = torch.tensor(state["keep"], dtype=torch.bool, device="cpu")
        drop_probs, mode = state["drop_probs"], state["mode"]
        return cls(keep.view(len(drop_probs), -1) if mode == "sample" else keep, drop_probs, mode)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PathPlan):
            return NotImplemented
        return self.mode == other.mode and self.drop_probs == other.drop_probs and torch.equal(self.keep, other.keep)

    __hash__ = None  # type: ignore[assignment]  # plans are compared by value, and hold a tensor

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.keep.shape))
        return f"PathPlan(mode={self.mode!r}, keep={int(self.keep.sum())} of {shape} kept)"


def plan_generator(seed: int, number: int, rank: int = 0) -> torch.Generator:
    """The CPU generator of plan `number` of a run: a function of its arguments, so that resuming needs only the number.

    The arguments are hashed, because torch's CPU generator uses only the lower 32 bits of its seed, and because users
    pass the seed that they gave to `torch.manual_seed`, whose numbers already went into weights and data order.
    """
    digest = hashlib.sha256(f"rdp_kernels plan {seed} {number} {rank}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))


def draw_block_keep(drop_probs: Sequence[float], sampling: str, generator: torch.Generator) -> Tensor:
    """Draws a decision for each path, bool `[paths]`. `"fixed"` drops ⌊Σp⌋ or ⌈Σp⌉ paths at rates of exactly p."""
    probs = torch.tensor(drop_probs, dtype=torch.float64, device="cpu")
    if sampling == "bernoulli":
        return torch.rand(len(probs), dtype=torch.float64, device="cpu", generator=generator) >= probs
    # Systematic sampling: paths lie end to end in a random order, each as long as its probability, and a comb of unit
    # spacing with a random start hits some of them.
    order = torch.randperm(len(probs), device="cpu", generator=generator)
    hits = (probs[order].cumsum(0) + _uniform((), generator)).floor()
    dropped = torch.zeros(len(probs), dtype=torch.bool, device="cpu")
    dropped[order] = hits.diff(prepend=hits.new_zeros(1)) > 0
    return ~dropped


def draw_sample_keep(drop_probs: Sequence[float], batch_size: int, sampling: str, generator: torch.Generator) -> Tensor:
    """Draws a decision for each sample, bool `[paths, batch]`. `"fixed"` keeps ⌊B(1−p)⌋ or ⌈B(1−p)⌉ rows of a path."""
    probs = torch.tensor(drop_probs, dtype=torch.float64, device="cpu")
    noise = torch.rand(len(probs), batch_size, dtype=torch.float64, device="cpu", generator=generator)
    if sampling == "bernoulli":
        return noise >= probs[:, None]
    num_dropped = (batch_size * probs + _uniform((len(probs),), generator)).floor()
    return noise.argsort(dim=1) >= num_dropped[:, None]  # the argsort of noise is a random permutation of the rows


def draw_keep(
    drop_probs: Sequence[float],
    mode: str,
    sampling: str,
    generator: torch.Generator,
    batch_sizes: Sequence[int] = (),
    blockwise: Sequence[int] = (),
) -> Tensor:
    """Draws `PathPlan.keep`. In sample mode `batch_sizes` has an entry for each forward, whose samples are drawn by
    themselves; for a path in `blockwise` one draw decides for all samples."""
    if mode == "block":
        return draw_block_keep(drop_probs, sampling, generator)
    keep = torch.cat([draw_sample_keep(drop_probs, size, sampling, generator) for size in batch_sizes], dim=1)
    keep[list(blockwise)] = draw_block_keep([drop_probs[path] for path in blockwise], sampling, generator)[:, None]
    return keep


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draws midpoints of a grid of 2³² cells in (0, 1). They are no nearer to 0 or 1 than 2⁻³³, which rounding errors
    never bridge, so that 0.1 · 20 drops exactly 2 every time."""
    return (torch.randint(2**32, shape, device="cpu", generator=generator).double() + 0.5) / 2**32
