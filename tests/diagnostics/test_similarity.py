"""CKA, cosine and rebound against their definitions, entry by entry, and the stated properties of their estimates."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from rdp_kernels.diagnostics import (
    MinibatchCKA,
    cosine_similarity,
    heatmap_rebound,
    hsic,
    linear_cka,
    pairwise_cka,
    rebound,
)

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def features(*shape: int, offset: float = 3.0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64) + offset


def textbook_cka(x: Tensor, y: Tensor) -> float:
    """Kornblith et al., section 3: centre, and three Frobenius norms."""
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    norms = [torch.linalg.matrix_norm(a.T @ b).item() for a, b in ((x, y), (x, x), (y, y))]
    return norms[0] ** 2 / (norms[1] * norms[2])


def textbook_hsic(x: Tensor, y: Tensor) -> float:
    """Nguyen, Raghu, Kornblith, eq. 3."""
    n = len(x)
    k, l = ((g @ g.T) * (1 - torch.eye(n, dtype=torch.float64)) for g in (x, y))  # noqa: E741
    one = torch.ones(n, dtype=torch.float64)
    terms = (
        (k @ l).trace() + (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    )
    return terms.item() / (n * (n - 3))


# Centred Gram matrices where samples are fewer than features, covariances where they are more
@pytest.mark.parametrize(("n", "d", "e"), [(6, 9, 11), (20, 3, 4), (20, 3, 30), (2, 1, 1)])
def test_linear_cka_is_the_textbooks(n, d, e):
    x, y = features(2, 3, n, d), features(2, 3, n, e)
    y[..., 0] += 2 * x[..., 0]
    got = linear_cka(x, y)
    for i, j in itertools.product(range(2), range(3)):
        assert got[i, j].item() == pytest.approx(textbook_cka(x[i, j], y[i, j]), abs=1e-10)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cka_sees_neither_rotation_nor_scale_nor_offset(unbiased):
    x, other = features(9, 4), features(9, 5)
    rotation, _ = torch.linalg.qr(features(4, 4))
    turned = -7 * x @ rotation + 100
    torch.testing.assert_close(linear_cka(x, turned, unbiased=unbiased).item(), 1.0, **EXACT)
    expected = linear_cka(x, other, unbiased=unbiased)
    torch.testing.assert_close(linear_cka(turned, other, unbiased=unbiased), expected, **EXACT)
    assert abs(expected) < 0.9


def test_hsic_and_unbiased_cka_are_the_textbooks():
    x, y = features(2, 7, 3), features(2, 7, 12)
    for i in range(2):
        xy, xx, yy = (textbook_hsic(a, b) for a, b in ((x[i], y[i]), (x[i], x[i]), (y[i], y[i])))
        assert hsic(x, y)[i].item() == pytest.approx(xy, rel=1e-10)
        assert linear_cka(x, y, unbiased=True)[i].item() == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-10)


def test_low_precision_is_widened_first():
    x, y = features(8, 50, offset=10).bfloat16(), features(8, 50).half()
    for unbiased in (False, True):
        expected = linear_cka(x.double(), y.double(), unbiased=unbiased)
        torch.testing.assert_close(linear_cka(x, y, unbiased=unbiased), expected, rtol=0, atol=0)
    torch.testing.assert_close(cosine_similarity(x, y), cosine_similarity(x.double(), y.double()), rtol=0, atol=0)


@pytest.mark.parametrize("unbiased", [False, True])
def test_constant_features_have_cka_0_to_everything(unbiased):
    """Also where rounding makes their mean differ from the value of each."""
    constant, x = torch.full((7, 3), 0.1, dtype=torch.float64), features(7, 3)
    assert constant.mean(dim=0)[0] != 0.1
    for a, b in ((constant, x), (x, constant), (constant, constant)):
        assert linear_cka(a, b, unbiased=unbiased) == 0
        assert linear_cka(a.repeat(1, 9), b.repeat(1, 9), unbiased=unbiased) == 0, "by Gram matrices"
    assert pairwise_cka([x, constant], unbiased=unbiased).tolist() == [[pytest.approx(1), 0], [0, 0]]


def test_features_in_which_one_sample_differs_have_no_hsic():
    """HSIC_1 is exactly 0, so that CKA must not be the ratio of two rounding errors."""
    x, y = torch.zeros(9, 5, dtype=torch.float64), features(9, 5)
    x[4] = features(5)
    assert textbook_hsic(x, x) == 0
    assert linear_cka(x, x, unbiased=True) == linear_cka(x, y, unbiased=True) == 0


def test_not_a_number_is_not_hidden():
    x, broken = features(6, 3), features(6, 3)
    broken[2, 1] = math.inf
    assert linear_cka(x, broken).isnan()
    assert pairwise_cka([x, broken], unbiased=True).isnan().tolist() == [[False, True], [True, True]]


@pytest.mark.parametrize("unbiased", [False, True])
def test_pairwise_cka_is_that_of_every_pair(unbiased):
    x, y = [features(8, d) for d in (2, 5, 20)], [features(8, d) for d in (3, 9)]
    got = pairwise_cka(x, y, unbiased=unbiased)
    expected = [[linear_cka(a, b, unbiased=unbiased).item() for b in y] for a in x]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), **EXACT)
    itself = pairwise_cka(x, unbiased=unbiased)
    torch.testing.assert_close(itself, pairwise_cka(x, x, unbiased=unbiased), **EXACT)


# Estimates from minibatches


@pytest.mark.parametrize("n", [4, 5])
def test_hsic_is_unbiased(n):
    """Its mean over all parts of a population is the population's value; for `HSIC` with centred Gram matrices it
    isn't."""
    x, y = features(8, 3), features(8, 2)
    y[:, 0] += x[:, 0]
    parts = torch.tensor(list(itertools.combinations(range(8), n)))
    for a, b in ((x, y), (x, x), (y, y)):
        assert hsic(a[parts], b[parts]).mean().item() == pytest.approx(hsic(a, b).item(), rel=1e-10)


