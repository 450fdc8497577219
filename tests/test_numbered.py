"""The values that `test_gpu.py` compares beyond 2^31 elements differ between rows."""

import pytest
import torch

from .test_gpu import numbered


@pytest.mark.parametrize("width", [2**15 + 16, 1024])
@pytest.mark.parametrize("apart", [2**31, 2**32])
def test_rows_that_an_overflow_would_confuse_differ(width, apart):
    late = 3 * 2**20 - 5  # the last rows of the norm's test
    for first in (0, late):
        rows, others = (numbered(range(at, at + 8), width, "cpu") for at in (first, first + apart // width))
        assert (rows != others).all()
        assert len(rows.unique(dim=0)) == 8
        expected = (torch.arange(first, first + 8)[:, None] % 61 + torch.arange(width) % 97) % 64
        assert torch.equal(rows, expected), "not rounded"
