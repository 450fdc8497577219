import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rdp_kernels as rdp
from rdp_kernels.kernels import dispatch, native
from rdp_kernels.kernels.eager import ForkRows
from rdp_kernels.kernels.spec import ACTIVATIONS, NORMS


def naive_residual_add(residual, branch, rows, row_scale, gamma, channel_dim, activation):
    """One row at a time, in float64."""
    out = residual.double().clone()
    for k in range(branch.shape[0]):
        row = k if rows is None else int(rows[k])
        scale = row_scale if not isinstance(row_scale, torch.Tensor) else row_scale[k].double()
        scale = 1.0 if scale is None else scale
        update = scale * branch[k].double() if scale != 0 else torch.zeros_like(out[row])
        if gamma is not None:
            update = (update.movedim(channel_dim if channel_dim < 0 else channel_dim - 1, -1) * gamma.double()).movedim(
                -1, channel_dim if channel_dim < 0 else channel_dim - 1
            )
        out = out.index_put((torch.tensor(row),), out[row] + update)
    return out.relu() if activation == "relu" else out


@given(
    shape=st.sampled_from([(1, 3), (4, 5), (3, 2, 7), (5, 4, 3, 3), (0, 4), (2, 0, 3)]),
    dtypes=st.sampled_from([("float32",) * 3, ("float64",) * 3, ("bfloat16",) * 3, ("float32", "bfloat16", "float32"),
                            ("bfloat16", "float32", "float32"), ("float16", "float16", "float32")]),
    seed=st.integers(0, 10**6),
    use_rows=st.booleans(), scale=st.sampled_from([None, 0.0, 2.0, "tensor"]),
    use_gamma=st.booleans(), channel_dim=st.sampled_from([-1, 1]), activation=st.sampled_from([None, "relu"]),
)  # fmt: skip
def test_residual_add(shape, dtypes, seed, use_rows, scale, use_gamma, channel_dim, activation):
    generator = torch.Generator().manual_seed(seed)
    residual_dtype, branch_dtype, gamma_dtype = (getattr(torch, name) for name in dtypes)
    residual = torch.randn(shape, generator=generator).to(residual_dtype).requires_grad_()
    rows = None
    if use_rows:
        count = int(torch.randint(shape[0] + 1, (), generator=generator))
        rows = torch.randperm(shape[0], generator=generator)[:count]
    length = shape[0] if rows is None else len(rows)
    branch = torch.randn(length, *shape[1:], generator=generator).to(branch_dtype)
    row_scale = scale
    if scale == "tensor":
        row_scale = 1.25 * torch.randint(2, (length,), generator=generator)
        branch[row_scale == 0] = torch.nan  # never read
    elif scale == 0:
        branch[:] = torch.inf
    branch.requires_grad_()
    gamma = torch.randn(shape[channel_dim], generator=generator).to(gamma_dtype).requires_grad_() if use_gamma else None
    given_residual = residual.detach().clone()

    out = rdp.residual_add(
        residual, branch, rows=rows, row_scale=row_scale, gamma=gamma, channel_dim=channel_dim, activation=activation
    )
    expected = naive_residual_add(residual, branch, rows, row_scale, gamma, channel_dim, activation)
    assert out.dtype == residual_dtype
    assert torch.equal(residual, given_residual), "never in place"
    eps = torch.finfo(residual_dtype).eps  # one rounding to the residual's dtype, and float32 arithmetic
    torch.testing.assert_close(
        out.double(), expected, rtol=max(eps, 1e-6) if eps > 1e-10 else 1e-12, atol=1e-6 if eps > 1e-10 else 1e-12
    )

    leaves = [t for t in (residual, branch, gamma) if t is not None]
    weights = torch.randn(shape, generator=generator).double()
    actual = torch.autograd.grad((out.double() * weights).sum(), leaves)
    wanted = torch.autograd.grad((expected * weights).sum(), leaves, allow_unused=True)
    for leaf, a, w in zip(leaves, actual, wanted, strict=True):
        assert a.dtype == leaf.dtype
        w = torch.zeros_like(a) if w is None else w
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(leaf.dtype, 2e-2)
        if torch.finfo(residual_dtype).eps > 1e-6:
            tolerance = 2e-2  # the incoming gradient is rounded to the residual's dtype
        torch.testing.assert_close(
            a, w, rtol=tolerance, atol=tolerance * max(1.0, float(w.abs().max()) if w.numel() else 1.0)
        )


