"""The Python standard library's source files: real text that every machine has."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.digits.seeds import seed_of

# Not the library itself: packages, tests, and generated tables.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
SKIPPED_FILES = "_sysconfigdata"
FILE_START = b"\0"  # stands before every file; sampling begins with it


@dataclass(frozen=True)
class Text:
    """Bytes for training and for validation, uint8 `[N]`, and the SHA-256 of both together."""

    train: Tensor
    validation: Tensor
    sha256: str

    @classmethod
    def load(cls, device: torch.device, train_bytes: int | None = None, root: Path | None = None) -> Text:
        """Loads all files, or only the first `train_bytes` bytes for training. The validation set is the same.

        The validation set is about a tenth of the files, chosen by their paths.
        """
        root = root or Path(sysconfig.get_paths()["stdlib"])
        parts = {False: bytearray(), True: bytearray()}
        for file in source_files(root):
            parts[held_out(file)] += FILE_START + (root / file).read_bytes()
        train, validation = bytes(parts[False][:train_bytes]), bytes(parts[True])
        sha256 = hashlib.sha256(train + validation).hexdigest()
        tensors = (torch.frombuffer(bytearray(part), dtype=torch.uint8).to(device) for part in (train, validation))
        return cls(*tensors, sha256)

    def batch(self, seed: int, number: int, size: int, context: int) -> tuple[Tensor, Tensor]:
        """Returns batch `number` = 0, 1, ... of `seed`, int64 `[size, context]`: random windows of the training bytes,
        and the next byte for each place. It is a pure function, so that runs are easy to resume."""
        generator = torch.Generator().manual_seed(seed_of(seed, number))
        starts = torch.randint(len(self.train) - context, (size,), generator=generator)
        return windows(self.train, starts, context)

    def spread(self, part: Tensor, count: int, context: int) -> tuple[Tensor, Tensor]:
        """Returns `count` windows at equal distances over `part`, the same for all methods."""
        starts = torch.arange(count) * (len(part) - context - 1) // max(count - 1, 1)
        return windows(part, starts, context)

    def __str__(self) -> str:
        return f"{len(self.train):,} bytes to train, {len(self.validation):,} to validate, SHA-256 {self.sha256[:12]}"


def source_files(root: Path) -> Iterable[str]:
    """Returns relative paths, sorted."""
    files = sorted(file.relative_to(root).as_posix() for file in root.rglob("*.py"))
    return [
        file
        for file in files
        if not SKIPPED_FOLDERS.intersection(parts := file.split("/")) and not parts[-1].startswith(SKIPPED_FILES)
    ]


def held_out(file: str) -> bool:
    return hashlib.sha256(file.encode()).digest()[0] < 26  # out of 256


def windows(text: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    found = text[(starts.unsqueeze(1) + torch.arange(context + 1)).to(text.device)].long()
    return found[:, :-1], found[:, 1:]
