"""Files that are replaced in one step. If writing fails, the old file is kept."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch

CHECKPOINT = "checkpoint.pt"
FORMAT = b"rdp-digits-2"  # the first bytes of a checkpoint; change it with the format


class StorageError(Exception):
    """A file can't be written or read. The message names it, the reason, and whether an old file was kept."""


class Folder:
    """The folder of one run, recognised by its file `mark`. Raises `StorageError` if it can't be used. Other files in
    it aren't changed."""

    def __init__(self, path: Path, mark: str = CHECKPOINT):
        self.path, self._mark = path.resolve(), mark

    def prepare(self) -> None:
        """Makes the folder, and checks that files can be written there."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            strangers = [file.name for file in self.path.iterdir() if not file.name.startswith(".")]
        except OSError as error:
            raise StorageError(f"can't write to {self.path}: {error.strerror or error}") from error
        if strangers and not (self.path / self._mark).exists():
            raise StorageError(
                f"{self.path} holds {sorted(strangers)[0]!r} and no report of an earlier run: "
                "name a new or an empty folder"
            )
        try:
            self.write(".probe", b"")
        finally:
            (self.path / ".probe").unlink(missing_ok=True)

    def write(self, name: str, content: bytes) -> None:
        """Replaces the file in one step after its content is on the disk."""
        file = self.path / name
        temporary = file.with_name(f".{file.name.lstrip('.')}.tmp")
        try:
            try:
                with temporary.open("wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                os.replace(temporary, file)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
        except OSError as error:
            kept = "; the one before it is kept" if file.exists() else ""
            raise StorageError(f"can't write {file}: {error.strerror or error}{kept}") from error

    def has_checkpoint(self) -> bool:
        return (self.path / CHECKPOINT).exists()

    def save_checkpoint(self, state: dict[str, Any], name: str = CHECKPOINT) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getvalue()
        self.write(name, FORMAT + hashlib.sha256(content).digest() + content)

    def load_checkpoint(self, device: torch.device, name: str = CHECKPOINT) -> dict[str, Any]:
        """Loads the checkpoint. Raises `StorageError` if it is damaged, as torch.load doesn't notice a flipped bit."""
        file = self.path / name
        damaged = f"{file} is damaged or of another version ({{}}); it was left as it is. Start again with --overwrite"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise StorageError(f"can't read {file}: {error.strerror or error}") from error
        digest, body = content[len(FORMAT) :][:32], content[len(FORMAT) + 32 :]
        if not content.startswith(FORMAT):
            raise StorageError(damaged.format(f"it begins with {content[: len(FORMAT)]!r}"))
        if hashlib.sha256(body).digest() != digest:
            raise StorageError(damaged.format("its checksum is wrong"))
        try:
            return torch.load(io.BytesIO(body), map_location=device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise StorageError(damaged.format(str(error).splitlines()[0])) from error
