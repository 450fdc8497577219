"""`python -m benchmarks COMMAND`. A command is a module with `add_command`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import against, estimate, expected, pages, sanitize, suite, tune
from .gpu import command as gpu

COMMANDS = (suite, *suite.MEASURING.values(), against, estimate, expected, gpu, tune, sanitize, pages)


def main(arguments: Sequence[str] | None = None) -> int:
    options = suite.parsed(COMMANDS, arguments)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
