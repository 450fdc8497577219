"""The contents of a scheme's `state_dict`, checked when it is loaded; and what replaces a scheme in copies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor

from .._utils.checks import check_choice, check_count, describe
from ..plan import PathPlan

PHASES = ("drop", "reuse")
BatchSize = int | Sequence[int] | None


@dataclass(frozen=True)
class State:
    """The state of a scheme between two iterations. `plan` is that of the pending reuse iteration, if there is one."""

    mode: str
    num_paths: int
    seed: int
    drawn: int
    completed: Mapping[str, int]
    plan: PathPlan | None
    forwards: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        return {
            "mode": self.mode,
            "num_paths": self.num_paths,
            "seed": self.seed,
            "drawn": self.drawn,
            "completed": dict(self.completed),
            "phase": "drop" if self.plan is None else "reuse",
            "plan": None if self.plan is None else self.plan.state_dict(),
            "forwards": list(self.forwards),
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> State:
        """Reads a dict from `to_dict`. Raises `ValueError` for any other."""
        try:
            check_choice("phase", state["phase"], PHASES)
            return cls(
                state["mode"],
                state["num_paths"],
                check_count("seed", state["seed"], -(2**63)),
                check_count("drawn", state["drawn"]),
                {name: check_count(name, state["completed"][name]) for name in PHASES},
                None if state["phase"] == "drop" else PathPlan.from_state_dict(state["plan"]),
                forwards_of(state["forwards"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"state is not from a ResidualDropPath.state_dict(): {error!r}") from error


def forwards_of(batch_size: int | Sequence[int]) -> tuple[int, ...]:
    """The batch size of each forward of an iteration. Raises `TypeError` or `ValueError` for anything else."""
    if isinstance(batch_size, (Tensor, Mapping)):
        raise TypeError(
            f"batch_size must be the number of samples, len(images) for example, got {describe(batch_size)}"
        )
    if isinstance(batch_size, Sequence) and not isinstance(batch_size, str):
        return tuple(check_count(f"batch_size[{i}]", size) for i, size in enumerate(batch_size))
    return (check_count("batch_size", batch_size),)


COPIED = (
    "a ResidualDropPath can't be copied: save its state_dict(), make another one for the copied model and call "
    "load_state_dict()"
)


class NoScheme:
    """Replaces the scheme in a copy or pickle of a module that has its scheme as an attribute. Reading any attribute
    raises `AttributeError`."""

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(
            f"NoScheme has no {name!r}: it replaces a ResidualDropPath, which copies and pickles don't carry. Make one "
            "for the copied model, rdp.ResidualDropPath(model, ...), and call its load_state_dict() with the "
            "state_dict() of the original"
        )

    def __repr__(self) -> str:
        return "NoScheme()"
