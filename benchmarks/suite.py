"""`python -m benchmarks all`: runs every command that measures, and shows their findings in one table.

`--quick` takes a few settings and turns. `--tiny` only shows that all commands run. Its numbers say little about real
tensors.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType

from rich.console import Console
from rich.table import Table

from . import command, host, memory, op_traffic, ops, overhead, scaling, step
from .findings import FINDINGS
from .harness import Row

MEASURING: dict[str, ModuleType] = {
    "step": step,
    "memory": memory,
    "ops": ops,
    "overhead": overhead,
    "host": host,
    "scaling": scaling,
    "traffic": op_traffic,
}
"""Name of a command → its module."""
ANY_DEVICE = ("traffic",)
"""The commands whose results are the same on every device. They have no option `--device`."""
INTERRUPTED = 130


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "all", help="every command that measures", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    command.add_sizes(parser, "a few settings and turns, two minutes on two cores", "tiny tensors and networks")
    parser.add_argument("--device", type=command.device, default="cpu", help="cpu or cuda; default: cpu")
    parser.add_argument(
        "--out",
        type=command.folder,
        metavar="FOLDER",
        help="write COMMAND-DEVICE.csv and .json here (traffic.csv is the same on all devices)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs all commands, even if one fails. An interrupt ends it. Returns the highest exit code."""
    if not command.has_device(options.device):
        return 2
    console, code = Console(width=command.WIDTH), 0
    size = [] if options.size == "full" else [f"--{options.size}"]
    found: dict[str, list[Row]] = {}
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name, module in MEASURING.items():
            console.rule(f"[bold]{name}")
            on_device = [] if name in ANY_DEVICE else [options.device]
            files = {kind: folder / f"{'-'.join([name, *on_device])}.{kind}" for kind in ("csv", "json")}
            arguments = [name, *size, *(text for kind in on_device for text in ("--device", kind))]
            arguments += [text for kind, file in files.items() for text in (f"--{kind}", str(file))]
            files["json"].unlink(missing_ok=True)  # a file of an earlier run must not be taken for this run's
            start = time.monotonic()
            ended = parsed([module], arguments)
            code = max(code, ended.run(ended))
            seconds[name] = time.monotonic() - start
            if files["json"].exists():
                found[name] = json.loads(files["json"].read_text(encoding="utf-8"))
            if code == INTERRUPTED:
                break
    console.rule("[bold]all")
    console.print(table_of(found, seconds, options.size))
    return code


def parsed(modules: Iterable[ModuleType], arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options of one of the commands in `modules`. Without a command `run` prints the help."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures the package, and shows the results."
    )
    commands = parser.add_subparsers(metavar="COMMAND")
    for module in modules:
        module.add_command(commands)
    parser.set_defaults(run=lambda _: parser.print_help() or 0)
    return parser.parse_args(arguments)


def table_of(found: dict[str, list[Row]], seconds: dict[str, float], size: str) -> Table:
    """Returns the table of findings, with a line or two for each command."""
    of_what = {"tiny": " on tiny tensors and networks: does it run", "quick": " of a quick run"}.get(size, "")
    row = next((rows[0] for rows in found.values() if rows), None)
    table = Table(title=f"Findings{of_what}", caption=command.machine_line(row) if row else None)
    for name in ("command", "question", "answer"):
        table.add_column(name)
    for name, took in seconds.items():
        table.add_section()
        answers = list(answers_of(name, found.get(name, [])))
        label = f"{name}\n[dim]{took:.0f} s[/dim]"
        for question, answer in answers or [("", "nothing was measured")]:
            table.add_row(label, question, answer)
            label = ""
    return table


def answers_of(name: str, rows: list[Row]) -> Iterable[tuple[str, str]]:
    """Yields (question, answer) pairs for one command's rows."""
    questions: dict[str, Callable[[list[Row]], str | None]] = FINDINGS.get(name, {})
    for question, answer in questions.items() if rows else ():
        text = answer(rows)
        if text is not None:
            yield question, text
