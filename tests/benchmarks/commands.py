"""Running one command by itself."""

from __future__ import annotations

import argparse
from types import ModuleType


def run_command(module: ModuleType, *arguments: str) -> int:
    """Runs a command as `python -m benchmarks COMMAND ARGUMENTS` does; it exits if an option is refused."""
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()
    module.add_command(commands)
    (name,) = commands.choices
    options = parser.parse_args([name, *map(str, arguments)])
    return options.run(options)
