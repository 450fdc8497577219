"""The loop of timm's train.py with the scheme equals the loop by hand to the bit, and resumes from timm's
checkpoints."""

import argparse

import numpy as np
import pytest
import torch
from torch import nn

import rdp_kernels as rdp

from .loops import Net, Watch, assert_equal, batches, by_hand, weights

pytest.importorskip("timm")

from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.models import resume_checkpoint
from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

from examples import train_timm
from rdp_kernels.integrations.timm import attach

OPTIONS = argparse.Namespace(drop_prob=0.5, lr=1e-2, seed=3)


def data(count):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 4, 1, 8, 8, generator=generator)
    return list(zip(images, torch.randint(10, (count, 4), generator=generator), strict=True))


class Training:
    """A loop of timm's parts; the example defines its epoch."""

    def __init__(self, scale=1.0):
        torch.manual_seed(0)
        self.model, self.optimizer, self.scheme, self.handle = train_timm.build(OPTIONS)
        self.scaler, self.ema = NativeScaler(device="cpu"), ModelEmaV3(self.model, decay=0.5)
        self.scaler._scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        self.watch = Watch(self.model, self.scheme, self.optimizer)
        np.random.seed(0)
        self.mixup = Mixup(mixup_alpha=0.5, num_classes=10)

    def run(self, batches, **options):
        train_timm.train_one_epoch(
            self.model, batches, self.optimizer, self.scaler, self.ema, self.mixup, dtype=torch.bfloat16, **options
        )


def test_equals_the_loop_by_hand():
    """Drop-path rates, mixup, bfloat16, accumulation, clipping and EMA."""
    training = Training()
    training.run(data(17), accumulate=2)
    torch.manual_seed(0)
    model, optimizer, scheme, handle = train_timm.build(OPTIONS)
    handle.remove()
    assert [path.drop_prob for path in scheme.paths][-1] == 0.5
    np.random.seed(0)
    mixup = Mixup(mixup_alpha=0.5, num_classes=10)
    average = weights(model)

    def loss(images, labels):
        images, labels = mixup(images, labels)
        with torch.autocast("cpu", torch.bfloat16):
            return SoftTargetCrossEntropy()(model(images), labels) / 2

    def end_step():
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for name, value in weights(model).items():
            average[name] = average[name].lerp(value, 0.5)

    batches = data(17)[:16]
    steps = [[lambda b=b: loss(b[0].clone(), b[1]) for b in batches[i : i + 2]] for i in range(0, 16, 2)]
    phases = by_hand(scheme, steps, end_step)
    assert_equal(training.model, model)
    assert_equal(training.ema.module, average, 1e-6)
    assert training.watch.phases == phases
    assert phases.count("reuse") > 2


def test_a_step_that_the_scaler_skips_is_made_up_for():
    training = Training(scale=2.0**127)
    training.run(data(8), accumulate=1)
    assert 0 < len(training.watch.phases) < 8
    assert sum(training.scheme.state_dict()["completed"].values()) == len(training.watch.phases)


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_goes_on_from_a_checkpoint_to_the_bit(stop, tmp_path):
    whole = Training()
    whole.run(data(8)[:stop], accumulate=1)
    saver = CheckpointSaver(
        whole.model, whole.optimizer, amp_scaler=whole.scaler, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path)
    )
    saver.save_checkpoint(0)
    random = np.random.get_state()
    whole.run(data(8)[stop:], accumulate=1)
    training = Training()
    resume_checkpoint(training.model, str(tmp_path / "last.pth.tar"), training.optimizer, training.scaler)
    assert training.scheme.phase == whole.watch.phases[stop]
    np.random.set_state(random)
    training.run(data(8)[stop:], accumulate=1)
    assert_equal(training.model, whole.model)
    assert training.watch.phases == whole.watch.phases[stop:]
    assert {"drop", "reuse"} == set(whole.watch.phases[1:5])


def test_checkpoints_of_runs_without_a_scheme():
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plain = torch.optim.SGD(net.parameters(), lr=0.5)
    handle = attach(optimizer, rdp.ResidualDropPath(net, seed=3))
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    assert plain.param_groups[0]["lr"] == 0.1
    (x, _), *_ = batches(1)
    net(x).sum().backward()
    optimizer.step()
    handle.remove()
    assert optimizer.state_dict()["ResidualDropPath"]["completed"] == {"drop": 1, "reuse": 0}
    with pytest.raises(TypeError, match="scheme must be a ResidualDropPath, got Net"):
        attach(optimizer, net)
