"""Trains a small ViT on scikit-learn's digits with Lightning's `Trainer`, by the drop and reuse iterations.

    python examples/train_lightning.py            # every optimizer step is the next iteration, on the next batch
    python examples/train_lightning.py --pairs    # manual optimization: both iterations on every batch

Needs lightning and scikit-learn.
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import rdp_kernels as rdp
from examples.digits.loops import command, data, needs
from examples.models import ViT

with needs("lightning", "scikit-learn"):
    import lightning as L

    from rdp_kernels.integrations.lightning import ResidualDropPathCallback


class Classifier(L.LightningModule):
    def __init__(self, net: nn.Module, lr: float):
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        x, y = batch
        self.log("accuracy", (self.net(x).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters())
        batches = int(self.trainer.estimated_stepping_batches)
        schedule = OneCycleLR(optimizer, self.lr, batches if self.automatic_optimization else 2 * batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class PairsClassifier(Classifier):
    """Trains with both iterations on every batch."""

    scheme: rdp.ResidualDropPath

    def __init__(self, net: nn.Module, lr: float):
        super().__init__(net, lr)
        self.automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        optimizer = self.optimizers()
        for _ in self.scheme.iterations(len(batch[0])):
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, index))
            optimizer.step()
            self.lr_schedulers().step()


def train(options: argparse.Namespace) -> float:
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    images, labels, test_images, test_labels = data(options)
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(test_images, test_labels), batch_size=len(test_images))
    module = (PairsClassifier if options.pairs else Classifier)(ViT(dim=48, depth=4), options.lr)

    module.scheme = rdp.ResidualDropPath(module, options.drop_prob, seed=options.seed)
    callbacks = [ResidualDropPathCallback(module.scheme)]

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(accelerator="cpu", max_epochs=options.epochs, callbacks=callbacks, **quiet)
    trainer.fit(module, loader, test)
    print(f"optimizer steps: {module.scheme.state_dict()['completed']}")
    return trainer.callback_metrics["accuracy"].item()


def main(argv: Sequence[str] | None = None) -> int:
    return command(__doc__, train, argv, pairs="both iterations on every batch, by manual optimization")


if __name__ == "__main__":
    sys.exit(main())
