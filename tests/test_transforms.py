"""Modules, masks and schemes under torch.func, forward-mode AD and fake tensors."""

import pytest
import torch
from torch import func, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad

import rdp_kernels as rdp
from rdp_kernels.paths.freezing import SaveLess, add_detached, touch

DIM, SAMPLES = 4, 64


class Add(nn.Module):
    """A residual path with one of our functions in it."""

    def __init__(self, add):
        super().__init__()
        self.fn, self.gamma, self.add = nn.Linear(DIM, DIM), nn.Parameter(torch.rand(DIM)), add

    def forward(self, x):
        return self.add(x, self.fn(x), self.gamma)


def branch(**options):
    norm, gamma = nn.LayerNorm(DIM), torch.rand(DIM)
    return rdp.ResidualBranch(nn.Linear(DIM, DIM), norm=norm, gamma=gamma, drop_prob=0.5, **options)


MODELS = {
    "drop_path": lambda: Add(lambda x, y, gamma: x + rdp.drop_path(gamma * y, 0.5, training=True)),
    "DropPath": lambda: Add(lambda x, y, gamma: x + rdp.DropPath(0.5)(gamma * y)),
    "drop_path_add": lambda: Add(lambda x, y, gamma: rdp.drop_path_add(x, y, 0.5, training=True, gamma=gamma)),
    "a branch by samples": lambda: branch(),
    "a branch by blocks": lambda: branch(mode="block"),
    "a branch with BatchNorm": lambda: rdp.ResidualBranch(nn.BatchNorm1d(DIM).eval(), drop_prob=0.5),
    "a sequence": lambda: rdp.ResidualSequence(branch()),
}
EACH = pytest.mark.parametrize("model", [make().double() for make in MODELS.values()], ids=MODELS)


def parameters(model):
    return {name: p.detach() for name, p in model.named_parameters()}


def loss(model, x):
    def loss(parameters):
        return func.functional_call(model, parameters, (x,)).sin().sum()

    return loss


def per_sample(model, x, randomness):
    """Gradients of each sample's loss."""
    grad = lambda p, x: func.grad(loss(model, x[None]))(p)  # noqa: E731
    return func.vmap(grad, in_dims=(None, 0), randomness=randomness)(parameters(model), x)


def training(model, flag):
    for module in model.modules():
        if isinstance(module, rdp.ResidualBranch):
            module.training = flag


def expected(model, x, scale):
    """The gradients of sample `x`, with its branch scaled by `scale`."""
    with rdp.use_backend("eager"):
        leaves = [p.requires_grad_() for p in parameters(model).values()]
        named = dict(zip(parameters(model), leaves, strict=True))
        training(model, False)
        whole = func.functional_call(model, named, (x[None],))
        training(model, True)
        out = x[None] + scale * (whole - x[None])
        return torch.autograd.grad(out.sin().sum(), leaves, allow_unused=True)


@EACH
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_per_sample_gradients(model, randomness):
    """Each sample has the gradients of a branch that is dropped or scaled, at about the given rate."""
    x = torch.randn(SAMPLES, DIM, dtype=torch.float64)
    grads = per_sample(model, x, randomness)
    model_of = model if not isinstance(model, Add) else Add(lambda x, y, gamma: x + gamma * y)
    if isinstance(model, Add):
        model_of.load_state_dict(model.state_dict())
        model_of.double()
    kept = []
    for i in range(SAMPLES):
        found = [g[i] for g in grads.values()]
        kept.append(any(g.any() for g in found))
        for a, b in zip(found, expected(model_of, x[i], 2.0 * kept[-1]), strict=True):
            torch.testing.assert_close(a, b)
    if randomness == "same":
        assert len(set(kept)) == 1
    else:
        assert 0.25 * SAMPLES < sum(kept) < 0.75 * SAMPLES  # 4 standard errors


@EACH
def test_by_default_torch_refuses_randomness_in_a_vmap(model):
    with pytest.raises(RuntimeError, match="randomness"):
        per_sample(model, torch.randn(3, DIM, dtype=torch.float64), "error")


@EACH
def test_the_same_mask_in_every_transform(model):
    """From the global generator: gradients forward and reverse, and of the backward."""
    x, named = torch.randn(8, DIM, dtype=torch.float64), parameters(model)

    def seeded(transform):
        torch.manual_seed(1)  # it keeps the first
        return transform()

    grads = seeded(lambda: func.grad(loss(model, x))(named))
    leaves = {name: p.requires_grad_() for name, p in named.items()}
    torch.testing.assert_close(
        list(grads.values()), list(seeded(lambda: torch.autograd.grad(loss(model, x)(leaves), leaves.values())))
    )
    named, tangents = parameters(model), {name: torch.randn_like(p) for name, p in named.items()}
    along = sum((grads[name] * tangents[name]).sum() for name in grads)
    torch.testing.assert_close(seeded(lambda: func.jvp(loss(model, x), (named,), (tangents,))[1]), along)
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p, tangents[name]) for name, p in named.items()}
        out = seeded(lambda: loss(model, x)(duals))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, along)


@EACH
def test_fake_tensors(model):
    with FakeTensorMode(allow_non_fake_inputs=True):
        for x in (torch.randn(6, DIM, dtype=torch.float64), torch.randn(1, DIM, dtype=torch.float64)):
            out = model(x)
            assert isinstance(out, FakeTensor)
            assert (out.shape, out.dtype) == (x.shape, x.dtype)


def test_fake_rows_have_no_values():
    with FakeTensorMode():
        x, rows = torch.randn(4, DIM), torch.tensor([0, 2])
        assert rdp.residual_add(x, x[:2], rows=rows).shape == (4, DIM)
        assert rdp.gather_rows(x, rows).shape == (2, DIM)
        assert rdp.residual_add_norm(x, x[:2], None, rows=rows, next_rows=rows)[1].shape == (2, DIM)