def test_gradients_to_second_order():
    """The reference has both orders."""
    residual, gamma = torch.randn(4, 3, 2).double().requires_grad_(), torch.rand(2).double().requires_grad_()
    branch, rows = torch.randn(2, 3, 2).double().requires_grad_(), torch.tensor([3, 1])
    row_scale = torch.tensor([1.5, 0.0, 2.0, 1.0], dtype=torch.float64)

    def dense(r, b, g):
        return rdp.residual_add(r, b.repeat(2, 1, 1), row_scale=row_scale, gamma=g, activation="relu")

    def on_rows(r, b, g):
        return rdp.residual_add(r, b, rows=rows, row_scale=1.5, gamma=g)

    with rdp.use_backend("eager"):
        for op in (dense, on_rows):
            assert torch.autograd.gradcheck(op, (residual, branch, gamma))
            assert torch.autograd.gradgradcheck(op, (residual, branch, gamma))


def test_sum_backward_and_kept_features():
    """`out.sum().backward()` gives an expanded gradient; features that the caller keeps don't change."""
    features = [torch.randn(4, 3, requires_grad=True)]
    for _ in range(3):
        features.append(rdp.residual_add(features[-1], torch.tanh(features[-1])[:2], rows=torch.tensor([2, 0])))
    copies = [f.detach().clone() for f in features]
    features[-1].sum().backward()
    assert all(torch.equal(f, c) for f, c in zip(features, copies, strict=True))
    assert features[0].grad.isfinite().all()


def test_gather_and_fork_rows():
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    rows, others = torch.tensor([3, 0]), torch.tensor([1, 4])
    assert torch.equal(rdp.gather_rows(x, rows), x[rows])
    assert rdp.gather_rows(x, rows[:0]).shape == (0, 3)
    for parts in ((rows,), (rows, others)):
        for owned in (False, True):
            fork = lambda x, owned=owned, parts=parts: ForkRows.apply(x, owned, *parts)  # noqa: E731
            assert torch.autograd.gradcheck(fork, x)
            assert torch.autograd.gradgradcheck(fork, x)
    residual, a, b = ForkRows.apply(x, False, rows, others)
    for loss in (residual.sum(), a.sum(), b.sum() + a.sum()):  # an output that isn't used
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        (expected,) = torch.autograd.grad({id(residual): x}.get(id(loss), loss), x, retain_graph=True)
        assert torch.equal(grad, expected)
    (grad,) = torch.autograd.grad(b.sum(), x)
    assert grad.sum(dim=1).tolist() == [0, 3, 0, 0, 3]


