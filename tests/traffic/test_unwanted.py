"""Where a gradient isn't needed, or is absent, nothing is read or written for it."""

import pytest
import torch

from rdp_kernels.kernels.spec import Add, NextInput, RowSet
from tests.traffic import needs_interpreter
from tests.traffic.fused_adds import (
    ALL,
    BATCH,
    NEXT_ROWS,
    ROW,
    ROWS,
    check,
    row_scale,
    row_set,
    run,
    samples,
    vector,
)

pytestmark = needs_interpreter
each_norm = pytest.mark.parametrize("norm", ["layer", "rms"])
out_of_place_and_in_place = pytest.mark.parametrize("in_place", [False, True])


def next_input(norm, rows, **how):
    return NextInput(rows, norm, 1e-6, **how)


def weights(norm, learn=True):
    if norm is None:
        return {}
    return dict(weight=vector(learns=learn), bias=vector(learns=learn) if norm == "layer" else None)


@pytest.mark.parametrize("gamma", [False, True])
def test_a_detached_frozen_part(gamma):
    """The gradient of the sum is read where the branch learns, and not where it is a constant."""
    rows = [4, 0, 3]
    tensors = dict(residual=samples(), update=samples(1), frozen_update=samples(2, learns=False))
    _, backward = run(Add(row_set(rows, 1)), **tensors, gamma=vector() if gamma else None)
    reads = {"dout_ptr": [4], "update_ptr": ALL} if gamma else {"dout_ptr": [4]}
    check(backward, (len(reads) + 1) * ROW, reads, {"dupdate_ptr": ALL})


@out_of_place_and_in_place
@pytest.mark.parametrize("norm", [None, "layer"])
def test_constant_frozen_next_rows(norm, in_place):
    """They have no gradient: in place their rows don't change, and nothing of them is kept."""
    rows, next_rows, tensors = [4, 0], row_set([3, 4, 5], 1), dict(residual=samples(), update=samples(2))
    after = next_input(norm, next_rows, detached="frozen")
    forward, backward = run(Add(row_set(rows)), after, in_place, **tensors, **weights(norm))
    read, written = ([0, 3, 4, 5], rows) if in_place else (ALL, ALL)
    writes = {"out_ptr": written, "next_ptr": ALL, "frozen_next_ptr": ALL}
    minimum = ((4 + 2 if in_place else 6 + 6) + 2 + 1 + 2) * ROW  # residual, out; branch; next, frozen_next
    if norm:
        writes, minimum = writes | {"norm_input_ptr": ALL}, minimum + ROW
    check(forward, minimum, {"residual_ptr": read, "update_ptr": ALL}, writes)
    read, written = ([0, 3, 4], [3]) if in_place else (ALL, ALL)
    reads = {"dout_ptr": read, "dnext_ptr": ALL}
    minimum = ((3 + 1 if in_place else 6 + 6) + 1 + 2) * ROW  # dout, dresidual; dnext; dupdate
    if norm:
        reads, minimum = reads | {"norm_input_ptr": ALL}, minimum + ROW
    check(backward, minimum, reads, {"dresidual_ptr": written, "dupdate_ptr": ALL})


def test_constant_frozen_rows_of_a_gather():
    """The owned gradient of the residual is read and written only where one is added to it."""
    after = next_input(None, row_set([3, 4, 5], 1), detached="frozen")
    _, backward = run(None, after, in_place=True, residual=samples())
    check(backward, (1 + 1 + 1) * ROW, {"residual_ptr": [3], "update_ptr": ALL}, {"out_ptr": [3]})


@out_of_place_and_in_place
@pytest.mark.parametrize("norm", [None, "layer", "rms"])
def test_no_next_rows(norm, in_place):
    """The residual's gradient passes unchanged; the norm's weights get zeros."""
    tensors = dict(residual=samples(), update=samples(3), **weights(norm))
    _, backward = run(Add(row_set(ROWS[0.5])), next_input(norm, row_set([])), in_place, **tensors)
    check(backward, (3 + 3) * ROW, {"dout_ptr": ROWS[0.5]}, {"dupdate_ptr": ALL})
    _, backward = run(None, next_input(norm, row_set([])), residual=samples(), **weights(norm))
    check(backward, 0)