# Schemes: a plan is data


def planned(mode="block", **options):
    model = nn.Sequential(nn.Linear(DIM, DIM), *(branch() for _ in range(4)), nn.Linear(DIM, 1)).double()
    return model, rdp.ResidualDropPath(model, mode=mode, sampling="fixed", **options)


@pytest.mark.parametrize(("mode", "batch_size"), [("block", None), ("sample", 1)])
def test_a_drop_iteration_by_vmap_is_a_loop(mode, batch_size):
    model, scheme = planned(mode)
    x = torch.randn(5, DIM, dtype=torch.float64)
    with scheme.drop_iteration(batch_size):
        grads = per_sample(model, x, "error")
        for i in range(5):
            model.zero_grad()
            model(x[i : i + 1]).sin().sum().backward()
            for name, p in model.named_parameters():
                wanted = torch.zeros_like(p) if p.grad is None else p.grad
                torch.testing.assert_close(grads[name][i], wanted)


def test_a_plan_for_more_samples_than_a_vmap_shows_is_refused():
    model, _ = planned("sample")
    scheme = model[1].binding.scheme
    next(pair := scheme.iterations(5))
    with pytest.raises(ValueError, match="got 1 rows where .* has batch_size 5"):
        per_sample(model, torch.randn(5, DIM, dtype=torch.float64), "error")
    pair.close()


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_a_forward_in_inference_mode_may_come_first(backend):
    model, scheme = planned("sample")
    x = torch.randn(6, DIM, dtype=torch.float64)
    with rdp.use_backend(backend):
        for _ in scheme.iterations(6):
            with torch.inference_mode():
                out = model(x)
            again = model(x)
            assert torch.equal(out, again)
            again.sum().backward()


TRANSFORMS = {
    "grad": lambda function, p: func.grad(function)(p),
    "jvp": lambda function, p: func.jvp(function, (p,), (p,)),
    "vmap": lambda function, p: func.vmap(function)({name: t[None] for name, t in p.items()}),
}


@pytest.mark.parametrize("train_rest", [False, True])
@pytest.mark.parametrize("freeze", ["parameters", "branch"])
@pytest.mark.parametrize("transform", [*TRANSFORMS, "forward mode"])
def test_a_reuse_iteration_that_cannot_freeze_says_so(transform, freeze, train_rest):
    model, scheme = planned(freeze=freeze, train_rest=train_rest)
    x, named = torch.randn(3, DIM, dtype=torch.float64), parameters(model)
    with scheme.drop_iteration():
        model(x)
    with scheme.reuse_iteration():
        model(x)
        with pytest.raises(RuntimeError, match=r"frozen by requires_grad.*backward\(\)"):
            if transform != "forward mode":
                TRANSFORMS[transform](loss(model, x), named)
            with forward_ad.dual_level():
                loss(model, x)({name: forward_ad.make_dual(p, p) for name, p in named.items()})
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("mode", ["block", "sample"])
@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
def test_tangents_of_the_input_pass_frozen_paths_as_gradients_do(mode, freeze):
    model, scheme = planned(mode, freeze=freeze)
    x, tangent = torch.randn(3, DIM, dtype=torch.float64), torch.randn(3, DIM, dtype=torch.float64)
    for _ in scheme.iterations(3):
        leaf = x.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(leaf).sin().sum(), leaf)
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(x, tangent)).sin().sum()
            torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, (grad * tangent).sum())


# What freezing skips


@pytest.mark.parametrize("activation", [None, "relu"])
def test_add_detached(activation):
    x, tangent = torch.randn(4, 3), torch.randn(4, 3)
    act = torch.relu if activation else lambda t: t

    def run(x):
        return add_detached(x, lambda: act(x + x.sin()), activation)

    plain = run(x)
    gate = (plain > 0).float() if activation else torch.ones(4, 3)
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(run(forward_ad.make_dual(x, tangent)))
    torch.testing.assert_close(found, (plain, gate * tangent), rtol=0, atol=0, check_stride=False)
    torch.testing.assert_close(func.jvp(run, (x,), (tangent,)), (plain, gate * tangent))
    torch.testing.assert_close(func.grad(lambda x: run(x).sum())(x), gate)
    torch.testing.assert_close(func.vmap(func.grad(lambda x: run(x).sum()))(x), gate)


def test_take_part():
    out, other, tangent = torch.randn(4), torch.randn(3, requires_grad=True), torch.randn(4)
    with forward_ad.dual_level():
        found = touch(forward_ad.make_dual(out, tangent), [other])
        assert torch.equal(forward_ad.unpack_dual(found).tangent, tangent)
        (grad,) = torch.autograd.grad(found.sum(), other)
    assert not grad.any()


@pytest.mark.parametrize(
    "module", [nn.Conv2d(3, 2, 3, padding=1), nn.BatchNorm2d(3).eval()], ids=["convolution", "BatchNorm"]
)
def test_saving_less(module):
    module.requires_grad_(False)
    x, tangent = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(2, 3, 5, 5)
    expected = func.jvp(module, (x.detach(),), (tangent,))
    with SaveLess():
        torch.testing.assert_close(func.jvp(module, (x.detach(),), (tangent,)), expected)
        with forward_ad.dual_level():
            out = forward_ad.unpack_dual(module(forward_ad.make_dual(x, tangent)))
            torch.testing.assert_close((out.primal.detach(), out.tangent.detach()), expected)
        torch.testing.assert_close(func.vmap(module)(x[:, None]), torch.stack([module(t[None]) for t in x]))
