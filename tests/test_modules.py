import copy
import pickle

import pytest
import torch
from torch import nn

import rdp_kernels as rdp


class Recorder(nn.Module):
    """`x + bias[sample]`; keeps the arguments of its calls."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.calls = []

    def forward(self, x, bias=None, table=None):
        self.calls.append((x, bias, table))
        return x * self.weight if bias is None else x * self.weight + bias


def test_formula_in_eval_and_without_dropping():
    x, gamma = torch.randn(4, 3, 6), torch.rand(6)
    branch = rdp.ResidualBranch(
        nn.Linear(6, 6), norm=nn.LayerNorm(6), gamma=gamma, shortcut=nn.Linear(6, 6), activation="relu", drop_prob=0.9
    ).eval()
    expected = (branch.shortcut(x) + gamma * branch.fn(branch.norm(x))).relu()
    torch.testing.assert_close(branch(x), expected)
    assert sorted(dict(branch.named_parameters())) == [
        "fn.bias", "fn.weight", "gamma", "norm.bias", "norm.weight", "shortcut.bias", "shortcut.weight",
    ]  # fmt: skip
    branch.train().drop_prob = 0.0
    torch.testing.assert_close(branch(x), expected)


@pytest.mark.parametrize("scale_by_keep", [True, False])
def test_alone_it_is_stochastic_depth_on_kept_rows(scale_by_keep):
    fn = Recorder()
    branch = rdp.ResidualBranch(fn, drop_prob=0.5, scale_by_keep=scale_by_keep)
    x = torch.randn(200, 3)
    out = branch(x)
    dropped = (out == x).all(dim=1)
    assert 60 < int(dropped.sum()) < 140
    assert torch.equal(fn.calls[0][0], x[~dropped]), "only kept rows are computed"
    torch.testing.assert_close(out[~dropped], x[~dropped] * (3 if scale_by_keep else 2))


def test_alone_in_block_mode():
    fn = Recorder()
    branch = rdp.ResidualBranch(fn, drop_prob=0.5, mode="block")
    x = torch.randn(4, 3)
    outs = [branch(x) for _ in range(100)]
    kept = [not torch.equal(out, x) for out in outs]
    assert len(fn.calls) == sum(kept)
    assert 20 < sum(kept) < 80
    assert all(torch.allclose(out, 3 * x) for out, k in zip(outs, kept, strict=True) if k)


def test_alone_every_row_dropped_one_row_and_no_row():
    fn = Recorder()
    branch = rdp.ResidualBranch(fn, drop_prob=1.0, activation="relu")
    x = torch.randn(3, 2)
    assert torch.equal(branch(x), x.relu())
    assert branch(x[:0]).shape == (0, 2)
    assert not fn.calls
    branch.drop_prob = 0.5
    assert {tuple(branch(x[:1]).shape) for _ in range(20)} == {(1, 2)}
    assert {len(call[0]) for call in fn.calls} == {1}, "a branch is never called with no rows"


def test_alone_batch_norm_sees_the_whole_batch():
    """Statistics of the kept rows only would differ from ordinary stochastic depth's."""
    branch = rdp.ResidualBranch(nn.BatchNorm1d(3), drop_prob=0.5).double()
    plain = copy.deepcopy(branch.fn)
    x = torch.randn(50, 3, dtype=torch.float64)
    out, full = branch(x), plain(x)
    dropped = (out == x).all(dim=1)
    assert 0 < int(dropped.sum()) < 50
    torch.testing.assert_close(out[~dropped], (x + 2 * full)[~dropped], rtol=1e-12, atol=1e-12)
    assert torch.equal(branch.fn.running_mean, plain.running_mean)


@pytest.mark.parametrize("per_sample", [["bias"], [0]])
@pytest.mark.parametrize("by_name", [True, False])
def test_per_sample_arguments_follow_the_rows(per_sample, by_name):
    fn = Recorder()
    branch = rdp.ResidualBranch(fn, drop_prob=0.5, per_sample=per_sample)
    x, bias, table = torch.zeros(40, 1), torch.arange(1.0, 41)[:, None], torch.zeros(40)
    out = branch(x, bias=bias, table=table) if by_name else branch(x, bias, table)
    kept = out.flatten() != 0
    assert 0 < int(kept.sum()) < 40
    assert torch.equal(out[kept], 2 * bias[kept])
    assert fn.calls[0][2] is table, "an argument that isn't named is passed on with any shape"
    branch(x, None)
    with pytest.raises(ValueError, match=r"per_sample argument .* 40 samples.*\[39, 1\]"):
        branch(x, bias[:39])
    with pytest.raises(TypeError, match="per_sample argument .* tensor, got float"):
        branch(x, 1.0)