def test_minibatch_cka_is_the_ratio_of_mean_hsics():
    x, y = [features(19, 3), features(19, 6)], [features(19, 2), features(19, 4), features(19, 9)]
    cka, sizes = MinibatchCKA(), [8, 5, 6]
    for batch in zip(*(f.split(sizes) for f in (*x, *y)), strict=True):
        cka.update(batch[:2], batch[2:])
    got = cka.value()
    for (i, a), (j, b) in itertools.product(enumerate(x), enumerate(y)):
        xy, xx, yy = (
            sum(size * textbook_hsic(c, d) for size, c, d in zip(sizes, f.split(sizes), g.split(sizes), strict=True))
            for f, g in ((a, b), (a, a), (b, b))
        )
        assert got[i, j].item() == pytest.approx(xy / math.sqrt(xx * yy), abs=1e-10)


def test_one_minibatch_is_the_unbiased_cka_of_it():
    x = [features(9, d) for d in (3, 4)]
    cka = MinibatchCKA()
    cka.update(x)
    torch.testing.assert_close(cka.value(), pairwise_cka(x, unbiased=True), **EXACT)


def test_minibatches_converge_to_the_whole_where_the_biased_estimate_does_not():
    """Unrelated features of many dimensions: in 6 samples they look alike."""
    x = [features(1000, 20), features(1000, 20)]
    whole = pairwise_cka(x)[0, 1].item()
    small, biased = MinibatchCKA(), []
    for batch in zip(*(f.split(6) for f in x), strict=True):
        small.update(batch)
        biased.append(linear_cka(*batch).item())
    assert whole < 0.03
    assert abs(small.value()[0, 1].item() - whole) < 0.03
    assert sum(biased) / len(biased) > 0.7


def test_layers_with_other_rows_are_not_compared():
    """Not even where one of them is constant."""
    x = [features(8, 3), features(16, 3), torch.ones(8, 3), features(16, 2)]
    cka = MinibatchCKA()
    cka.update(x)
    comparable = torch.tensor([[True, False, True, False], [False, True, False, True]] * 2)
    assert torch.equal(~cka.value().isnan(), comparable)
    assert torch.equal(~pairwise_cka(x).isnan(), comparable)
    assert cka.value()[1, 3].item() == pytest.approx(linear_cka(x[1], x[3], unbiased=True).item(), abs=1e-10)


