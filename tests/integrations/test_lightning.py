"""Lightning's loop with the scheme equals the loop by hand to the bit, and resumes from its checkpoints."""

import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import rdp_kernels as rdp

from .loops import Net, Watch, assert_equal, batches, by_hand, weights

pytest.importorskip("lightning")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning as L
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
    from lightning.pytorch.plugins import MixedPrecision

    from rdp_kernels.integrations.lightning import ResidualDropPathCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*treespec.*"),
]
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def optimizer_of(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)


class Module(L.LightningModule):
    """`pairs`: manual optimization, both iterations on each batch."""

    def __init__(self, pairs=False, dropout=0.0, dtype=torch.float64):
        super().__init__()
        self.net = Net(dropout, dtype)
        self.automatic_optimization = not pairs
        self.validated = self.fail_at = None
        self.scheme = rdp.ResidualDropPath(self, seed=3)
        self.watch = None

    def loss(self, batch):
        if self.global_step == self.fail_at:
            raise ZeroDivisionError
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch, index):
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer = self.optimizers()
        for _ in self.scheme.iterations():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()
        return None

    def validation_step(self, batch, index):
        self.validated = self.scheme.phase
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        optimizer = optimizer_of(self.net)
        self.watch = Watch(self.net, self.scheme, optimizer)
        return optimizer


class Data(torch.utils.data.Dataset):
    def __init__(self, count=5, dtype=torch.float64):
        self.batches = batches(count, dtype=dtype)

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index]


def loader(**kwargs):
    return torch.utils.data.DataLoader(Data(**kwargs), batch_size=None)


def fit(module, folder, *, data=None, ckpt_path=None, callbacks=(), max_epochs=3, **options):
    options = {"enable_checkpointing": False, **QUIET, **options}
    callbacks = [ResidualDropPathCallback(module.scheme), *callbacks]
    trainer = L.Trainer(default_root_dir=folder, max_epochs=max_epochs, callbacks=callbacks, **options)
    trainer.fit(module, data or loader(), loader(count=1, dtype=module.net.head.weight.dtype), ckpt_path=ckpt_path)
    assert module.scheme.phase is None, "the model is plain again"
    return trainer


def hand_trained(steps, clip=None, scale=1.0):
    net = Net()
    scheme = rdp.ResidualDropPath(net, seed=3)
    optimizer = optimizer_of(net)

    def end_step():
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()

    losses = [[lambda b=b: F.cross_entropy(net(b[0]), b[1]) / scale for b in step] for step in steps]
    return net, by_hand(scheme, losses, end_step)


def test_equals_the_loop_by_hand_with_validation_in_between(tmp_path):
    module = Module()
    fit(module, tmp_path, val_check_interval=2)
    net, phases = hand_trained([[batch] for batch in 3 * batches(5)])
    assert_equal(module.net, net)
    assert module.watch.phases == phases
    assert phases.count("reuse") > 4
    assert module.validated is not None, "there was validation while an iteration was open"


def test_accumulation_and_clipping(tmp_path):
    module = Module()
    fit(module, tmp_path, accumulate_grad_batches=2, gradient_clip_val=0.05)
    data = batches(5)
    net, phases = hand_trained(3 * [data[:2], data[2:4], data[4:]], clip=0.05, scale=2)
    assert_equal(module.net, net)
    assert module.watch.phases == phases


def test_manual_optimization_runs_the_pair_on_each_batch(tmp_path):
    module = Module(pairs=True)
    fit(module, tmp_path)
    net, expected = Net(), []
    scheme = rdp.ResidualDropPath(net, seed=3)
    optimizer = optimizer_of(net)
    for x, y in 3 * batches(5):
        for phase in scheme.iterations():
            expected.append(phase)
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(module.net, net)
    assert module.watch.phases == expected


class Seed(L.Callback):
    """Lightning's checkpoints hold no generator states, so that dropout's seed is set for each batch."""

    def on_train_batch_start(self, trainer, *_):
        torch.manual_seed(trainer.global_step)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("pairs", [False, True])
