"""Progress bars for long diagnostics. rich draws them, if installed."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, progress: bool | None) -> Iterator[T]:
    """Yields `items` and draws a bar on stderr. With `progress=None` it does so only where stderr is a terminal."""
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield from items
        return
    try:
        from rich.console import Console
        from rich.progress import track as rich_track
    except ImportError:
        if progress:
            raise ModuleNotFoundError("progress=True needs rich, which is not installed") from None
        yield from items
        return
    total = len(items) if isinstance(items, Sized) else None
    yield from rich_track(items, description, total=total, console=Console(stderr=True), transient=True)
