"""One step as a separate process with a time limit. Its failure doesn't affect other steps."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

GRACE = 5.0
"""Seconds between the interrupt, after which a command writes its rows so far, and the kill."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""The signals that end a visit: Ctrl-C, `timeout`, and a closed terminal."""


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (negative for a signal), whether it was stopped at its limit, and its
    seconds."""

    code: int
    stopped: bool
    seconds: float


def run(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, limit: float, on_line: Callable[[str], object]
) -> Ended:
    """Runs `command` for `limit` seconds at most, and passes its output to `on_line`. An interrupt of this process
    stops the command, and is raised again when the command has ended."""
    start = time.monotonic()
    # A new session: Ctrl-C reaches only this process, and all processes of the step can be stopped at once.
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    reader = threading.Thread(target=_read, args=(process, on_line), daemon=True)
    reader.start()
    stopped = False
    try:
        process.wait(limit)
    except subprocess.TimeoutExpired:
        stopped = True
    finally:
        with undisturbed():
            _stop(process)
            reader.join(GRACE)
    return Ended(process.returncode, stopped, time.monotonic() - start)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Makes each of `SIGNALS` raise `KeyboardInterrupt`, even if a shell made this process ignore it."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with _handled(interrupt):
        yield


def undisturbed() -> contextlib.AbstractContextManager:
    """Ignores `SIGNALS`, so that a second Ctrl-C leaves no process behind and loses no table."""
    return _handled(signal.SIG_IGN)


@contextlib.contextmanager
def _handled(handler: Callable | signal.Handlers) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _stop(process: subprocess.Popen) -> None:
    """Sends an interrupt, as Ctrl-C does. Then kills the process and all processes that it has started."""
    if process.poll() is None:
        _send(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    _send(process, signal.SIGKILL)
    process.wait()


def _send(process: subprocess.Popen, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _read(process: subprocess.Popen, on_line: Callable[[str], object]) -> None:
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            on_line(line.decode(errors="replace").rstrip())