def test_goes_on_from_every_checkpoint_to_the_bit(pairs, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, every_n_epochs=1)
    whole = Module(pairs, dropout=0.2)
    fit(whole, tmp_path, max_epochs=4, callbacks=[keep, Seed()], enable_checkpointing=True)
    completed, pending = whole.scheme.state_dict()["completed"], set()
    for epoch in range(3):
        path = tmp_path / f"epoch={epoch}.ckpt"
        saved = torch.load(path, weights_only=False)["callbacks"]
        pending.add(saved["ResidualDropPathCallback"]["phase"])
        module = Module(pairs, dropout=0.2)
        fit(module, tmp_path, max_epochs=4, ckpt_path=path, callbacks=[Seed()])
        assert_equal(module.net, whole.net)
        assert module.scheme.state_dict()["completed"] == completed
    assert pairs or pending == {"drop", "reuse"}, "there is a checkpoint in the middle of a pair"


def test_a_second_fit_and_a_checkpoint_saved_behind_the_first_go_on(tmp_path):
    whole = Module()
    fit(whole, tmp_path, max_epochs=2)
    module = Module()
    trainer = fit(module, tmp_path, max_epochs=1)
    assert module.scheme.reuse_pending
    trainer.save_checkpoint(tmp_path / "behind.ckpt")
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader(count=1))
    other = Module()
    fit(other, tmp_path, max_epochs=2, ckpt_path=tmp_path / "behind.ckpt")
    assert_equal(other.net, whole.net)
    # The second fit() makes a new optimizer: weights differ, and iterations don't.
    assert module.scheme.state_dict() == whole.scheme.state_dict() == other.scheme.state_dict()


@pytest.mark.parametrize("pairs", [False, True])
def test_none_is_open_after_an_exception(pairs, tmp_path):
    module = Module(pairs)
    module.fail_at = 4
    with pytest.raises(ZeroDivisionError):
        fit(module, tmp_path)
    assert module.scheme.phase is None
    module.fail_at = None
    fit(module, tmp_path)


def test_bfloat16(tmp_path):
    module = Module(dtype=torch.float32)
    fit(module, tmp_path, precision="bf16-mixed", data=loader(dtype=torch.float32))
    net = Net(dtype=torch.float32)
    scheme, optimizer = rdp.ResidualDropPath(net, seed=3), optimizer_of(net)

    def loss(x, y):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(net(x), y)

    steps = [[lambda b=b: loss(*b)] for b in 3 * batches(5, dtype=torch.float32)]
    by_hand(scheme, steps, lambda: (optimizer.step(), optimizer.zero_grad()))
    assert_equal(module.net, net)


def test_a_step_that_the_scaler_skips_is_made_up_for(tmp_path):
    """At a scale of 2³² the first steps overflow: the first iteration stays open, and can be saved."""
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    module = Module(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**32)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    data = loader(count=40, dtype=torch.float32)
    options = {"plugins": [plugin], "callbacks": [keep], "enable_checkpointing": True}
    fit(module, tmp_path, data=data, max_epochs=1, **options)
    taken = module.watch.phases
    assert 10 < len(taken) < 40, "some were skipped"
    assert sum(module.scheme.state_dict()["completed"].values()) == len(taken)
    for step in (1, 2):
        saved = torch.load(tmp_path / f"step={step}.ckpt", weights_only=False)["callbacks"]
        assert saved["ResidualDropPathCallback"]["completed"] == {"drop": 0, "reuse": 0}
        assert saved["ResidualDropPathCallback"]["drawn"] == 0, "the first plan is drawn again"


def test_an_averaged_model_is_ordinary(tmp_path):
    module = Module()
    average = EMAWeightAveraging(decay=0.5)
    fit(module, tmp_path, callbacks=[average])
    net, expected = Net(), None
    scheme, optimizer = rdp.ResidualDropPath(net, seed=3), optimizer_of(net)

    def end_step():
        nonlocal expected
        optimizer.step(), optimizer.zero_grad()
        now = weights(net)
        expected = now if expected is None else {n: 0.5 * v + 0.5 * now[n] for n, v in expected.items()}

    by_hand(scheme, [[lambda b=b: F.cross_entropy(net(b[0]), b[1])] for b in 3 * batches(5)], end_step)
    assert_equal(module.net, expected, 1e-12)  # at the end Lightning copies the averages into the model


def test_another_model_is_refused(tmp_path):
    module = Module()
    module.scheme = rdp.ResidualDropPath(Net(), seed=3)
    with pytest.raises(ValueError, match="scheme must belong to the model that is trained"):
        fit(module, tmp_path)
    with pytest.raises(TypeError, match="scheme must be a ResidualDropPath, got Net"):
        ResidualDropPathCallback(Net())
