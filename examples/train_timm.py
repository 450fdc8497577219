"""Shows where the scheme goes in timm's train.py, on a similar loop with timm's own parts, on the digits.

    python examples/train_timm.py --drop-prob 0.3

Below `create_optimizer_v2` in train.py two lines are added. Model, EMA, mixup, scaler, accumulation, schedule and
checkpoints don't change. Needs timm, torchvision and scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import rdp_kernels as rdp
from examples.digits.loops import command, data, needs

with needs("timm", "torchvision", "scikit-learn"):
    import timm
    from timm.data import Mixup
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

    from rdp_kernels.integrations.timm import attach


def train_one_epoch(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    scaler: NativeScaler,
    ema: ModelEmaV3,
    mixup: Mixup,
    accumulate: int = 2,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """The relevant part of timm's own function, without changes for the scheme."""
    model.train()
    for number, (images, labels) in enumerate(loader):
        images, labels = mixup(images, labels)
        with torch.autocast("cpu", dtype):
            loss = SoftTargetCrossEntropy()(model(images), labels) / accumulate
        update = (number + 1) % accumulate == 0
        scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters(), need_update=update)
        if update:
            optimizer.zero_grad()
            ema.update(model)


def build(options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer, rdp.ResidualDropPath, Any]:
    model = timm.create_model(
        "test_vit", img_size=8, patch_size=2, in_chans=1, num_classes=10, drop_path_rate=options.drop_prob
    )
    optimizer = create_optimizer_v2(model, "adamw", lr=options.lr, weight_decay=0.05)

    rdp.convert(model)
    scheme = rdp.ResidualDropPath(model, seed=options.seed)  # drop_prob=None: timm's rates
    return model, optimizer, scheme, attach(optimizer, scheme)


def train(options: argparse.Namespace) -> float:
    images, labels, test_images, test_labels = data(options)
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)
    model, optimizer, scheme, handle = build(options)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=options.epochs, warmup_epochs=1, warmup_lr=1e-4)
    scaler, ema = NativeScaler(device="cpu"), ModelEmaV3(model, decay=0.9)
    mixup = Mixup(mixup_alpha=0.2, num_classes=10)
    with tempfile.TemporaryDirectory() as folder:
        saver = CheckpointSaver(model, optimizer, model_ema=ema, amp_scaler=scaler, checkpoint_dir=folder)
        for epoch in range(options.epochs):
            train_one_epoch(model, loader, optimizer, scaler, ema, mixup, accumulate=1)
            schedule.step(epoch + 1)
            saver.save_checkpoint(epoch)  # timm.models.resume_checkpoint(model, file, optimizer) continues from it
    handle.remove()
    print(f"optimizer steps: {scheme.state_dict()['completed']}")
    with torch.no_grad():
        return (ema.module.eval()(test_images).argmax(1) == test_labels).float().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    return command(__doc__, train, argv)


if __name__ == "__main__":
    sys.exit(main())