def test_minibatches_that_say_nothing_are_refused():
    cka = MinibatchCKA()
    with pytest.raises(RuntimeError, match="no minibatch yet"):
        cka.value()
    with pytest.raises(ValueError, match="at least 4 samples in each batch, got 3"):
        cka.update([features(3, 2)])
    cka.update([features(4, 2)])
    with pytest.raises(ValueError, match=r"as many layers as the ones before, \[1, 1\], got \[2, 2\]"):
        cka.update([features(4, 2)] * 2)
    assert cka.value().tolist() == [[pytest.approx(1)]]


# Cosine


def test_cosine_is_the_mean_over_samples():
    x, y = features(2, 5, 3, offset=0.5), features(2, 5, 3, offset=0.5)
    x[1, 2] = 0
    for i in range(2):
        cosines = []
        for a, b in zip(x[i].tolist(), y[i].tolist(), strict=True):
            norms = math.hypot(*a) * math.hypot(*b)
            cosines.append(sum(p * q for p, q in zip(a, b, strict=True)) / norms if norms else 0.0)
        assert cosine_similarity(x, y)[i].item() == pytest.approx(sum(cosines) / 5, abs=1e-10)


@pytest.mark.parametrize("function", [linear_cka, cosine_similarity, hsic])
def test_other_samples_are_refused(function):
    with pytest.raises(ValueError, match=r"equal \[..., N\], got \[5, 3\] and \[6, 3\]"):
        function(features(5, 3), features(6, 3))
    with pytest.raises(ValueError, match=r"got \[5\] and \[5\]"):
        function(features(5), features(5))


def test_cosine_of_other_features_is_refused():
    with pytest.raises(ValueError, match=r"the same number of features, got shapes \[5, 3\] and \[5, 4\]"):
        cosine_similarity(features(5, 3), features(5, 4))


# Rebound


def test_rebound_is_the_sum_of_the_rises():
    curves = torch.tensor([[1.0, 0.5, 0.75, 0.25, 0.5], [1, 0.9, 0.8, 0.7, 0.6], [0, 1, 0, 1, 0]]).double()
    assert rebound(curves).tolist() == [0.5, 0, 2]


def test_rebound_skips_missing_values():
    nan = math.nan
    curves = torch.tensor([[nan, 1, 0.5, nan, nan, 0.75], [nan, nan, nan, nan, 1, nan], [nan] * 6]).double()
    assert rebound(curves).tolist() == [0.25, 0, 0]


def test_heatmap_rebound_is_the_mean_over_layers_with_two_later_ones():
    matrices = torch.rand(2, 6, 6, dtype=torch.float64)
    for matrix, got in zip(matrices, heatmap_rebound(matrices), strict=True):
        rows = [
            sum(max(0.0, (matrix[r, c + 1] - matrix[r, c]).item()) for c in range(r, 5))
            for r in range(4)  # rows 4 and 5 have too few entries left
        ]
        assert got.item() == pytest.approx(sum(rows) / 4, abs=1e-10)


def test_heatmap_rebound_leaves_out_pairs_that_can_not_be_compared():
    """Two stages of a CNN: only the first has a layer with two later ones."""
    matrix = torch.full((5, 5), math.nan, dtype=torch.float64)
    matrix[:3, :3] = torch.tensor([[1, 0.25, 0.5], [0.25, 1, 0.5], [0.5, 0.5, 1]])
    matrix[3:, 3:] = torch.tensor([[1, 0.5], [0.5, 1]])
    assert heatmap_rebound(matrix) == 0.25
    assert heatmap_rebound(matrix[3:, 3:]).isnan()
    with pytest.raises(ValueError, match=r"\[..., L, L\], got \[4, 5\]"):
        heatmap_rebound(matrix[:4])
