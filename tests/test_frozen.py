import copy
import dataclasses
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import rdp_kernels as rdp
from rdp_kernels.paths.freezing import Frozen, SaveLess, add_detached, save_less_pays

CONVS = [
    (nn.Conv1d(4, 6, 3, padding=1, stride=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, bias=False), (2, 4, 5, 6)),
    (nn.Conv2d(4, 4, (3, 1), stride=(2, 1), padding=(2, 0), dilation=(2, 1), groups=2), (3, 4, 7, 5)),
    (nn.Conv2d(4, 4, 3, padding="same"), (2, 4, 5, 5)),
    (nn.Conv3d(2, 4, 2), (2, 2, 3, 4, 3)),
    (nn.BatchNorm2d(4).eval(), (3, 4, 2, 2)),
    (nn.BatchNorm1d(4, affine=False).eval(), (3, 4)),
    (nn.BatchNorm2d(4, track_running_stats=False).eval(), (3, 4, 2, 2)),
]


@pytest.mark.parametrize(("module", "shape"), CONVS, ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
def test_saving_less_changes_no_bit_of_the_forward_and_no_gradient(module, shape):
    module = copy.deepcopy(module).double().requires_grad_(False)
    for name, buffer in module.named_buffers():
        if "running" in name:
            nn.init.uniform_(buffer, 0.5, 2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    expected = module(x)
    with SaveLess():
        out = module(x)
    assert torch.equal(out, expected)
    weights = torch.randn_like(out)
    actual, wanted = (torch.autograd.grad((o * weights).sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)

    def run(x):
        with SaveLess():
            return module(x)

    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


def test_saving_less_leaves_learning_and_half_precision_alone():
    conv, x = nn.Conv2d(2, 3, 1), torch.randn(1, 2, 3, 3, requires_grad=True)
    with SaveLess():
        conv(x).sum().backward()
    assert conv.weight.grad is not None
    conv.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        expected = conv(x)
        with SaveLess():
            out = conv(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    with SaveLess(), pytest.raises(RuntimeError, match="channels"):
        conv(torch.randn(1, 5, 3, 3, requires_grad=True))


@pytest.mark.parametrize("activation", [None, "relu"])
def test_add_detached_is_linear_in_the_gradient(activation):
    constant = torch.randn(4, 3, dtype=torch.float64)

    def run(x):
        return add_detached(x, lambda: (x + constant).relu() if activation else x + constant, activation)

    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, x)
    assert torch.autograd.gradgradcheck(run, x, fast_mode=True)


def test_add_detached_runs_without_grad():
    weight = torch.randn(3, requires_grad=True)
    seen = []

    def compute():
        update = x * weight
        seen.append(update.requires_grad)
        return x + update

    x = torch.randn(3, requires_grad=True)
    add_detached(x, compute).sum().backward()
    assert seen == [False]
    assert weight.grad is None
    assert torch.equal(x.grad, torch.ones(3))


@pytest.mark.parametrize("freeze_bn", [True, "running", False])
def test_freeze_puts_back_what_it_found(freeze_bn):
    norms = [nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.InstanceNorm1d(2, track_running_stats=True)]
    net = nn.Sequential(nn.Linear(2, 2), *norms)
    net[0].bias.requires_grad_(False)
    net[2].eval()
    net[3].track_running_stats = False

    def state():
        flags = [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()]
        return [p.requires_grad for p in net.parameters()], flags, [id(b) for b in net.buffers()]

    before = state()
    places = [(m, name) for m in net for name in m._parameters]
    with pytest.raises(KeyboardInterrupt), Frozen([*places, places[0]], net.modules(), freeze_bn):
        assert not any(p.requires_grad for p in net.parameters())
        assert [m.training for m in norms] == [
            freeze_bn != "running",
            False,
            freeze_bn != "running",
            freeze_bn != "running",
        ]
        assert [m.track_running_stats for m in norms] == [freeze_bn is not True, True, False, freeze_bn is not True]
        raise KeyboardInterrupt
    assert state() == before


@pytest.mark.parametrize("freeze_bn", [None, 1, "batch", torch.ones(1)])
def test_freeze_bn_is_checked(freeze_bn):
    with pytest.raises(ValueError, match='freeze_bn must be True, False or "running", got'):
        rdp.ResidualDropPath(nn.Sequential(rdp.ResidualBranch(nn.BatchNorm1d(2))), freeze_bn=freeze_bn)


def test_saving_less_is_used_where_it_saves_something():
    by_batch = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    assert not save_less_pays(by_batch.modules())
    assert save_less_pays(by_batch.eval().modules())
    assert save_less_pays([nn.Conv2d(2, 2, 1)])


def test_a_batch_norm_with_a_forward_of_its_own_does_not_move():
    """Other libraries write such a forward, without a look at `track_running_stats`."""

    class Own(nn.BatchNorm1d):
        def forward(self, x):
            self.num_batches_tracked.add_(1)
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)

    norm, x = Own(4), torch.randn(8, 4)
    expected = nn.BatchNorm1d(4)(x)
    before, buffers = copy.deepcopy(norm.state_dict()), norm._buffers
    with Frozen([], [norm]):
        torch.testing.assert_close(norm(x), expected)
    assert norm._buffers is buffers
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    norm(x)
    assert norm.num_batches_tracked == 1


def test_frozen_convolutions_get_nothing_of_a_second_derivative_and_notice_changed_weights():
    conv, x = nn.Conv2d(2, 3, 1), torch.randn(1, 2, 3, 3, requires_grad=True)

    def run():
        with Frozen([(conv, "weight"), (conv, "bias")]), SaveLess():
            return conv(x)

    (grad,) = torch.autograd.grad(run().sin().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert conv.weight.grad is None
    out = run()
    with torch.no_grad():
        conv.weight += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Images(nn.Sequential):
    """[B, 4, 4] as images to convolutions."""

    def forward(self, x):
        return super().forward(x[..., None])[..., 0]


BRANCHES = [
    lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh()),
    lambda: Images(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh()),
    lambda: Images(nn.Conv2d(4, 4, 3, padding=1), nn.GroupNorm(1, 4), nn.Tanh()),
]


def chain(branch, *stem):
    return nn.Sequential(*stem, *(rdp.ResidualBranch(branch()) for _ in range(2))).double()


def penalise(model, x):
    """A gradient penalty; it takes a second derivative."""
    x = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
    grad.square().sum().backward()


def pair(model, reuse, mode="block", drop=None, **options):
    """Runs `drop` and then `reuse`, in an iteration each. Path 0, or a row of it, learns in the reuse iteration."""
    scheme = rdp.ResidualDropPath(model, 0.5, mode=mode, seed=0, **options)
    keep = [False, True] if mode == "block" else [[False, True, False], [True, True, True]]
    x = torch.randn(3, 4, 4, dtype=torch.float64)
    with rdp.use_backend("eager"):
        with scheme.drop_iteration(plan=rdp.PathPlan(torch.tensor(keep), [0.5, 0.5], mode)):
            (drop or (lambda model, x: model(x).sum().backward()))(model, x)
        dropped = gradients(model)
        model.zero_grad()
        with scheme.reuse_iteration():
            reuse(model, x)
    return x, dropped, gradients(model)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def penalty_of(model, x):
    """The penalty in torch's own ops."""
    model.zero_grad()
    penalise(model.eval(), x)
    return gradients(model)


REFUSED = pytest.raises(RuntimeError, match="reached what a reuse iteration has frozen.*in the drop iteration")


@pytest.mark.parametrize("branch", BRANCHES)
def test_second_derivatives_are_refused_in_a_frozen_branch(branch):
    with REFUSED:
        pair(chain(branch), penalise)


def test_second_derivatives_are_refused_of_a_frozen_scale():
    """The branch returns its input, which is a leaf."""
    model = nn.Sequential(rdp.ResidualBranch(nn.Linear(4, 4)), rdp.ResidualBranch(nn.Identity(), gamma=torch.rand(4)))
    with REFUSED:
        pair(model.double(), lambda model, x: penalise(model[1], x))


def test_second_derivatives_are_refused_of_frozen_rows():
    with REFUSED:
        pair(chain(BRANCHES[0]), penalise, "sample")


class Named(nn.Sequential):
    @dataclasses.dataclass
    class Output:
        logits: object

    def forward(self, x):
        return self.Output({"logits": [super().forward(x)]})


@pytest.mark.parametrize("stem", [lambda: nn.LayerNorm(4), lambda: nn.Conv1d(4, 4, 1)])
@pytest.mark.parametrize("kind", [nn.Sequential, Named])
def test_second_derivatives_are_refused_in_a_frozen_rest(stem, kind):
    model = kind(*chain(lambda: nn.Linear(4, 4), stem()))
    tensor = (lambda out: out) if kind is nn.Sequential else lambda out: out.logits["logits"][0]
    with REFUSED:  # no branch is frozen
        pair(
            model,
            lambda model, x: penalise(lambda x: tensor(model(x)), x),
            drop=lambda model, x: tensor(model(x)).sum().backward(),
            freeze="branch",
        )


def test_second_derivatives_are_those_of_the_textbook_where_they_are_allowed():
    model = chain(BRANCHES[0], nn.LayerNorm(4))
    x, dropped, found = pair(model, penalise, drop=penalise, freeze="none", scale_by_keep=False)
    torch.testing.assert_close(found, penalty_of(model, x), rtol=1e-12, atol=1e-12)
    without = nn.Sequential(OrderedDict([("0", model[0]), ("2", model[2])]))
    torch.testing.assert_close(dropped, penalty_of(without, x), rtol=1e-12, atol=1e-12)


def test_a_constant_branch_has_no_derivative_to_refuse():
    model = chain(BRANCHES[0])
    x, _, found = pair(model, penalise, freeze="branch")
    constant = model[1](model[0](x)).detach() - model[0](x).detach()
    model.zero_grad()
    penalise(lambda x: model[0](x) + constant, x)
    torch.testing.assert_close(found, gradients(model), rtol=1e-12, atol=1e-12)
    assert not any(name.startswith("1.") for name in found)


@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_first_derivatives_pass(mode, reentrant):
    """Also twice, and where a checkpoint's backward computes frozen branches again with grad enabled."""

    def twice(model, x):
        x.requires_grad_()
        loss = (model(x) if reentrant is None else checkpoint(model, x, use_reentrant=reentrant)).sum()
        loss.backward(retain_graph=True)
        loss.backward()

    pair(chain(BRANCHES[0], nn.LayerNorm(4)), twice, mode, drop=twice)
