"""Trains a small transformer on scikit-learn's digits on one or several processes, which may be killed and resumed:

    torchrun --nproc-per-node 2 examples/train_ddp.py            # DistributedDataParallel
    torchrun --nproc-per-node 4 examples/train_ddp.py --resume   # continues, on any number of processes
    python examples/train_ddp.py                                 # one process

With `torchrun --max-restarts 9` training continues automatically after a process has died. The launcher then needs
TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, else new processes wait for dead ones (pytorch#135712).

A checkpoint is written every few optimizer steps, also between the two iterations of a pair. It holds the whole state:
on CPUs a run that was killed at any point and resumed on as many processes ends with bitwise equal weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a clone, without PYTHONPATH

import rdp_kernels as rdp
from examples.digits.analysis import weights_sha256
from examples.digits.data import BATCH_SIZE, Digits
from examples.digits.storage import Folder, StorageError
from examples.models import ViT
from rdp_kernels.integrations import distributed

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
RESTARTED = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # restarts by torchrun after a process died
TIMEOUT = timedelta(minutes=2)  # for a process that hangs; a dead one is noticed at once
LIMITS = {"drop_prob": (0, 1), "steps": (1, 1e6), "save_every": (1, 1e6), "seed": (0, 2**31 - 1)}


class Problem(Exception):
    """An error that the user can fix. The message says how, in one line."""


def place() -> tuple[torch.device, str]:
    """Returns the device of this process, and the backend between processes. NCCL refuses two processes on one GPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus == 0:
        return torch.device("cpu"), "gloo"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % gpus)
    return device, "nccl" if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= gpus else "gloo"


def train(options: argparse.Namespace, folder: Folder, state: dict[str, Any] | None) -> None:
    device, _ = place()
    digits = Digits.load(device)
    torch.manual_seed(options.seed)
    model = ViT(dim=64, depth=6, heads=4, position_std=0.5).to(device)
    scheme = rdp.ResidualDropPath(model, options.drop_prob, seed=options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    parts = {"model": model, "optimizer": optimizer, "scheme": scheme}
    progress = {"steps": 0, "batches": 0}
    if state is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        progress = state["progress"]

    forward = model
    if WORLD > 1:
        forward = DistributedDataParallel(model, find_unused_parameters=True)
        distributed.register(forward, scheme, timeout=TIMEOUT)
    while progress["steps"] < options.steps:
        progress["batches"] += not scheme.reuse_pending
        images, labels = digits.batch(options.seed, progress["batches"] - 1)
        with scheme.reuse_iteration() if scheme.reuse_pending else scheme.drop_iteration():
            loss = F.cross_entropy(forward(images[RANK::WORLD]), labels[RANK::WORLD])  # this process's share
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        progress["steps"] += 1
        done = progress["steps"] == options.steps
        if RANK == 0 and (done or progress["steps"] % options.save_every == 0):
            saved = {name: part.state_dict() for name, part in parts.items()}
            folder.save_checkpoint(saved | {"progress": progress, "options": vars(options)})
        if RANK == 0 and (done or progress["steps"] % 50 == 0):
            print(f"step {progress['steps']}: loss {loss.item():.4f}", flush=True)
    if RANK == 0:
        model.eval()
        with torch.no_grad():
            right = model(digits.test_images).argmax(dim=-1) == digits.test_labels
        results = {"accuracy": right.double().mean().item(), "weights_sha256": weights_sha256(model)}
        folder.write("results.json", json.dumps(results | progress, indent=1).encode())
        print(f"Accuracy {results['accuracy']:.1%}. Results: {folder.path / 'results.json'}")


def begin(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Folder, dict[str, Any] | None]:
    """Returns options, folder, and the checkpoint to continue from, if any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drop-prob", help="P(drop) of every path (default: %(default)s)", type=float, default=0.3)
    parser.add_argument("--steps", help="optimizer steps (default: %(default)s)", type=int, default=500)
    parser.add_argument("--save-every", help="steps between checkpoints (default: %(default)s)", type=int, default=25)
    parser.add_argument("--seed", help="seed of weights, batches and plans (default: %(default)s)", type=int, default=0)
    parser.add_argument("--out", help="folder of the run (default: %(default)s)", type=Path, default="report/ddp")
    parser.add_argument("--resume", help="continue the run in that folder", action="store_true")
    args = parser.parse_args(argv)
    folder, state = Folder(args.out), None
    if folder.has_checkpoint():
        state = folder.load_checkpoint(torch.device("cpu"))
        if "progress" not in state:
            raise Problem(f"argument --out: {folder.path} holds the run of another example")
        if not (args.resume or RESTARTED):
            raise Problem(f"argument --out: {folder.path} holds a run: give --resume, or name another folder")
        parser.set_defaults(**state["options"])  # options that aren't given have the run's values
        args = parser.parse_args(argv)
    options = argparse.Namespace(**{name: getattr(args, name) for name in LIMITS})
    for name, (low, high) in LIMITS.items():
        option, value = f"argument --{name.replace('_', '-')}", getattr(options, name)
        if not low <= value <= high:
            raise Problem(f"{option}: must be in [{low:g}, {high:g}], got {value}")
        if state is not None and value != state["options"][name]:
            raise Problem(f"{option}: the run in {folder.path} has {state['options'][name]}, got {value}")
    if BATCH_SIZE % WORLD:
        raise Problem(f"the batches of {BATCH_SIZE} images can't be shared evenly by {WORLD} processes")
    if RANK == 0:
        folder.prepare()
    return options, folder, state


def main(argv: Sequence[str] | None = None) -> int:
    try:
        options, folder, state = begin(argv)
        if WORLD > 1:
            dist.init_process_group(place()[1], timeout=TIMEOUT)
        train(options, folder, state)
        if WORLD > 1:
            dist.destroy_process_group()
    except (Problem, StorageError) as problem:
        if RANK == 0:
            print(f"train_ddp.py: error: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if RANK == 0:
            print("Stopped. Continue from the last checkpoint with --resume")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
