"""What training did to a network's paths: similarity, lesions, gradients, sizes. For any model with paths.

| file | does |
|---|---|
| `observe.py` | observes the calls of a model's paths, or replaces them, and leaves the model unchanged |
| `similarity.py` | CKA, cosine and rebound: functions of tensors, and estimates from minibatches |
| `layers.py` | which layers of a model, or of two, hold similar features |
| `sizes.py` | how large updates are relative to the residuals that they are added to |
| `features.py` | how the features of each layer are distributed, and their effective rank |
| `lesions.py` | removes paths and swaps their branches |
| `gradients.py` | norms of gradients by path, for one loss or over a training |
| `effective_depth.py` | through how many branches the gradient comes |
| `__main__.py` | the command: a report on one model with all of this |
"""

from .effective_depth import EffectiveDepth, effective_depth, participation
from .features import FeatureDistributions, feature_distributions
from .gradients import GradientNormRecorder, GradientNorms, gradient_norms
from .layers import LayerSimilarity, layer_similarity
from .lesions import LesionStudy, Trials, lesion_study, swapped, without
from .similarity import MinibatchCKA, cosine_similarity, heatmap_rebound, hsic, linear_cka, pairwise_cka, rebound
from .sizes import BranchSizes, branch_sizes

__all__ = [
    "BranchSizes",
    "EffectiveDepth",
    "FeatureDistributions",
    "GradientNormRecorder",
    "GradientNorms",
    "LayerSimilarity",
    "LesionStudy",
    "MinibatchCKA",
    "Trials",
    "branch_sizes",
    "cosine_similarity",
    "effective_depth",
    "feature_distributions",
    "gradient_norms",
    "heatmap_rebound",
    "hsic",
    "layer_similarity",
    "lesion_study",
    "linear_cka",
    "pairwise_cka",
    "participation",
    "rebound",
    "swapped",
    "without",
]
