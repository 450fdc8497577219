"""Fine-tunes any model of timm, or trains it from scratch, with drop-path that skips dropped samples:

    python examples/finetune_timm.py                               # a small transformer on scikit-learn's digits
    python examples/finetune_timm.py vit_tiny_patch16_224 --image-size 64 --scheme drop-path
    python examples/finetune_timm.py resnet50 --pretrained --data FOLDER --lr 1e-4
    python examples/finetune_timm.py --resume                      # continues a run that was stopped or killed

FOLDER holds train/CLASS/*.jpg (or .png, ...) and val/CLASS/*.jpg. An epoch is a pass through the data in every scheme:

plain              every branch runs and learns drop-path          `rdp.convert` alone: stochastic depth for each
sample, as in timm, but dropped samples are skipped residual-droppath  `rdp.ResidualDropPath`: two cheap optimizer steps
per batch; paths dropped in the first learn in the second

Needs timm and torchvision, and scikit-learn for the digits. rich draws a progress bar if it is installed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # idle OpenMP threads spin, on a busy machine for longer than they work

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

import rdp_kernels as rdp
from examples.digits.analysis import weights_sha256
from examples.digits.command import Problem, add_option, add_run_options, begin_run, display
from examples.digits.seeds import seed_of
from examples.digits.storage import Folder, StorageError
from examples.methods import FREEZE_BN

INSTALL = "; needed: pip install timm torchvision scikit-learn (with --no-deps, if your torch is to stay)"
LIMITS = {"drop_prob": (0, 1), "lr": (0, 1e3), "seed": (0, 2**31 - 1)}
LIMITS |= dict.fromkeys(("epochs", "batch_size", "image_size"), (1, 1e6))


def import_timm() -> Any:
    try:
        return importlib.import_module("timm")
    except RuntimeError as error:  # without its compiled library torchvision lacks two of its ops
        if "torchvision::nms" not in str(error):
            raise
    import_timm.library = torch.library.Library("torchvision", "FRAGMENT")  # the ops live as long as this object
    for name in ("nms", "qnms"):
        import_timm.library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("timm")


def load_data(timm: Any, options: argparse.Namespace) -> tuple[Sequence, Sequence, int, int]:
    """Returns training and validation set of (image, label), number of classes, and size of the images."""
    if options.data == "digits":
        from examples.digits.data import Digits

        digits, size = Digits.load(torch.device("cpu")), options.image_size or 32
        train, val = (
            list(zip(F.interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1), labels, strict=True))
            for images, labels in ((digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels))
        )
        return train, val, 10, size
    from torchvision.datasets import ImageFolder

    known = timm.get_pretrained_cfg(options.model).to_dict()
    size = options.image_size or known["input_size"][-1]
    config = timm.data.resolve_data_config({"img_size": size}, pretrained_cfg=known)  # crops, flips, normalisation
    try:
        train, val = (
            ImageFolder(f"{options.data}/{part}", timm.data.create_transform(**config, is_training=part == "train"))
            for part in ("train", "val")
        )
    except OSError as error:
        raise Problem(f"argument --data: must be digits or a folder with train/CLASS and val/CLASS: {error}") from error
    if train.classes != val.classes:
        raise Problem(f"argument --data: {options.data}/train and {options.data}/val must hold the same classes")
    return train, val, len(train.classes), size


def build_model(timm: Any, options: argparse.Namespace, classes: int, size: int, pretrained: bool) -> nn.Module:
    """Returns the model, with the rate and the image size of the options if its class takes them."""
    extra = {"img_size": size, "drop_path_rate": 0.0 if options.scheme == "plain" else options.drop_prob}
    torch.manual_seed(options.seed)
    try:
        while True:
            try:
                model = timm.create_model(options.model, pretrained=pretrained, num_classes=classes, **extra)
                break
            except TypeError as error:
                unknown = [name for name in extra if f"'{name}'" in str(error)]
                if not unknown:
                    raise
                del extra[unknown[0]]
        with torch.no_grad():
            model.eval()(torch.zeros(2, 3, size, size))
    except Exception as error:  # timm's models, file systems and networks raise any error
        reason = f"can't be built: {type(error).__name__}: {' '.join(str(error).split())}"
        raise Problem(f"{options.model}{' --pretrained' * pretrained} --image-size {size}: {reason}") from error
    return model.train()


def convert(model: nn.Module, options: argparse.Namespace, size: int) -> rdp.ResidualDropPath | None:
    """Makes the model's residual branches paths with P(drop) = --drop-prob, and prints a report."""
    if options.scheme == "plain":
        return None
    report = rdp.convert(model, options.drop_prob, example_inputs=torch.randn(2, 3, size, size))
    print(report)
    if not report.converted:
        raise Problem(f"{options.model} has no residual branch that can be skipped: give --scheme plain")
    if options.scheme == "drop-path":
        return None
    try:
        freeze_bn = FREEZE_BN[options.freeze_bn]
        mode = options.mode or "block"
        return rdp.ResidualDropPath(model, options.drop_prob, mode=mode, freeze_bn=freeze_bn, seed=options.seed)
    except ValueError as error:  # BatchNorm in sample mode
        raise Problem(f"argument --mode: {error}") from error


