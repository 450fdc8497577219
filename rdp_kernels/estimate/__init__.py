"""What a scheme's iterations cost on a model, before training: behind `ResidualDropPath.estimate`.

| file | does |
|---|---|
| `meters.py` | counts FLOPs, seconds and saved storages |
| `pieces.py` | what a model is cut into |
| `site.py` | repeats one call of a path by itself, in each state |
| `bench.py` | measures all pieces of a model |
| `compose.py` | puts iterations together from them, for many plans at once |
| `report.py` | draws plans, makes rows, recommends |
"""

from .compose import ModelCost, Shares, kept_fractions
from .report import Estimate, Row, estimate

__all__ = ["Estimate", "ModelCost", "Row", "Shares", "estimate", "kept_fractions"]
