"""The similarity of two representations of the same samples. These are functions of tensors, computed in float64.

Features are `[..., N, D]`: N samples with D features each. Leading dimensions are batch dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Computes the similarity of two sets of features by linear CKA (Kornblith et al., arXiv 1905.00414).

    CKA is short for centred kernel alignment. It is 1 if the features are equal up to rotation, scale and offset, and 0
    if they are unrelated. Constant features have CKA 0 with everything, themselves included. NaN or Inf among the
    features gives NaN.

    Args:
        x: `[..., N, D]`, any floating dtype.
        y: `[..., N, D']`, with the same leading dimensions.
        unbiased: whether to use HSIC_1 in the numerator and the denominators (arXiv 2010.15327, eq. 3). A small number
            of samples then doesn't inflate the result, which lies in [−1, 1]. It needs N ≥ 4.

    Returns:
        float64 `[...]`.

    Raises:
        ValueError: if shapes don't fit, or if `unbiased` is true and N < 4.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> x = torch.randn(16, 8)
        >>> diagnostics.linear_cka(x, 3 * x + 1)
        tensor(1.0000, dtype=torch.float64)
    """
    n = _check_samples(x, y)
    if unbiased or n <= max(x.shape[-1], y.shape[-1]):
        gram = unbiased_gram if unbiased else centred_gram
        a, b = gram(x), gram(y)
        return _cosine(_dot(a, b), _dot(a, a), _dot(b, b))
    a, b = _centred(x), _centred(y)
    return _cosine(*(_dot(product, product) for product in (a.mT @ b, a.mT @ a, b.mT @ b)))


def hsic(x: Tensor, y: Tensor) -> Tensor:
    """Estimates without bias how strongly two sets of features covary.

    This is HSIC_1 of linear kernels (Song et al. 2012, eq. 5; arXiv 2010.15327, eq. 3). It is an unbiased estimate of
    the squared Frobenius norm of the cross-covariance.

    Args:
        x: `[..., N, D]`, N ≥ 4, any floating dtype.
        y: `[..., N, D']`, with the same leading dimensions.

    Returns:
        float64 `[...]`.

    Raises:
        ValueError: if shapes don't fit, or if N < 4.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> x = torch.eye(4)[:, :1]
        >>> diagnostics.hsic(torch.randn(4, 8), torch.ones(4, 8))  # constant features have no covariance
        tensor(0., dtype=torch.float64)
    """
    n = _check_samples(x, y)
    return _dot(unbiased_gram(x), unbiased_gram(y)) / (n * (n - 3))


def pairwise_cka(x: Sequence[Tensor], y: Sequence[Tensor] | None = None, *, unbiased: bool = False) -> Tensor:
    """Linear CKA of all pairs of layers. See `linear_cka`.

    Args:
        x: the features `[N, D]` of L layers.
        y: the features of L' other layers. None compares the layers of `x` with each other.
        unbiased: as in `linear_cka`.

    Returns:
        float64 `[L, L']` on the CPU. NaN for pairs that differ in N.

    Raises:
        ValueError: if `unbiased` is true and N < 4.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> layers = [torch.randn(16, 8), torch.randn(16, 4)]
        >>> matrix = diagnostics.pairwise_cka(layers)
        >>> matrix.shape, bool((matrix == matrix.T).all())
        (torch.Size([2, 2]), True)
    """
    gram = unbiased_gram if unbiased else centred_gram
    a = [gram(features) for features in x]
    b = a if y is None else [gram(features) for features in y]
    return _cosine(*_terms(a, b), outer=True)


def cosine_similarity(x: Tensor, y: Tensor) -> Tensor:
    """The cosine between the features of a sample, as a mean over samples.

    The cosine of a sample whose features are all 0 is 0.

    Args:
        x: `[..., N, D]`, any floating dtype.
        y: `[..., N, D]`.

    Returns:
        float64 `[...]`.

    Raises:
        ValueError: if shapes don't fit.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> diagnostics.cosine_similarity(torch.eye(2), torch.ones(2, 2))
        tensor(0.7071, dtype=torch.float64)
    """
    _check_samples(x, y)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x and y must have the same number of features, got shapes {list(x.shape)} and {list(y.shape)}"
        )
    return _dot(unit(x)[..., None, :], unit(y)[..., None, :]).mean(dim=-1)


def rebound(similarity: Tensor) -> Tensor:
    """The total rise of a curve over depth, the sum of its positive increments.

    NaN entries are left out, as if their neighbours followed each other.

    Args:
        similarity: `[..., L]`.

    Returns:
        `[...]`.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> diagnostics.rebound(torch.tensor([1.0, 0.25, 0.5, 0.25, 0.75]))
        tensor(0.7500)
    """
    known = ~similarity.isnan()
    last = torch.arange(similarity.shape[-1], device=similarity.device).where(known, 0).cummax(dim=-1).values
    return similarity.gather(-1, last).diff(dim=-1).clamp(min=0).nansum(dim=-1)


