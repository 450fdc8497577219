"""Residuals that a user keeps are never changed by later ops."""

import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from tests.conftest import DEVICE

DIM = 5
ROWS = torch.tensor([3, 0, 1], device=DEVICE)


def samples():
    return torch.randn(4, 2, DIM, device=DEVICE, requires_grad=True)


def test_over_a_chain_of_ops(backend):
    """Each step takes the last one's feature; a backward runs from each feature."""
    features = [samples()]
    features.append(features[0].view(4, 2, DIM))
    weight = torch.rand(DIM, device=DEVICE, requires_grad=True)
    steps = [
        lambda x: [rdp.residual_add(x, x.tanh(), row_scale=2.0, gamma=weight)],
        lambda x: [rdp.residual_add(x, rdp.gather_rows(x, ROWS).tanh(), rows=ROWS)],
        lambda x: list(rdp.residual_add_norm(x, x[ROWS].tanh(), weight, rows=ROWS, next_rows=ROWS, gamma=weight))[::-1],
        lambda x: [rdp.residual_add(x, x.tanh(), activation="relu")],
        lambda x: [rdp.drop_path_add(x, x.tanh(), 0.5, training=True)],
        lambda x: [rdp.drop_path(x, 0.5, training=True)],
    ]
    for step in steps:
        features += step(features[-1])
    copies = [feature.detach().clone() for feature in features]
    for feature in features:
        feature.square().sum().backward(retain_graph=True)
    assert all(torch.equal(f, c) for f, c in zip(features, copies, strict=True))
    assert features[0].grad.isfinite().all()


def test_an_incoming_gradient_is_not_changed(backend):
    """Nor is one that a hook keeps."""
    x, kept = samples(), []
    weight = torch.rand(DIM, device=DEVICE, requires_grad=True)
    middle, normed = rdp.residual_add_norm(x, x.tanh(), weight, next_rows=ROWS)
    middle.register_hook(lambda grad: kept.append((grad, grad.clone())))
    out, _ = rdp.residual_add_norm(middle, normed.tanh(), weight, rows=ROWS)
    out = rdp.residual_add(out, rdp.gather_rows(out, ROWS), rows=ROWS)
    dout = torch.randn_like(out)
    before = dout.clone()
    out.backward(dout)
    assert torch.equal(dout, before)
    assert len(kept) == 1
    assert torch.equal(*kept[0])


@pytest.mark.parametrize(("mode", "freeze"), [("block", "parameters"), ("sample", "parameters"), ("sample", "branch")])
@pytest.mark.parametrize("hooked", ["fn", "norm", "branch", None])
def test_through_a_sequence(backend, mode, freeze, hooked):
    """Hooks keep inputs and outputs of branches, and a user keeps those of the sequence, in each iteration."""
    branches = [
        rdp.ResidualBranch(nn.Linear(DIM, DIM), drop_prob=0.5, norm=nn.LayerNorm(DIM), gamma=torch.rand(DIM))
        for _ in range(4)
    ]
    paths = rdp.ResidualSequence(*branches).to(DEVICE)
    kept = []

    def keep(module, inputs, out):
        kept.extend((t, t.detach().clone()) for t in (*inputs, out))

    for branch in paths[1:3] if hooked else ():
        {"fn": branch.fn, "norm": branch.norm, "branch": branch}[hooked].register_forward_hook(keep)
    scheme = rdp.ResidualDropPath(paths, 0.5, mode=mode, freeze=freeze, sampling="fixed", seed=1)
    seen = 0
    for _ in range(2):
        for _ in scheme.iterations(4):
            x = samples()
            out = paths(x)
            kept += [(x, x.detach().clone()), (out, out.detach().clone())]
            out.square().sum().backward()
            seen += 1
    assert len(kept) > 2 * seen or hooked is None
    assert all(torch.equal(t, copy) for t, copy in kept)


def test_parts_of_a_sequence_see_the_same_residuals(backend):
    """The outputs of the first one, two, ... branches, all kept, equal those of branches called one by one."""
    branches = [rdp.ResidualBranch(nn.Linear(DIM, DIM), norm=nn.RMSNorm(DIM)) for _ in range(3)]
    paths, x = rdp.ResidualSequence(*branches).to(DEVICE), samples()
    features = [paths[:count](x) for count in range(4)]
    copies = [feature.detach().clone() for feature in features]
    sum(feature.sum() for feature in features).backward()
    assert all(torch.equal(f, c) for f, c in zip(features, copies, strict=True))
    with rdp.use_backend("eager"):
        for count, feature in enumerate(features[1:]):
            torch.testing.assert_close(feature, paths[count](features[count]))
