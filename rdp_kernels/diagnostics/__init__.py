"""What training did to a network's paths: similarity, lesions, gradients, sizes. For any model with paths.

| file | does |
|---|---|
| `observe.py` | looks on at a model's paths, or stands in for them, and leaves the model as it was |
| `lesions.py` | removes paths, swaps their branches |
| `gradients.py` | norms of gradients by path, of one loss or over a training |
| `effective_depth.py` | which lengths of paths through the network the gradient comes from |
"""

from .effective_depth import EffectiveDepth, effective_depth, participation
from .gradients import GradientNormRecorder, GradientNorms, gradient_norms
from .lesions import LesionStudy, Trials, lesion_study, swapped, without

__all__ = [
    "EffectiveDepth",
    "GradientNormRecorder",
    "GradientNorms",
    "LesionStudy",
    "Trials",
    "effective_depth",
    "gradient_norms",
    "lesion_study",
    "participation",
    "swapped",
    "without",
]
