"""How many variants of a kernel a training run compiles: the number of kept rows, new in every iteration, adds none."""

from dataclasses import replace

import pytest
import torch
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.compiled_code import CUDA, caught_launches
from rdp_kernels.kernels.spec import RowSet

from .cases import Case

BATCH = 64


class Kept(Case):
    """A batch in which `kept` rows run, half of them learning; the lists of rows begin at any address."""

    kept = 0

    def _row_set(self, which):
        if which in (None, "all"):
            return None
        order = torch.arange(BATCH + 1)[self.kept % 2 :][:BATCH]
        return RowSet(order[: self.kept], max(self.kept // 2, 1), order)


def variants(case, counts):
    """For each launch of the case, the variants that Triton tells apart, over all numbers of rows."""
    seen = {}
    for case.__class__.kept in counts:
        for place, launch in enumerate(caught_launches(case.run, "sm_90")):
            bind = create_function_from_signature(
                launch.kernel.signature, launch.kernel.params, make_backend(CUDA["sm_90"])
            )
            _, specialization, _ = bind(**launch.arguments, **launch.options)
            seen.setdefault((place, launch.kernel.__name__), set()).add(str(specialization))
    return seen


@pytest.mark.parametrize("norm", [None, "layer"])
@pytest.mark.parametrize("in_place", [False, True])
def test_any_number_of_rows_is_one_variant(norm, in_place):
    case = Kept("", (BATCH, 16, 64), rows="mixed", next_rows="mixed", norm=norm, in_place=in_place)
    seen = variants(case, (2, 3, 16, 17, 32, 33, 64))
    assert len(seen) > 1
    assert {name: len(found) for name, found in seen.items()} == dict.fromkeys(seen, 1)


def test_another_width_is_another_variant():
    case = Kept("", (BATCH, 16, 64), rows="mixed", next_rows="mixed", norm="layer")
    one, other = (variants(c, (16,)) for c in (case, replace(case, shape=(BATCH, 16, 65))))
    assert all(one[name] != other[name] for name in one)
