"""Run by torchrun: one rank of another library's loop, on its half of every batch. Prints the largest weight
difference."""

import os
import sys
import warnings
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

import rdp_kernels as rdp
from tests.integrations.loops import Net, batches, by_hand

HALF = 4
TIMEOUT = 60


class WithLoss(nn.Module):
    def __init__(self, net: Net):
        super().__init__()
        self.net = net

    def forward(self, x, labels):
        return {"loss": F.cross_entropy(self.net(x), labels)}


def optimizer_of(net):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def train_accelerate(net, data, rank):
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    from rdp_kernels.integrations.accelerate import register

    init = InitProcessGroupKwargs(backend="gloo", timeout=timedelta(seconds=TIMEOUT))
    accelerator = Accelerator(
        cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True), init]
    )
    scheme = rdp.ResidualDropPath(net, seed=3)
    model, optimizer = accelerator.prepare(net, optimizer_of(net))
    register(accelerator, model, scheme)
    handle = scheme.alternate(optimizer)
    for x, y in halves(data, rank):
        accelerator.backward(F.cross_entropy(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()


def train_lightning(net, data, rank):
    import lightning as L
    from lightning.pytorch.strategies import DDPStrategy

    from rdp_kernels.integrations.lightning import ResidualDropPathCallback

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = WithLoss(net)

        def training_step(self, batch, _):
            return self.model(*batch)["loss"]

        def configure_optimizers(self):
            return optimizer_of(net)

    module = Module()
    strategy = DDPStrategy(
        find_unused_parameters=True, process_group_backend="gloo", timeout=timedelta(seconds=TIMEOUT)
    )
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler")
    options = {"accelerator": "cpu", "devices": 2, "strategy": strategy, "max_epochs": 1, **dict.fromkeys(off, False)}
    trainer = L.Trainer(callbacks=[ResidualDropPathCallback(rdp.ResidualDropPath(module, seed=3))], **options)
    trainer.fit(module, DataLoader(halves(data, rank), batch_size=None))


def train_transformers(net, data, rank):
    from transformers import Trainer, TrainingArguments

    from rdp_kernels.integrations.transformers import attach

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = WithLoss(net)
    scheme = rdp.ResidualDropPath(model, seed=3)
    half = {"max_steps": len(data) // 3, "per_device_train_batch_size": HALF, "optim": "sgd", "learning_rate": 0.1}
    half |= {"optim_args": "momentum=0.9", "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    half |= {"ddp_find_unused_parameters": True, "ddp_backend": "gloo", "ddp_timeout": TIMEOUT, "use_cpu": True}
    half |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "remove_unused_columns": False}
    dataset = [{"x": x[i], "labels": y[i]} for x, y in data for i in range(len(y))]
    trainer = InOrder(model, TrainingArguments(sys.argv[2], **half), train_dataset=dataset)
    attach(trainer, scheme)
    trainer.train()
    # another run with the same optimizer and DDP registers nothing twice
    rest = [{"x": x[i], "labels": y[i]} for x, y in data[len(data) // 3 :] for i in range(len(y))]
    trainer.train_dataset, trainer.args.max_steps = rest, len(data) - len(data) // 3
    trainer.train()


def halves(data, rank):
    return [(x[HALF * rank :][:HALF], y[HALF * rank :][:HALF]) for x, y in data]


def main(name):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data, rank = batches(9, size=2 * HALF), int(os.environ["RANK"])
    expected = Net()
    scheme, optimizer = rdp.ResidualDropPath(expected, seed=3), optimizer_of(expected)
    steps = [[lambda b=b: F.cross_entropy(expected(b[0]), b[1])] for b in data]
    phases = by_hand(scheme, steps, lambda: (optimizer.step(), optimizer.zero_grad()))
    assert phases.count("reuse") > 2
    net = Net()
    {"accelerate": train_accelerate, "lightning": train_lightning, "transformers": train_transformers}[name](
        net, data, rank
    )
    pairs = zip(net.parameters(), expected.parameters(), strict=True)
    farthest = max(float((p - q).detach().abs().max()) for p, q in pairs)
    assert farthest < 1e-12, farthest
    print(f"rank {rank} is right", flush=True)
    dist.destroy_process_group()  # these libraries leave it to the script
    # Their DDP stays alive in reference cycles, with gloo's threads. These abort one in twenty processes that finalise
    # Python meanwhile (pytorch#190489).
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
