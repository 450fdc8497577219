"""Trains a small ViT of transformers on scikit-learn's digits with its `Trainer`, by the drop and reuse iterations.

    python examples/train_transformers.py --drop-prob 0.3

Needs transformers, accelerate and scikit-learn. Nothing is downloaded: the model is made from a configuration.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

import torch

import rdp_kernels as rdp
from examples.digits.loops import command, data, needs

with needs("transformers", "accelerate", "scikit-learn"):
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    from rdp_kernels.integrations.transformers import attach


def train(options: argparse.Namespace) -> float:
    images, labels, test_images, test_labels = data(options)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, num_labels=10, initializer_range=0.1,
        hidden_size=48, num_hidden_layers=4, num_attention_heads=3, intermediate_size=192,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    print(rdp.convert(model, drop_prob=options.drop_prob))  # transformers' ViT has no drop-path
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            learning_rate=options.lr,
            lr_scheduler_type="cosine",
            logging_strategy="epoch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=options.seed,
        )
        dataset = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]
        trainer = Trainer(model, arguments, train_dataset=dataset)

        scheme = rdp.ResidualDropPath(model, seed=options.seed)
        attach(trainer, scheme)

        trainer.train()
    print(f"optimizer steps: {scheme.state_dict()['completed']}")
    with torch.no_grad():
        return (model.eval()(test_images).logits.argmax(1) == test_labels).float().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    return command(__doc__, train, argv)


if __name__ == "__main__":
    sys.exit(main())
