"""Estimates before training what a scheme's iterations cost on a model.

`ResidualDropPath.estimate` uses this package.
"""

from .compose import ModelCost, Shares, kept_fractions
from .report import Estimate, Row, estimate

__all__ = ["Estimate", "ModelCost", "Row", "Shares", "estimate", "kept_fractions"]