@pytest.mark.parametrize("mask", [torch.empty(0, 4, 4).bool(), torch.empty(0, 4, 4)], ids=["bool", "float"])
def test_an_empty_batch_takes_part_on_a_rank_among_others(mask, monkeypatch):
    """Its per-sample arguments have no row for the dummy call that other ranks wait for."""
    monkeypatch.setattr("rdp_kernels.paths.binding.world_size", lambda: 2)

    class Attention(nn.Linear):
        def forward(self, x, mask):
            qkv = super().forward(x)
            scores = qkv @ qkv.mT
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            return scores.softmax(-1) @ qkv

    branch = rdp.ResidualBranch(Attention(8, 8), drop_prob=0.5, per_sample=["mask"])
    out = branch(torch.randn(0, 4, 8), mask=mask)
    assert out.shape == (0, 4, 8)
    out.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in branch.parameters())


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
def test_per_sample_arguments_follow_learning_and_frozen_rows(freeze):
    branch = rdp.ResidualBranch(Recorder(), per_sample=["bias"])
    net = rdp.ResidualSequence(branch)
    scheme = rdp.ResidualDropPath(net, 0.5, mode="sample", freeze=freeze)
    keep = torch.tensor([[True, False, False, True, True]])
    x, bias = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3)
    for _ in scheme.iterations(plan=rdp.PathPlan(keep, [0.5], "sample")):
        out = net(x, bias=bias)
        out.sum().backward()
    torch.testing.assert_close(out, 2 * x + bias)
    kept, dropped = [0, 3, 4], [1, 2]
    assert all(
        torch.equal(call[1], bias[rows]) for call, rows in zip(branch.fn.calls, (kept, kept, dropped), strict=True)
    )


def test_sequence():
    branches = [rdp.ResidualBranch(Recorder(), norm=nn.LayerNorm(3)) for _ in range(3)]
    sequence, x, bias = rdp.ResidualSequence(*branches), torch.randn(2, 3), torch.randn(2, 3)
    expected = x
    for branch in branches:
        expected = branch(expected, bias)
    assert torch.equal(sequence(x, bias), expected)
    assert isinstance(sequence[:2], rdp.ResidualSequence)
    assert next(iter(sequence.state_dict())) == "0.fn.weight"


def test_copies():
    branch = rdp.ResidualBranch(nn.Linear(3, 3), gamma=torch.ones(3))
    x = torch.randn(2, 3)
    for other in (copy.deepcopy(branch), pickle.loads(pickle.dumps(branch))):
        assert torch.equal(branch(x), other(x))
        assert other.gamma is not branch.gamma


def test_gamma_is_copied_or_kept():
    gamma, parameter = torch.ones(3), nn.Parameter(torch.ones(3))
    assert rdp.ResidualBranch(nn.Identity(), gamma=parameter).gamma is parameter
    branch = rdp.ResidualBranch(nn.Identity(), gamma=gamma)
    gamma.zero_()
    assert branch.gamma.tolist() == [1, 1, 1]


def test_autocast_keeps_the_residuals_dtype():
    branch = rdp.ResidualBranch(nn.Linear(3, 3), gamma=torch.ones(3), drop_prob=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        assert branch(torch.randn(8, 3)).dtype == torch.float32


def test_compiles_whole_in_eval():
    torch._dynamo.reset()
    net = rdp.ResidualSequence(
        *(
            rdp.ResidualBranch(nn.Linear(4, 4), norm=nn.LayerNorm(4), gamma=torch.ones(4), drop_prob=0.3)
            for _ in range(3)
        )
    ).eval()
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(net, fullgraph=True, backend="aot_eager")(x), net(x))


