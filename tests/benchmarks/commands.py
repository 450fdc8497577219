"""Running one command by itself."""

from __future__ import annotations

import argparse
from types import ModuleType


def run_command(module: ModuleType, *arguments: str) -> int:
    """As `python -m benchmarks COMMAND ARGUMENTS` does; an option that is refused exits."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    module.add_command(commands)
    (name,) = commands.choices
    options = parser.parse_args([name, *map(str, arguments)])
    return options.run(options)