# A residual that needs no gradient, as before the first weights that learn


@pytest.mark.parametrize("activation", [None, "relu"])
def test_add_without_the_residuals_gradient(activation):
    kept, rows = [0, 2], [4, 0, 3]
    kept_rows = [4, 3]
    add = Add(row_set(rows), row_scale=row_scale(kept, 3), activation=activation)
    _, backward = run(add, residual=samples(learns=False), update=samples(3))
    reads = {"dout_ptr": kept_rows}
    if activation:
        reads["out_ptr"] = kept_rows
    check(backward, (2 * len(reads) + 3) * ROW, reads, {"dupdate_ptr": ALL})


def test_next_rows_without_the_residuals_gradient():
    """Only the rows of dnext with an update are read: row 3."""
    rows, next_rows = ROWS[0.5], NEXT_ROWS[0.5]
    after = next_input(None, row_set(next_rows))
    _, backward = run(Add(row_set(rows)), after, residual=samples(learns=False), update=samples(3))
    reads = {"dout_ptr": rows, "dnext_ptr": [next_rows.index(3)]}
    check(backward, (3 + 1 + 3) * ROW, reads, {"dupdate_ptr": ALL})


@each_norm
@pytest.mark.parametrize("weights_learn", [False, True])
def test_norm_without_the_residuals_gradient(norm, weights_learn):
    """The weights need dnext and the norm's input of all rows; the branch needs those of its own rows."""
    rows, next_rows = ROWS[0.5], NEXT_ROWS[0.5]
    tensors = dict(residual=samples(learns=False), update=samples(3), **weights(norm, learn=weights_learn))
    _, backward = run(Add(row_set(rows)), next_input(norm, row_set(next_rows)), **tensors)
    needed = [0, 1, 2] if weights_learn else [next_rows.index(3)]
    reads = {"dout_ptr": rows, "dnext_ptr": needed, "norm_input_ptr": needed}
    check(backward, (3 + 2 * len(needed) + 3) * ROW, reads, {"dupdate_ptr": ALL})


@each_norm
def test_norm_of_a_residual_that_needs_no_gradient(norm):
    """The weights' gradients are sums over the next rows: the residual's own gradient isn't read."""
    _, backward = run(None, next_input(norm, None), residual=samples(learns=False), **weights(norm))
    check(backward, (BATCH + BATCH) * ROW, {"dnext_ptr": ALL, "norm_input_ptr": ALL})


# Vectors and lists that aren't dense


@pytest.mark.parametrize("inverted", [False, True], ids=["inverted by a kernel", "inverted before"])
def test_vectors_and_lists_at_a_distance(inverted):
    """A kernel reads them element by element, and nothing between the elements or beyond the end."""

    def apart(x):
        return torch.stack([x.detach(), torch.full_like(x, 7)], dim=-1)[..., 0].requires_grad_(x.requires_grad)

    index, inverse = torch.tensor([4, 0, 3]), torch.tensor([1, 3, 4, 2, 0, 5])
    rows = RowSet(apart(index), 3, apart(inverse) if inverted else None)
    gamma, weight, bias = (apart(vector()) for _ in range(3))
    tensors = dict(residual=samples(), update=samples(3), gamma=gamma, weight=weight, bias=bias)
    forward, backward = run(Add(rows, row_scale=apart(row_scale([0, 2], 3))), next_input("layer", rows), **tensors)
    writes = {"out_ptr": ALL, "next_ptr": ALL, "norm_input_ptr": ALL}
    check(forward, (6 + 2 + 6 + 3 + 3) * ROW, {"residual_ptr": ALL, "update_ptr": [0, 2]}, writes)
    reads = {"dout_ptr": ALL, "dnext_ptr": ALL, "norm_input_ptr": ALL, "update_ptr": [0, 2]}
    check(backward, (6 + 3 + 3 + 2 + 6 + 3) * ROW, reads, {"dresidual_ptr": ALL, "dupdate_ptr": ALL})
    forward, _ = run(None, NextInput(rows), residual=samples())
    check(forward, (3 + 3) * ROW, {"x_ptr": [4, 0, 3]}, {"out_ptr": ALL})