L = nn.Linear(2, 2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: rdp.ResidualBranch(torch.tanh), TypeError, "fn must be a torch.nn.Module"),
        (
            lambda: rdp.ResidualBranch(L, norm=nn.BatchNorm1d(2)),
            TypeError,
            "norm must be LayerNorm, RMSNorm.*BatchNorm1d",
        ),
        (lambda: rdp.ResidualBranch(L, shortcut=torch.tanh), TypeError, "shortcut"),
        (lambda: rdp.ResidualBranch(L, gamma=1e-4), TypeError, r"gamma.*\[C\]"),
        (lambda: rdp.ResidualBranch(L, gamma=torch.ones(2, 1)), TypeError, "gamma"),
        (lambda: rdp.ResidualBranch(L, drop_prob=1.1), ValueError, "drop_prob"),
        (lambda: rdp.ResidualBranch(L, mode="row"), ValueError, "mode.*'sample', 'block'.*'row'"),
        (lambda: rdp.ResidualBranch(L, activation="gelu"), ValueError, "activation"),
        (lambda: rdp.ResidualBranch(L, channel_dim="1"), TypeError, "channel_dim"),
        (lambda: rdp.ResidualBranch(L, per_sample="mask"), TypeError, "per_sample must be a collection"),
        (
            lambda: rdp.ResidualBranch(nn.ModuleList([L])),
            TypeError,
            "fn must be a module with a forward, but ModuleList",
        ),
        (
            lambda: rdp.ResidualBranch(L, shortcut=nn.ModuleDict()),
            TypeError,
            "shortcut must be a module with a forward",
        ),
        (lambda: rdp.ResidualBranch(L, gamma=nn.Parameter(torch.ones(2, 2))), TypeError, r"gamma.*\[C\].*\[2, 2\]"),
        (lambda: rdp.ResidualBranch(L, channel_dim=0), ValueError, "channel_dim must name a dimension other than 0"),
        (lambda: rdp.ResidualBranch(L, per_sample=None), TypeError, "per_sample must be a collection"),
        (lambda: rdp.ResidualBranch(L, per_sample=["mask"]), ValueError, "per_sample names 'mask'"),
        (lambda: rdp.ResidualBranch(L, per_sample=[0]), ValueError, "per_sample names 0"),
        (lambda: rdp.ResidualBranch(L, per_sample=[None]), TypeError, "per_sample must hold"),
        (lambda: rdp.ResidualBranch(L)([1.0]), TypeError, "x must be a tensor"),
        (lambda: rdp.ResidualBranch(L)(torch.tensor(1.0)), ValueError, "x must have its rows"),
        (lambda: rdp.ResidualBranch(nn.Linear(2, 3))(torch.ones(4, 2)), ValueError, r"branch.*\[4, 2\].*\[4, 3\]"),
        (lambda: rdp.ResidualBranch(L, gamma=torch.ones(3))(torch.ones(4, 2)), ValueError, r"gamma.*\[2\]"),
        (lambda: rdp.ResidualSequence(L), TypeError, r"branches\[0\] must be a ResidualBranch, got Linear"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


class StridedGradient(nn.Module):
    """BatchNorm whose gradient arrives with the strides of some permutations, which mislead torch."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x):
        out = self.norm(x)
        if out.requires_grad:
            strides = (6, 1, 24, 6) if len(out) == 1 else out.stride()
            out.register_hook(lambda d: torch.empty_strided(d.shape, strides, dtype=d.dtype).copy_(d))
        return out


def test_one_kept_row_of_a_frozen_batch_norm_has_the_right_gradient():
    """torch 2.13's own backward of it is wrong on CPUs for a gradient of strides (C, 1, W·C, C)."""
    torch.manual_seed(0)
    fn = StridedGradient().double()
    branch = rdp.ResidualBranch(fn)
    fn.norm.eval()
    x, weight = torch.randn(3, 6, 4, 4).double().requires_grad_(), torch.randn(3, 6, 4, 4).double()
    scheme = rdp.ResidualDropPath(branch, 0.5, mode="sample", freeze="none")
    keep = torch.tensor([[False, True, False]])
    with scheme.drop_iteration(3, plan=rdp.PathPlan(keep, [0.5], "sample")):
        (branch(x) * weight).sum().backward()
    expected, factor = weight.clone(), fn.norm.weight / (fn.norm.running_var + fn.norm.eps).sqrt()
    expected[1] += 2 * weight[1] * factor[:, None, None]
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["auto", "triton", "native"])
def test_a_plain_add_is_torchs_own_unless_a_backend_is_asked_for(backend):
    if rdp.available_backends().get(backend):
        pytest.skip(rdp.available_backends()[backend])
    branch, x = rdp.ResidualBranch(nn.Linear(4, 4)), torch.randn(3, 4)
    with rdp.use_backend(backend):
        out = branch(x)
    assert (out.grad_fn.name() == "AddBackward0") == (backend == "auto")
    torch.testing.assert_close(out, x + branch.fn(x))