class TestDropPath:
    def test_values(self):
        x = torch.randn(2000, 3, requires_grad=True)
        out = rdp.drop_path(x, 0.25, training=True)
        dropped = (out == 0).all(dim=1)
        assert torch.allclose(out[~dropped], x[~dropped] / 0.75)
        assert 0.2 < dropped.float().mean() < 0.3  # 5 standard errors
        out.sum().backward()
        assert torch.equal(x.grad == 0, dropped[:, None].expand_as(x))

    def test_is_timms(self):
        """No change in eval mode or at p = 0; p = 1 drops everything; scale_by_keep=False; the same repr."""
        x = torch.randn(4, 3)
        assert rdp.drop_path(x, 0.5) is x
        assert rdp.drop_path(x, 0.0, training=True) is x
        assert torch.equal(rdp.drop_path(x, 1.0, training=True), torch.zeros_like(x))
        out = rdp.drop_path(x, 0.5, True, False)
        assert all(torch.equal(o, i) or not o.any() for o, i in zip(out, x, strict=True))
        assert repr(rdp.DropPath(0.1)) == "DropPath(drop_prob=0.100)"
        assert rdp.DropPath(0.5).eval()(x) is x
        assert not rdp.DropPath(1.0)(x).any()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
    def test_the_scale_is_exact_in_the_dtype(self, dtype):
        out = rdp.drop_path(torch.ones(64, 1, dtype=dtype), 0.1, training=True)
        assert out.dtype == dtype
        assert set(out.flatten().tolist()) == {0.0, float(torch.tensor(1 / 0.9, dtype=torch.float64).to(dtype))}

    def test_nan_in_dropped_rows_does_not_leak(self):
        x = torch.full((200, 2), torch.nan, requires_grad=True)
        out = rdp.drop_path(x, 0.5, training=True)
        assert 0 < int((out == 0).all(dim=1).sum()) < 200
        out.nan_to_num().sum().backward()
        assert x.grad.isfinite().all()

    def test_add(self):
        residual, branch, gamma = torch.randn(50, 3), torch.randn(50, 3), torch.rand(3)
        assert torch.allclose(rdp.drop_path_add(residual, branch, 0.5, gamma=gamma), residual + gamma * branch)
        out = rdp.drop_path_add(residual, branch, 0.5, training=True, gamma=gamma)
        dropped = (out == residual).all(dim=1)
        assert 0 < int(dropped.sum()) < 50
        assert torch.allclose(out[~dropped], (residual + 2 * gamma * branch)[~dropped])

    def test_mask_comes_from_the_global_generator(self):
        x = torch.ones(100, 1)
        torch.manual_seed(3)
        first = rdp.drop_path(x, 0.5, training=True)
        torch.manual_seed(3)
        assert torch.equal(first, rdp.drop_path(x, 0.5, training=True))


