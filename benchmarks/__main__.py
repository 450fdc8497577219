"""`python -m benchmarks COMMAND`. A command is a module with `add_command`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import ops, overhead, readme, sanitize, step, tune

COMMANDS = (step, ops, overhead, tune, sanitize, readme)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures, and shows what was measured.")
    commands = parser.add_subparsers(metavar="COMMAND")
    for command in COMMANDS:
        command.add_command(commands)
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
