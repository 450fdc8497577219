"""Diagnostics don't change the model, its gradients and torch's random state, also when the model raises."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

import rdp_kernels as rdp
from rdp_kernels import diagnostics
from rdp_kernels.paths.path import find_path_modules

from .models import converted, images, vit

LOOKS = {
    "CKA": diagnostics.layer_similarity,
    "cosine": lambda *a: diagnostics.layer_similarity(*a, of="branch", metric="cosine"),
    "sizes": diagnostics.branch_sizes,
    "features": lambda *a: diagnostics.feature_distributions(*a, values_per_batch=10),
}


class Noise(nn.Module):
    """Draws in eval mode too and counts its calls; raises when there are more than allowed."""

    def __init__(self):
        super().__init__()
        self.calls, self.allowed = 0, 10**6

    def forward(self, x):
        assert not torch.is_grad_enabled() or self.training
        self.calls += 1
        if self.calls > self.allowed:
            raise ArithmeticError("in the middle")
        return x + torch.rand(()).to(x)


def own():
    model = vit()
    model.paths[2].fn.append(Noise())
    return model, images()


def of_timm():
    """BatchNorm in the branches of converted blocks."""
    model, x = converted("test_resnet")
    block = next(iter(find_path_modules(model).values())).block
    block.conv2 = nn.Sequential(block.conv2, Noise())
    return model, x


def snapshot(model):
    """Everything that must be the same afterwards."""
    modules, parameters = list(model.modules()), dict(model.named_parameters())
    tensors = {
        "weights and statistics": {name: value.clone() for name, value in model.state_dict().items()},
        "gradients": {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None},
        "random state": torch.get_rng_state(),
    }
    others = {
        "requires_grad": [p.requires_grad for p in parameters.values()],
        "modes": [m.training for m in modules],
        "overrides": [module.binding.call_override for module in find_path_modules(model).values()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in modules],
    }
    return tensors, others


def check_same(model, before):
    tensors, others = snapshot(model)
    torch.testing.assert_close(tensors, before[0], rtol=0, atol=0)
    assert others == before[1]


@pytest.mark.parametrize("make", [own, of_timm])
def test_leaves_everything_as_it_was(make):
    """Between the iterations of a pair, with modules in either mode and batches that are shuffled."""
    model, x = make()
    scheme = rdp.ResidualDropPath(model, 0.5, seed=1)
    with scheme.drop_iteration():
        model(x).square().mean().backward()
    next(m for m in model.modules() if isinstance(m, nn.LayerNorm | _BatchNorm)).eval()
    next(model.parameters()).requires_grad_(False)
    noise = next(m for m in model.modules() if isinstance(m, Noise))
    before, state = snapshot(model), scheme.state_dict()
    assert 0 < len(before[0]["gradients"]) < len(list(model.parameters()))
    for look in LOOKS.values():
        noise.calls, noise.allowed = 0, 2
        look(model, DataLoader(torch.cat([x, x]), batch_size=5, shuffle=True))
        assert noise.calls == 2, "one forward for each batch"
        check_same(model, before)
        noise.calls, noise.allowed = 0, 1
        with pytest.raises(ArithmeticError):
            look(model, [x, x])
        check_same(model, before)
    assert scheme.state_dict() == state
    assert scheme.reuse_pending


def tensors_of(result):
    return [value for value in vars(result).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("freeze", ["parameters", "branch"])
def test_inside_an_iteration_it_is_what_it_is_outside(freeze):
    """As under `scheme.alternate()`, which always has an open iteration: weights are those between optimizer steps."""
    model, x = own()
    scheme = rdp.ResidualDropPath(model, 0.5, seed=1, freeze=freeze)
    for iteration in (scheme.drop_iteration, scheme.reuse_iteration):
        with iteration() as plan:
            model(x).square().mean().backward()
            before = snapshot(model)
            inside = [tensors_of(look(model, [x, x])) for look in LOOKS.values()]
            check_same(model, before)
            assert scheme.plan is plan
        outside = [tensors_of(look(model, [x, x])) for look in LOOKS.values()]
        torch.testing.assert_close(inside, outside, rtol=0, atol=0, equal_nan=True)


def test_training_goes_on_to_the_bit():
    """Training is the same with diagnostics between the iterations of a pair and without."""
    ends = []
    for looks in ((), LOOKS.values()):
        torch.manual_seed(0)
        model, x = own()
        scheme = rdp.ResidualDropPath(model, 0.5, seed=1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            for _ in scheme.iterations():
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            for look in looks:
                look(model, x)
        ends.append(model.state_dict())
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_both_models_are_left_alone():
    models, x = [own()[0] for _ in range(2)], images()
    before = [snapshot(model) for model in models]
    diagnostics.layer_similarity(models[0], x, other=models[1])
    for model, state in zip(models, before, strict=True):
        check_same(model, state)
    models[1].paths[2].fn[-1].allowed = 0
    with pytest.raises(ArithmeticError):
        diagnostics.layer_similarity(models[0], x, other=models[1])
    for model, state in zip(models, before, strict=True):
        check_same(model, state)
