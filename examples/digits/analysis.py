"""Analysis of a trained network: accuracy with branches removed, and similarity of its layers."""

from __future__ import annotations

import hashlib
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.digits.data import Digits
from examples.models import ResidualClassifier
from rdp_kernels.diagnostics import pairwise_cka, without

REMOVALS = 12  # an accuracy is averaged over so many random choices of removed branches


def removal_counts(paths: int) -> list[int]:
    """Returns 1, 2 and a quarter of the number of branches."""
    return sorted({count for count in (1, 2, round(paths / 4)) if 0 < count < paths})


@torch.no_grad()
def accuracy_without(model: ResidualClassifier, digits: Digits, count: int) -> float:
    """Returns the mean test accuracy with `count` branches removed, over the same random choices for every network.

    If there are no more than `REMOVALS` choices, it takes all. The remaining branches run as at inference, unscaled.
    """
    model.eval()
    generator = torch.Generator().manual_seed(count)
    choices = list(itertools.combinations(range(len(model.paths)), count))
    picked = torch.randperm(len(choices), generator=generator)[:REMOVALS].tolist()
    logits = [logits_without(model, digits.test_images, choices[i]) for i in picked]
    model.train()
    return (torch.stack(logits).argmax(dim=-1) == digits.test_labels).double().mean().item()


def logits_without(model: ResidualClassifier, images: Tensor, removed: tuple[int, ...]) -> Tensor:
    """`model(images)` without the branches of the paths `removed`: their shortcut and activation stay."""
    with without(model, removed):
        return model(images)


@torch.no_grad()
def layer_similarity(model: ResidualClassifier, images: Tensor) -> list[list[float]]:
    """Linear CKA (Kornblith et al., arXiv 1905.00414) between states of the residual. Row 0 is the embedding, row l the
    output of path l. 1 means equal up to rotation and scale."""
    model.eval()
    states = [model.embed(images)]
    for path in model.paths:
        states.append(path(states[-1]))
    model.train()
    return pairwise_cka([state.flatten(1) for state in states]).tolist()


def knn_accuracy(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, neighbours: int = 20) -> float:
    """Returns the accuracy of a k-NN classifier on features `[N, dim]`. Votes are weighted by cosine, as in DINO."""
    cosines = F.normalize(test, dim=-1) @ F.normalize(train, dim=-1).T
    cosines, nearest = cosines.topk(min(neighbours, len(train)), dim=1)
    votes = torch.zeros(len(test), int(train_labels.max()) + 1, device=test.device)
    votes.scatter_add_(1, train_labels[nearest], (cosines / 0.07).exp())
    return (votes.argmax(dim=1) == test_labels).double().mean().item()


def weights_sha256(model: nn.Module) -> str:
    """Returns a hash of the bits of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
