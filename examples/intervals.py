"""Means over seeds with 95 % intervals, as all studies here report them.

The file isn't named `statistics.py`, because scripts of this folder would import it instead of the standard library's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and the half width of its 95 % interval (Student's t); None with a single seed."""

    mean: float
    half_width: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Estimates the mean of `values`. Raises `ValueError` if there are none."""
        if not values:
            raise ValueError("values must hold a number for each seed, got none")
        if len(values) < 2:
            return cls(values[0], None)
        t = float(stats.t.ppf(0.975, len(values) - 1))
        return cls(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(len(values)))

    @classmethod
    def of_difference(cls, values: Sequence[float], others: Sequence[float]) -> Estimate:
        """Estimates the mean of `values` − `others`, in pairs of the same seed (same weights, same batches).

        Raises `ValueError` if one has more values than the other, or there are none.
        """
        if len(values) != len(others):
            raise ValueError(f"others must have one value for each of the {len(values)} values, got {len(others)}")
        return cls.of([a - b for a, b in zip(values, others, strict=True)])

    @property
    def excludes_zero(self) -> bool:
        return self.half_width is not None and abs(self.mean) > self.half_width

    def percent(self) -> str:
        return self.text(".1f", 100)

    def text(self, spec: str = ".2f", factor: float = 1.0) -> str:
        """Formats `mean ± half width`, both multiplied by `factor`, with `spec`."""
        spread = "" if self.half_width is None else f" ± {factor * self.half_width:{spec}}"
        return f"{factor * self.mean:{spec}}{spread}"
