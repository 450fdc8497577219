"""Models of timm and torchvision: two-iteration training against the textbook on the unconverted model."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import rdp_kernels as rdp
from examples.libraries import installed
from rdp_kernels.convert.libraries import is_drop_path

from ..coverage.models import Call, Case, cases

MODELS = {
    "ViT with a class token": "timm.vision_transformer.Block",
    "Swin": "timm.swin_transformer.SwinTransformerBlock",
    "ConvNeXt, γ on NCHW": "timm.convnext.ConvNeXtBlock",
    "ResNet, BatchNorm": "timm.resnet.Bottleneck",
    "EVA-02, rope": "timm.eva.EvaBlock",
    "MobileViT, rows that aren't samples": "mobilevit_xxs",
    "CaiT, a drop-path for two branches": "timm.cait.LayerScaleBlock",
    "torchvision's ResNet": "torchvision.resnet.Bottleneck-plain",
    "DenseNet, concatenation": "torchvision.densenet._DenseLayer-plain",
}
LEARNING_RATE, SCALE = 1e-2, 1 / (1 - 0.4)


def case_of(name):
    if MODELS[name] == "mobilevit_xxs" and installed("timm"):
        build = Call("timm.create_model", MODELS[name], drop_path_rate=0.2)
        return Case("timm", "timm.models.vision_transformer.Block", build, 64)
    library = MODELS[name].partition(".")[0]
    if not installed(library):
        pytest.skip(f"{library} is not installed")
    return next(case for case in cases(library) if case.id == MODELS[name])


class Textbook:
    """The unconverted model; all branches are computed and masked, and gradients of frozen pairs are discarded."""

    def __init__(self, model, converted, scheme):
        self.model = model
        names = {id(module): name for name, module in converted.named_modules()}
        parameters = {id(p): name for name, p in converted.named_parameters()}
        self.paths = []
        for path in scheme.paths:
            block, spec = names[id(path.module.block)], path.module.spec
            modules = [f"{block}.{name}" for name in spec.modules]
            owned = {parameters[id(p)] for p in path.parameters()}
            self.paths.append((None if spec.drop_path is None else f"{block}.{spec.drop_path}", modules, owned))
        for name, module in model.named_modules():
            if is_drop_path(name.rpartition(".")[2], module):
                module.forward = lambda x: x

    def step(self, x, phase, keep):
        """One optimizer step; `keep`: for each path."""
        factors = {}
        for (drop_path, _, _), kept in zip(self.paths, keep, strict=True):
            factors.setdefault(drop_path, []).append(float(kept) * SCALE if phase == "drop" else 1.0)
        for drop_path, given in factors.items():
            turns = itertools.cycle(given)
            self.model.get_submodule(drop_path).forward = lambda x, turns=turns: x * next(turns)
        self.set_batch_norms(phase, keep)
        self.model.zero_grad()
        self.model(x).square().mean().backward()
        learning = {name for name, _ in self.model.named_parameters()}
        if phase == "reuse":
            dropped = [owned for (_, _, owned), kept in zip(self.paths, keep, strict=True) if not kept]
            learning = set().union(*dropped)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in learning and parameter.grad is not None:
                    parameter -= LEARNING_RATE * parameter.grad

    def set_batch_norms(self, phase, keep):
        """BatchNorms of frozen and of dropped branches keep their statistics."""
        of_path = {name: bool(kept) for (_, names, _), kept in zip(self.paths, keep, strict=True) for name in names}
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):
                kept = next((kept for path, kept in of_path.items() if (name + ".").startswith(path + ".")), None)
                module.track_running_stats = kept is not False if phase == "drop" else kept is False


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if "plain" not in MODELS[name]])
def test_three_steps_equal_the_textbook(name):
    """Budget: a minute in all."""
    original, x = case_of(name).make()
    original.double()
    for module in original.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    x = x.double()
    model = copy.deepcopy(original)
    report = rdp.convert(model, example_inputs=x)
    assert report.converted
    assert not report.refused, str(report)
    scheme = rdp.ResidualDropPath(model, 0.4, seed=1)
    textbook = Textbook(original, model, scheme)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    for _ in range(3):
        for phase in scheme.iterations():
            keep = scheme.plan.keep.tolist()
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            textbook.step(x, phase, keep)
    assert not all(keep)
    expected = original.state_dict()
    for key, value in model.state_dict().items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, expected[key], rtol=1e-9, atol=1e-9, msg=key)


def test_other_ways_into_a_model():
    """`forward_features` and `forward_intermediates` of timm, in a drop iteration and without a scheme."""
    model, x = case_of("ViT with a class token").make()
    rdp.convert(model, example_inputs=x)
    expected = model.eval().forward_features(x)
    final, intermediates = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(final, expected)
    scheme = rdp.ResidualDropPath(model.train(), 0.5, mode="sample", seed=1)
    seen = []
    model.blocks[0].mlp.register_forward_hook(lambda m, a, out: seen.append(len(out)))
    keep = torch.eye(2, dtype=torch.bool).repeat(len(scheme.paths) // 2, 1)  # each path keeps one of the two samples
    with scheme.drop_iteration(len(x), plan=rdp.PathPlan(keep, [0.5] * len(keep), "sample")):
        model.forward_features(x)
        _, intermediates = model.forward_intermediates(x)
    assert seen == [1, 1]
    assert all(t.isfinite().all() for t in intermediates)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if "plain" in MODELS[name]])
def test_models_without_drop_path_train_in_both_iterations(name):
    """Budget: half a minute. Dropped layers run in the reuse iteration only, and learn there."""
    model, x = case_of(name).make()
    keys = list(model.state_dict())
    report = rdp.convert(model, drop_prob=0.4, example_inputs=x)
    assert report.converted
    assert list(model.state_dict()) == keys
    scheme = rdp.ResidualDropPath(model, seed=2)
    count = len(scheme.paths)
    keep = torch.tensor([path % 2 == 0 for path in range(count)])
    ran = []
    for path in scheme.paths:
        first = path.module.branch_modules()[0]
        first.register_forward_hook(lambda m, a, out, index=path.index: ran.append(index))
    for phase in scheme.iterations(plan=rdp.PathPlan(keep, [0.4] * count, "block")):
        ran.clear()
        model.zero_grad()
        model(x).square().mean().backward()
        assert ran == [i for i in range(count) if phase == "reuse" or keep[i]]
        for path in scheme.paths:
            learned = [p.grad is not None for p in path.parameters()]
            assert any(learned) == (bool(keep[path.index]) == (phase == "drop")), path