X, ROWS = torch.zeros(4, 3), torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rdp.residual_add(X, X[:2]), ValueError, r"branch.*\[4, 3\].*got \[2, 3\]"),
        (lambda: rdp.residual_add(X, X, rows=ROWS), ValueError, r"branch.*\[2, 3\].*entry of rows.*got \[4, 3\]"),
        (lambda: rdp.residual_add(X.int(), X), TypeError, "residual.*floating-point.*int32"),
        (lambda: rdp.residual_add(X, None), TypeError, "branch.*NoneType"),
        (lambda: rdp.residual_add(torch.tensor(1.0), X), ValueError, "residual.*dimension 0"),
        (lambda: rdp.residual_add(X, X.to("meta")), ValueError, "branch.*cpu.*meta"),
        (lambda: rdp.residual_add(X, X[:2], rows=[0, 2]), TypeError, "rows.*list"),
        (lambda: rdp.residual_add(X, X[:2], rows=ROWS.int()), TypeError, "rows.*int64.*int32"),
        (lambda: rdp.residual_add(X, X[:2], rows=ROWS.to("meta")), ValueError, "rows.*cpu.*meta"),
        (lambda: rdp.residual_add(X, X[:2], rows=torch.tensor([0, 4])), ValueError, r"rows.*\[0, 4\).*to 4"),
        (lambda: rdp.residual_add(X, X[:2], rows=torch.tensor([-1, 2])), ValueError, "rows.*from -1"),
        (lambda: rdp.residual_add(X, X[:2], rows=torch.tensor([2, 2])), ValueError, "rows.*repeat"),
        (lambda: rdp.residual_add(X, X, row_scale=torch.ones(3)), ValueError, r"row_scale.*\[4\].*got \[3\]"),
        (lambda: rdp.residual_add(X, X, row_scale=torch.ones(4).double()), TypeError, "row_scale.*float32.*float64"),
        (lambda: rdp.residual_add(X, X, row_scale=torch.ones(4, requires_grad=True)), ValueError, "row_scale.*detach"),
        (lambda: rdp.residual_add(X, X, row_scale=float("inf")), ValueError, "row_scale.*finite"),
        (lambda: rdp.residual_add(X, X, row_scale="1"), TypeError, "row_scale.*str"),
        (lambda: rdp.residual_add(X, X, row_scale=torch.ones(4, device="meta")), ValueError, "row_scale.*cpu.*meta"),
        (lambda: rdp.residual_add(X, X, gamma=torch.ones(4)), ValueError, r"gamma.*\[3\].*got.*\[4\]"),
        (lambda: rdp.residual_add(X, X, gamma=1.0), TypeError, "gamma.*float"),
        (lambda: rdp.residual_add(X, X, gamma=torch.ones(3, device="meta")), ValueError, "gamma.*cpu.*meta"),
        (lambda: rdp.residual_add(X, X, gamma=torch.ones(3), channel_dim=2), ValueError, "channel_dim.*got 2"),
        (lambda: rdp.residual_add(X, X, gamma=torch.ones(4), channel_dim=0), ValueError, "channel_dim.*got 0"),
        (lambda: rdp.residual_add(X, X, activation="gelu"), ValueError, "activation.*'gelu'"),
        (lambda: rdp.gather_rows(X, torch.tensor([4])), ValueError, "rows"),
        (lambda: rdp.gather_rows([1.0], ROWS), TypeError, "residual.*list"),
        (lambda: rdp.drop_path(X, 1.5), ValueError, "drop_prob.*1.5"),
        (lambda: rdp.drop_path(X, float("nan"), training=True), ValueError, "drop_prob"),
        (lambda: rdp.drop_path(X, 0.5, True, 1), TypeError, "scale_by_keep"),
        (lambda: rdp.drop_path_add(X, X, -0.5), ValueError, "drop_prob.*-0.5"),
        (lambda: rdp.DropPath(1.1), ValueError, "drop_prob"),
    ],
)  # fmt: skip
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_type_checkers_know_the_options():
    """Annotations list the options that are accepted."""

    def options(function, name):
        hint = typing.get_type_hints(function)[name]
        parts = typing.get_args(hint) if typing.get_origin(hint) is not typing.Literal else (hint,)
        return {choice for part in parts for choice in (typing.get_args(part) or (None,))}

    assert options(rdp.residual_add, "activation") == {None, *ACTIVATIONS}
    assert options(rdp.residual_add_norm, "norm") == set(NORMS)
    assert options(rdp.use_backend, "name") == set(dispatch._CHOICES)


class TestBackend:
    def test_available(self):
        backends = rdp.available_backends()
        assert list(backends) == ["eager", "native", "triton"]
        assert backends["eager"] is None
        assert backends["triton"] is None, "interpreted, or there is a GPU"
        assert backends["native"] is None, "`make` builds it"

    def test_forcing(self, monkeypatch):
        with rdp.use_backend("eager"):
            rdp.residual_add(X, X)
        monkeypatch.setattr(native.library, "_reason", "it was not built")
        with (
            pytest.raises(RuntimeError, match="'native' is not available: it was not built"),
            rdp.use_backend("native"),
        ):
            pass
        with pytest.raises(ValueError, match="name must be one of.*'cuda'"), rdp.use_backend("cuda"):
            pass
        monkeypatch.setenv("RDP_BACKEND", "native")
        dispatch._from_environment.cache_clear()
        with pytest.raises(RuntimeError, match="RDP_BACKEND: backend 'native' is not available"):
            rdp.residual_add(X, X)
        with rdp.use_backend("auto"):
            rdp.residual_add(X, X)
        monkeypatch.undo()
        dispatch._from_environment.cache_clear()
