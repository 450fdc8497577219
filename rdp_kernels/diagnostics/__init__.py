"""Measures what each path of a trained network does: similarity, lesions, gradients, sizes and features.

All functions take a model with paths, built from `ResidualBranch` or converted by `rdp.convert`. They leave the model,
its gradients and torch's random states unchanged. Plots need matplotlib.
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
