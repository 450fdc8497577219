"""The needed FLOPs of `rdp_kernels.estimate` are those counted in iterations of each built-in network."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import rdp_kernels as rdp
from examples.models import ResidualMLP, ResNet, ViT
from rdp_kernels.estimate import ModelCost, kept_fractions

BATCH = 8
MODELS = {
    "ViT": lambda: ViT(dim=16, depth=3, heads=2),
    "ResNet": lambda: ResNet(widths=(4, 8)),
    "MLP": lambda: ResidualMLP(dim=16, depth=5),
}


def counted(model) -> int:
    with FlopCounterMode(display=False) as counter:
        F.cross_entropy(model(torch.randn(BATCH, 1, 8, 8)), torch.arange(BATCH)).backward()
    model.zero_grad()
    return counter.get_total_flops()


@pytest.mark.parametrize("train_rest", [False, True])
@pytest.mark.parametrize("freeze", ["parameters", "branch", "none"])
@pytest.mark.parametrize(
    ("name", "mode"),
    [("ViT", "block"), ("ViT", "sample"), ("ResNet", "block"), ("MLP", "block"), ("MLP", "sample")],
)
def test_needed_is_counted(name, mode, freeze, train_rest):
    model = MODELS[name]()
    cost = ModelCost.of(model, torch.randn(BATCH, 1, 8, 8))
    assert all(p.grad is None for p in model.parameters())
    assert cost.plain() == counted(model)
    scheme = rdp.ResidualDropPath(model, 0.4, mode=mode, freeze=freeze, train_rest=train_rest)
    phases = []
    for _ in range(4):
        for phase in scheme.iterations(BATCH):
            kept = kept_fractions(scheme.plan)
            needed = cost.drop(kept) if phase == "drop" else cost.reuse(kept, freeze, train_rest)
            assert needed == pytest.approx(counted(model), rel=1e-9)
            phases.append(phase)
    assert set(phases) == {"drop", "reuse"}