class Training:
    """Can stop after any epoch. Continuing from its state gives the same bits."""

    def __init__(self, options: argparse.Namespace, state: dict[str, Any] | None):
        timm = import_timm()
        if not timm.is_model(options.model):
            close = difflib.get_close_matches(options.model, timm.list_models(), n=3)
            similar = f"similar: {', '.join(close) or 'none'}; timm.list_models() has all names"
            raise Problem(f"argument MODEL: timm has no {options.model!r}; {similar}")
        train, val, classes, size = load_data(timm, options)
        if len(train) < options.batch_size:
            raise Problem(f"argument --batch-size: must be at most {len(train)}, the number of training images")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        data = {"train": len(train), "val": len(val), "classes": classes, "image size": size}
        self.record: dict[str, Any] = {"options": vars(options), "data": data, "epochs": []}
        model = build_model(timm, options, classes, size, options.pretrained and state is None)
        scheme = convert(model, options, size)
        self.iterations = (lambda _: [options.scheme]) if scheme is None else scheme.iterations
        self.model = model.to(self.device)
        self.batches = DataLoader(train, options.batch_size, shuffle=True, drop_last=True, generator=torch.Generator())
        self.val_batches = DataLoader(val, options.batch_size)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), options.lr, weight_decay=0.05)
        self.schedule = CosineAnnealingLR(self.optimizer, options.epochs * len(self.batches))
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        self.parts |= {} if scheme is None else {"scheme": scheme}
        torch.manual_seed(options.seed)  # for draws of dropout and drop-path
        random.seed(options.seed)  # for timm's crops
        if state is not None:
            self.load_state_dict(state)

    def run(self, folder: Folder) -> None:
        folder.prepare()
        epochs, batches, wanted = self.record["epochs"], len(self.batches), self.record["options"]["epochs"]
        with display(wanted * batches, len(epochs) * batches) as (advance, line):
            while len(epochs) < wanted:
                epochs.append(self.run_epoch(len(epochs) + 1, advance, line))
                folder.save_checkpoint(self.state_dict())
        results = self.record | {"weights_sha256": weights_sha256(self.model)}
        folder.write("results.json", json.dumps(results, indent=1).encode())

    def run_epoch(self, epoch: int, advance: Callable, line: Callable[[str], None]) -> dict[str, Any]:
        """Trains for an epoch, then tests."""
        start, losses, steps, worst = time.perf_counter(), [], {}, {}
        self.batches.generator.manual_seed(seed_of(self.record["options"]["seed"], epoch))
        self.model.train()
        for images, labels in self.batches:
            images, labels = images.to(self.device), labels.to(self.device)
            for phase in self.iterations(len(images)):
                loss = F.cross_entropy(self.model(images), labels)
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                steps[phase] = steps.get(phase, 0) + 1
                worst[phase] = max(worst.get(phase, 0.0), losses[-1])
            self.schedule.step()  # once per batch: both iterations of a pair have the same learning rate
            advance(description=f"epoch {epoch}: loss {statistics.fmean(losses[-20:]):.3f}")
        seconds, loss, accuracy = time.perf_counter() - start, statistics.fmean(losses), self.accuracy()
        said = f"loss {loss:.4f}, at worst " + ", ".join(f"{value:.2f} ({phase})" for phase, value in worst.items())
        line(f"epoch {epoch}: {said}, accuracy {accuracy:.1%}, {sum(steps.values())} steps in {seconds:.1f} s")
        result = {"epoch": epoch, "steps": steps, "loss": loss, "worst_loss": worst}
        return result | {"accuracy": accuracy, "seconds": seconds}

    @torch.no_grad()
    def accuracy(self) -> float:
        self.model.eval()
        right = [self.model(x.to(self.device)).argmax(dim=-1) == y.to(self.device) for x, y in self.val_batches]
        return torch.cat(right).double().mean().item()

    def state_dict(self) -> dict[str, Any]:
        rng = (torch.get_rng_state(), torch.cuda.get_rng_state_all(), random.getstate())
        return {name: part.state_dict() for name, part in self.parts.items()} | self.record | {"rng": rng}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (was := state["data"]) != (now := self.record["data"]):
            raise Problem(f"argument --data: was {was} when the run began, is {now}: give --overwrite")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.record = {name: state[name] for name in self.record}
        on_cpu, on_cuda, python = state["rng"]
        torch.set_rng_state(on_cpu)
        torch.cuda.set_rng_state_all(on_cuda)
        random.setstate(python)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = partial(add_option, parser)
    add("model", "a model's name in timm", "pvt_v2_b0", nargs="?", metavar="MODEL")
    add("--data", "digits, or a folder", "digits", metavar="digits|FOLDER")
    add("--scheme", "training scheme", "residual-droppath", choices=("plain", "drop-path", "residual-droppath"))
    add("--drop-prob", "P(drop) of every residual branch", 0.1, type=float)
    add("--mode", "residual-droppath: drop for the whole batch (default) or per sample", choices=("block", "sample"))
    add("--freeze-bn", "residual-droppath: statistics that frozen BatchNorm uses", "batch", choices=tuple(FREEZE_BN))
    add("--epochs", "passes through the data", 10, type=int)
    add("--batch-size", "images in a batch", 64, type=int)
    add("--lr", "AdamW's learning rate at the start of its cosine", 5e-4, type=float)
    add("--seed", "seed of weights, batches and draws", 0, type=int)
    add("--image-size", "pixels per side (default: 32 for digits, else the model's own)", type=int)
    parser.add_argument("--pretrained", action="store_true", help="start from timm's pretrained weights")
    add_run_options(parser, "report/finetune-MODEL-SCHEME")
    return parser


def begin(argv: Sequence[str] | None) -> tuple[Training, Folder]:
    """Returns the training of the options, or of the checkpoint to resume, and its folder."""

    def name(args: argparse.Namespace) -> str:
        return f"finetune-{args.model.replace('/', '-')}-{args.scheme}"

    options, state, folder = begin_run(build_parser(), argv, name, LIMITS)
    if (options.scheme, options.mode) == ("drop-path", "block"):
        raise Problem("argument --mode: must be sample with --scheme drop-path, which decides as timm does")
    return Training(options, state), folder


def main(argv: Sequence[str] | None = None) -> int:
    try:
        training, folder = begin(argv)
        training.run(folder)
    except (Problem, StorageError, ImportError) as problem:
        print(f"finetune_timm.py: error: {problem}{INSTALL * isinstance(problem, ImportError)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped. Continue from the last whole epoch with --resume")
        return 130
    print(f"Results: {folder.path / 'results.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
