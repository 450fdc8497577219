"""NaN in elements that a call doesn't need doesn't leak: results have the same bits as with numbers there."""

from dataclasses import replace

import torch
from hypothesis import example, given

from rdp_kernels.kernels.spec import Operands

from . import ops
from .budget import gradients, same
from .cases import VECTORS, Case, drawn_again_if_unsupported, examples, joints
from .tiles import cut
from .values import douts_of, operands_of


def samples_of(rows, batch_size):
    return set(range(batch_size)) if rows is None else set(rows)


@examples(60)
@given(case=joints().filter(lambda case: case.activation is None and case.shape[0] > 1))
def test_nan_stays_in_its_rows(numerics_backend, case):
    """The residual is NaN at samples that aren't in the next input, the gradient at samples without an update, and the
    update at frozen rows that aren't in the next input."""
    batch_size = case.shape[0]
    everywhere = set(range(batch_size))
    next_rows = {row for part in case.next_parts for row in part} if case.gives_next else set()
    reads = samples_of(case.rows, batch_size) if case.adds and case.row_scale != 0 else set()
    stays, unread = sorted(everywhere - next_rows), sorted(everywhere - reads)
    frozen = [place for place, row in enumerate(case.frozen) if row not in next_rows]

    def run(poison):
        operands = operands_of(case)
        with torch.no_grad():
            operands.residual[stays] = poison
            if operands.frozen_update is not None and case.row_scale != 0 and case.layouts[1] != "expanded":
                operands.frozen_update[frozen] = poison
        with cut(case.tiles), drawn_again_if_unsupported():
            results = ops.joint(operands, case)
            douts = douts_of(case, results)
            if douts.out is not None:
                dout = douts.out.clone()
                dout[unread] = poison
                douts = douts._replace(out=dout)
            return results, gradients(results, operands, douts)

    results, grads = run(torch.nan)
    expected, expected_grads = run(1.0)
    kept = sorted(next_rows)
    assert same(results.out[kept], expected.out[kept])
    for actual, wanted in zip((*results[1:3], *grads[1:]), (*expected[1:3], *expected_grads[1:]), strict=True):
        assert (actual is None and wanted is None) or torch.equal(actual, wanted)
    if grads.residual is not None:
        reading = sorted(reads)
        assert torch.equal(grads.residual[reading], expected_grads.residual[reading])


FROZEN_NEXT = Case(
    (4, 8, 16),
    adds=False,
    gives_next=True,
    next_rows=(2, 0, 3),
    num_next_learning=2,
    norm="layer",
    weight=True,
    bias=True,
)


def gradients_with(number, samples, case):
    """All gradients, where the residual holds `number` at these samples."""
    operands = operands_of(case)
    with torch.no_grad():
        operands.residual[samples] = number
    with cut(case.tiles), drawn_again_if_unsupported():
        results = ops.joint(operands, case)
        return gradients(results, operands, douts_of(case, results))


@example(case=FROZEN_NEXT)
@example(case=replace(FROZEN_NEXT, tiles="wide"))
@examples(60)
@given(case=joints().filter(lambda case: case.num_next_learning is not None))
def test_nan_of_frozen_samples_reaches_no_sum(numerics_backend, case):
    """The residual is NaN at samples that are frozen, or have no update, and are frozen in the next input."""
    learning = samples_of(case.learning, case.shape[0]) if case.adds and case.row_scale != 0 else set()
    frozen = sorted({row for part in case.next_parts[1:] for row in part} - learning)

    grads, expected = (gradients_with(number, frozen, case) for number in (torch.nan, 1.0))
    for name in ("update", *VECTORS):
        actual, wanted = getattr(grads, name), getattr(expected, name)
        assert (actual is None and wanted is None) or torch.equal(actual, wanted), name


@example(case=replace(FROZEN_NEXT, used=("out", "frozen_next")))
@example(case=replace(FROZEN_NEXT, used=("out", "frozen_next"), tiles="wide"))
@example(case=replace(FROZEN_NEXT, used=("out", "next")))
@examples(60)
@given(case=joints().filter(lambda case: case.gives_next and case.used is not None))
def test_nan_of_next_rows_without_gradient_reaches_no_gradient(numerics_backend, case):
    """The residual is NaN at samples of the next input, or of one part of it, that has no incoming gradient."""
    parts = zip(("next", "frozen_next"), case.next_parts, strict=False)
    unused = [row for name, part in parts if name not in case.used for row in part]

    grads, expected = (gradients_with(number, unused, case) for number in (torch.nan, 1.0))
    for name, actual, wanted in zip(Operands._fields, grads, expected, strict=True):
        assert (actual is None and wanted is None) or torch.equal(actual, wanted), name