def heatmap_rebound(similarity: Tensor) -> Tensor:
    """The mean rebound of the rows of a similarity heatmap.

    The rebound of row r begins at column r. A layer counts only if it has at least two later layers to compare with
    (not NaN).

    Args:
        similarity: `[..., L, L]`.

    Returns:
        `[...]`. NaN if no layer counts.

    Raises:
        ValueError: if the matrices aren't square.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> diagnostics.heatmap_rebound(torch.tensor([[1.0, 0.25, 0.5], [0.25, 1.0, 0.75], [0.5, 0.75, 1.0]]))
        tensor(0.2500)
    """
    if similarity.dim() < 2 or similarity.shape[-1] != similarity.shape[-2]:
        raise ValueError(f"similarity must have shape [..., L, L], got {list(similarity.shape)}")
    ahead = similarity.where(torch.ones_like(similarity, dtype=torch.bool).triu(), math.nan)
    counts = (~ahead.isnan()).sum(dim=-1) >= 3
    return rebound(ahead).where(counts, math.nan).nanmean(dim=-1)


class MinibatchCKA:
    """Collects linear CKA between layers from minibatches, without bias (Nguyen, Raghu, Kornblith, arXiv 2010.15327).

    `update` adds HSIC_1 of every pair of layers, weighted by the minibatch's size. A CKA is a ratio of three means over
    minibatches: HSIC_1(x, y), HSIC_1(x, x) and HSIC_1(y, y). The means are unbiased for the distribution of the
    samples. They are also unbiased for HSIC_1 of a whole data set if minibatches are random parts of it. The ratio
    itself isn't unbiased, but it converges to unbiased CKA with the number of minibatches, whatever their size. Means
    of biased CKA don't.

    Example:
        >>> from rdp_kernels import diagnostics
        >>> cka = diagnostics.MinibatchCKA()
        >>> for _ in range(3):
        ...     x = torch.randn(16, 8)
        ...     cka.update([x, x.relu()])
        >>> cka.value().shape
        torch.Size([2, 2])
    """

    def __init__(self) -> None:
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, x: Sequence[Tensor], y: Sequence[Tensor] | None = None) -> None:
        """Adds a minibatch.

        Layers of a minibatch that differ in N can't be compared, and their CKA is NaN.

        Args:
            x: the features `[N, D]` of L layers, N ≥ 4.
            y: the features of L' other layers. None compares the layers of `x` with each other.

        Raises:
            ValueError: if N < 4, or if the number of layers isn't that of the minibatches before.
        """
        self.add([unbiased_gram(f) for f in x], None if y is None else [unbiased_gram(f) for f in y])

    def add(self, x: list[Tensor], y: list[Tensor] | None = None) -> None:
        """Adds a minibatch by its Gram matrices, so that features needn't be kept.

        Args:
            x: for each of L layers its U-centred Gram matrix, float64 `[N, N]`, N ≥ 4.
            y: those of L' other layers. None compares the layers of `x` with each other.

        Raises:
            ValueError: if the number of layers isn't that of the minibatches before.
        """
        x, y = ([g / (len(g) - 3) ** 0.5 for g in side] for side in (x, x if y is None else y))
        terms = _terms(x, y)  # N · HSIC_1
        if self._sums is None:
            self._sums = terms
        elif terms[0].shape != self._sums[0].shape:
            wanted, got = list(self._sums[0].shape), list(terms[0].shape)
            raise ValueError(f"a minibatch must have as many layers as the ones before, {wanted}, got {got}")
        else:
            self._sums = (self._sums[0] + terms[0], self._sums[1] + terms[1], self._sums[2] + terms[2])

    def value(self) -> Tensor:
        """CKA over all minibatches.

        Returns:
            float64 `[L, L']` on the CPU.

        Raises:
            RuntimeError: if there is no minibatch yet.
        """
        if self._sums is None:
            raise RuntimeError("MinibatchCKA has no minibatch yet: call update first")
        return _cosine(*self._sums, outer=True)


class MinibatchCosine:
    """`cosine_similarity` between layers, from minibatches of any sizes, as a mean over all samples."""

    def __init__(self) -> None:
        self._sum, self._rows = torch.zeros((), dtype=torch.float64), torch.zeros(())

    def add(self, x: list[Tensor], y: list[Tensor] | None = None) -> None:
        """Adds the features `[N, ...]` of layers in x, and in y to compare with. Pairs of different shapes are NaN."""
        self._sum = self._sum + pairs(x, x if y is None else y, _cosines)
        self._rows = self._rows + torch.tensor([len(features) for features in x])

    def value(self) -> Tensor:
        return self._sum / self._rows[:, None]


