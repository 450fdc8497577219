"""What a scheme's iterations cost on a model, before training. Behind `ResidualDropPath.estimate`.

| file | does |
|---|---|
| `meters.py` | counts FLOPs, seconds and saved storages |
| `pieces.py` | the pieces that a model is cut into, and their costs |
| `repeated_call.py` | repeats one call of a path on its own, in each state |
| `bench.py` | measures all pieces of a model |
| `compose.py` | computes the costs of iterations from them, for many plans at once |
| `report.py` | draws plans, makes rows, recommends |
"""

from .compose import ModelCost, Shares, kept_fractions
from .report import Estimate, Row, estimate

__all__ = ["Estimate", "ModelCost", "Row", "Shares", "estimate", "kept_fractions"]
