"""What a scheme's iterations cost on a model, before training. Behind `ResidualDropPath.estimate`."""

from .compose import ModelCost, Shares, kept_fractions
from .report import Estimate, Row, estimate

__all__ = ["Estimate", "ModelCost", "Row", "Shares", "estimate", "kept_fractions"]
