"""A loop under accelerate with the scheme equals the loop without accelerate to the bit, and resumes from its
states."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rdp_kernels as rdp

from .loops import Net, Watch, assert_equal, batches, by_hand, isolate

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradientAccumulationPlugin

from rdp_kernels.integrations.accelerate import register

isolated = pytest.fixture(autouse=True)(isolate)


def optimizer_of(net):
    return torch.optim.AdamW(net.parameters(), lr=0.01)


class Training:
    """A user's loop. `alternate`: each optimizer step is the next iteration; otherwise each batch trains a pair."""

    def __init__(self, alternate=False, dropout=0.0, dtype=torch.float64, mode="block", **options):
        self.accelerator = Accelerator(cpu=True, **options)
        net = Net(dropout, dtype)
        self.scheme = rdp.ResidualDropPath(net, mode=mode, seed=3)
        optimizer = optimizer_of(net)
        self.watch = Watch(net, self.scheme, optimizer)
        self.net, self.optimizer = self.accelerator.prepare(net, optimizer)
        register(self.accelerator, self.net, self.scheme)
        self.alternation = self.scheme.alternate(self.optimizer) if alternate else None

    def update(self, x, y, clip=None):
        self.accelerator.backward(F.cross_entropy(self.net(x), y))
        if clip is not None and self.accelerator.sync_gradients:
            self.accelerator.clip_grad_norm_(self.net.parameters(), clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, data, clip=None):
        for x, y in data:
            if self.alternation is not None:
                with self.accelerator.accumulate(self.net):
                    self.update(x, y, clip)
                continue
            for _ in self.scheme.iterations(len(x)):
                self.update(x, y, clip)


def pairs_by_hand(data, clip=None, mode="block", dtype=torch.float64, autocast=False):
    net = Net(dtype=dtype)
    scheme, optimizer = rdp.ResidualDropPath(net, mode=mode, seed=3), optimizer_of(net)
    for x, y in data:
        for _ in scheme.iterations(len(x)):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                logits = net(x)
            F.cross_entropy(logits.to(dtype), y).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return net, scheme


@pytest.mark.parametrize("mode", ["block", "sample"])
def test_pairs_equal_the_loop_by_hand(mode):
    training = Training(mode=mode)
    training.run(batches(8), clip=0.05)
    net, scheme = pairs_by_hand(batches(8), clip=0.05, mode=mode)
    assert_equal(training.net, net)
    assert training.scheme.state_dict() == scheme.state_dict()


def test_bfloat16():
    data = batches(8, dtype=torch.float32)
    training = Training(dtype=torch.float32, mixed_precision="bf16")
    training.run(data)
    assert_equal(training.net, pairs_by_hand(data, dtype=torch.float32, autocast=True)[0])


def test_accumulate_decides_when_iterations_end():
    training = Training(alternate=True, gradient_accumulation_steps=3)
    data = batches(12)
    training.run(data, clip=0.05)
    net = Net()
    scheme, optimizer = rdp.ResidualDropPath(net, seed=3), optimizer_of(net)

    def end_step():
        nn.utils.clip_grad_norm_(net.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()

    steps = [[lambda b=b: F.cross_entropy(net(b[0]), b[1]) / 3 for b in data[i : i + 3]] for i in range(0, 12, 3)]
    phases = by_hand(scheme, steps, end_step)
    assert_equal(training.net, net)
    assert training.watch.phases == phases
    assert set(phases) == {"drop", "reuse"}


def test_accumulation_inside_of_pairs():
    """As docs/how-to/accelerate.md says: accelerate must not end a step by itself at the end of the data."""
    plugin = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    training = Training(gradient_accumulation_plugin=plugin)
    data = batches(8)
    loader = training.accelerator.prepare(torch.utils.data.DataLoader(data, batch_size=None))
    parts = []
    for batch in loader:
        parts.append(batch)
        if len(parts) == 2:
            for _ in training.scheme.iterations():
                for x, y in parts:
                    with training.accelerator.accumulate(training.net):
                        training.update(x, y)
            parts = []
    joined = [tuple(map(torch.cat, zip(*data[i : i + 2], strict=True))) for i in range(0, 8, 2)]
    net, scheme = pairs_by_hand(joined)
    assert_equal(training.net, net, 1e-12)
    assert training.scheme.state_dict() == scheme.state_dict()


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_goes_on_from_a_state_to_the_bit(alternate, stop, tmp_path):
    data = batches(8)
    whole = Training(alternate, dropout=0.2)
    torch.manual_seed(5)
    whole.run(data[:stop])
    whole.accelerator.save_state(str(tmp_path / "state"))
    whole.run(data[stop:])
    training = Training(alternate, dropout=0.2)
    training.accelerator.load_state(str(tmp_path / "state"))
    assert (training.scheme.phase == "reuse") == (alternate and whole.watch.phases[stop] == "reuse")
    training.run(data[stop:])
    assert_equal(training.net, whole.net)
    assert training.scheme.state_dict() == whole.scheme.state_dict()


def test_a_step_that_the_scaler_skips_is_made_up_for(tmp_path):
    training = Training(alternate=True)
    optimizer = AcceleratedOptimizer(training.optimizer.optimizer, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    (x, _), *_ = batches(1)
    plan = training.scheme.plan
    for factor in (torch.inf, 1.0):
        optimizer.scaler.scale(factor * training.net(x).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        training.accelerator.save_state(str(tmp_path / "state"))
        if factor == torch.inf:
            assert optimizer.step_was_skipped
            assert (training.scheme.phase, training.scheme.plan) == ("drop", plan)
    assert training.scheme.state_dict()["completed"] == {"drop": 1, "reuse": 0}


def test_refused():
    accelerator, net = Accelerator(cpu=True), Net()
    scheme = rdp.ResidualDropPath(net)
    with pytest.raises(ValueError, match="scheme must belong to the model that is trained"):
        register(accelerator, accelerator.prepare(Net()), scheme)
    for wrong in [(net, net, scheme), (accelerator, scheme, scheme), (accelerator, net, net)]:
        with pytest.raises(TypeError, match=r"(accelerator|model|scheme) must be an? .*, got"):
            register(*wrong)
