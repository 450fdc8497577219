"""Trains a small ViT on scikit-learn's digits in your own loop under accelerate, by pairs of iterations.

    python examples/train_accelerate.py --drop-prob 0.3

Needs accelerate and scikit-learn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import rdp_kernels as rdp
from examples.digits.loops import command, data, needs
from examples.models import ViT

with needs("accelerate", "scikit-learn"):
    from accelerate import Accelerator

    from rdp_kernels.integrations.accelerate import register


def train(options: argparse.Namespace) -> float:
    images, labels, test_images, test_labels = data(options)
    accelerator = Accelerator(cpu=True)
    model = ViT(dim=48, depth=4)
    optimizer = torch.optim.AdamW(model.parameters())
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True, drop_last=True)
    steps = 2 * options.epochs * len(loader)  # at most: a batch is one step if nothing is dropped
    schedule = OneCycleLR(optimizer, options.lr, steps)

    scheme = rdp.ResidualDropPath(model, options.drop_prob, seed=options.seed)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    register(accelerator, model, scheme)

    for epoch in range(options.epochs):
        model.train()
        for x, y in loader:
            for _ in scheme.iterations(len(x)):
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.3f}")
    print(f"optimizer steps: {scheme.state_dict()['completed']}")
    with torch.no_grad():
        return (model.eval()(test_images).argmax(1) == test_labels).float().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    return command(__doc__, train, argv)


if __name__ == "__main__":
    sys.exit(main())