def pairs(x: list[Tensor], y: list[Tensor], product: Callable[[list[Tensor], list[Tensor]], Tensor]) -> Tensor:
    """Applies `product` to the tensors of each shape.

    `product` takes A and B tensors of one shape and returns `[A, B]`. The result is float64 `[L, L']` on the CPU, and
    NaN for pairs of different shapes.
    """
    out = torch.full((len(x), len(y)), math.nan, dtype=torch.float64)
    for shape in {t.shape for t in x}:
        rows, columns = ([k for k, t in enumerate(side) if t.shape == shape] for side in (x, y))
        if columns:
            values = product([x[k] for k in rows], [y[k] for k in columns])
            out[torch.tensor(rows)[:, None], torch.tensor(columns)] = values.cpu()
    return out


def _terms(x: list[Tensor], y: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the terms of a CKA, `[L, L']`, `[L]`, `[L']`: products of Gram matrices by pairs, and with themselves."""
    selves = [torch.stack([_dot(gram, gram) for gram in side]).cpu() for side in (x, y)]
    dots = pairs(x, y, lambda a, b: torch.stack(a).flatten(1) @ torch.stack(b).flatten(1).T)
    return dots, selves[0], selves[1]


def _cosines(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """Returns cosines summed over samples. It takes one sample at a time, to keep float64 copies small."""
    samples = zip(zip(*x, strict=True), zip(*y, strict=True), strict=True)
    one = (unit(torch.stack(a).flatten(1)) @ unit(torch.stack(b).flatten(1)).T for a, b in samples)
    return sum(one, torch.zeros((), dtype=torch.float64, device=x[0].device))


def unbiased_gram(x: Tensor) -> Tensor:
    """U-centred Gram matrix of `[..., N, D]`, N ≥ 4: float64 `[..., N, N]`.

    For two of them, the sum of the elementwise product divided by N (N − 3) is HSIC_1. It equals the three terms in the
    formula of Song et al.
    """
    if x.shape[-2] < 4:
        raise ValueError(
            f"unbiased CKA needs at least 4 samples in each batch, got {x.shape[-2]}: merge batches, or drop the last"
        )
    return u_centred(centred_gram(x))


def u_centred(gram: Tensor) -> Tensor:
    """A Gram matrix without its diagonal, with rows and columns that sum to 0 (Székely & Rizzo 2014, eq. 2.9)."""
    n = gram.shape[-1]
    rounding = n * torch.finfo(gram.dtype).eps * gram.abs().amax(dim=(-2, -1), keepdim=True)
    gram = _hollow(gram)
    rows = gram.sum(dim=-1, keepdim=True) / (n - 2)
    gram = _hollow(gram - rows - rows.mT + rows.sum(dim=-2, keepdim=True) / (n - 1))
    nothing_left = gram.abs().amax(dim=(-2, -1), keepdim=True) <= rounding  # a single sample differs from all others
    return gram.masked_fill(nothing_left, 0.0)


def _hollow(gram: Tensor) -> Tensor:
    return gram.masked_fill(torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device), 0.0)


def centred_gram(x: Tensor) -> Tensor:
    """Gram matrix of `[..., N, D]` after subtracting the mean sample: float64 `[..., N, N]`."""
    x = _centred(x)
    return x @ x.mT


def _centred(x: Tensor) -> Tensor:
    x = x.to(torch.float64, copy=True)
    x -= x[..., :1, :].clone()  # makes constant features exactly 0, despite rounding of the mean
    x -= x.mean(dim=-2, keepdim=True)
    return x


def unit(x: Tensor) -> Tensor:
    """Scales vectors along the last dimension to length 1, in float64. 0 stays 0."""
    x = x.double()
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.where(norm != 0, 1)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(dim=(-2, -1))


def _cosine(xy: Tensor, xx: Tensor, yy: Tensor, *, outer: bool = False) -> Tensor:
    """`xy / √(xx · yy)`, with 0 for 0 / 0. With `outer`, xx belongs to rows and yy to columns."""
    norm = xx.sqrt()[:, None] * yy.sqrt() if outer else xx.sqrt() * yy.sqrt()
    return torch.where((norm == 0) & ~xy.isnan(), 0.0, xy / norm)


def _check_samples(x: Tensor, y: Tensor) -> int:
    """Checks shapes and returns the number of samples."""
    if x.dim() < 2 or y.dim() < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"x and y must be [..., N, D] with equal [..., N], got {list(x.shape)} and {list(y.shape)}")
    return x.shape[-2]
