"""What training did to a network's paths: similarity, lesions, gradients, sizes. For any model with paths.

| file | does |
|---|---|
| `observe.py` | looks on at a model's paths, or stands in for them, and leaves the model as it was |
| `similarity.py` | CKA, cosine and rebound: functions of tensors, and estimates from minibatches |
| `layers.py` | which layers of a model, or of two, hold similar features |
| `sizes.py` | how large branches are against what they are added to |
| `features.py` | how the features of each layer are distributed, and their effective rank |
"""

from .features import FeatureDistributions, feature_distributions
from .layers import LayerSimilarity, layer_similarity
from .similarity import (
    MinibatchCKA,
    cosine_similarity,
    heatmap_rebound,
    hsic,
    linear_cka,
    pairwise_cka,
    rebound,
)
from .sizes import BranchSizes, branch_sizes

__all__ = [
    "BranchSizes",
    "FeatureDistributions",
    "LayerSimilarity",
    "MinibatchCKA",
    "branch_sizes",
    "cosine_similarity",
    "feature_distributions",
    "heatmap_rebound",
    "hsic",
    "layer_similarity",
    "linear_cka",
    "pairwise_cka",
    "rebound",
]
