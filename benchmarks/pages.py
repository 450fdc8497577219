"""`python -m benchmarks pages`: writes the tables and plots of README.md and docs/ from benchmarks/results/.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `tables.TABLES` describes how the table NAME is made.
The pages show the plots `docs/plots/NAME.svg`. Equal rows give equal bytes with the same version of matplotlib.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from .output import read_csv, replace
from .tables import FURTHER, TABLES, TableError

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md", ROOT / "docs" / "evidence.md")
PLOTS = ROOT / "docs" / "plots"
PLOT = re.compile(r"\]\((?:docs/)?plots/([\w-]+)\.svg\)")
DRAWN_BY = re.compile(rb"Matplotlib v[\w.]+")
MARKER = re.compile(r"<!-- (?:table: (?P<name>\S+)|(?P<end>end)) -->\n?")


def updated(text: str, results: Path) -> str:
    """Returns `text` with new tables. Raises `TableError`."""
    parts, copied, name = [], 0, None
    for marker in MARKER.finditer(text):
        line = text.count("\n", 0, marker.start()) + 1
        if (name is None) == (marker["name"] is None):
            wanted = f"the end of table {name!r}" if name else "the start of a table"
            raise TableError(f"line {line}: {marker[0].strip()} where {wanted} should come")
        if marker["name"] is not None:
            parts += [text[copied : marker.end()], _made(marker["name"], line, results)]
        copied, name = (marker.end(), marker["name"]) if marker["name"] else (marker.start(), None)
    if name is not None:
        raise TableError(f"table {name!r} has no <!-- end --> after it")
    return "".join([*parts, text[copied:]])


def _made(name: str, line: int, results: Path) -> str:
    if name not in TABLES:
        raise TableError(f"line {line}: no table is called {name!r}; there are: {', '.join(TABLES)}")
    file, make = TABLES[name]
    try:
        rows = read_csv(results / file)
    except FileNotFoundError:
        raise TableError(f"table {name!r} needs {results / file}, which isn't there: measure first") from None
    try:
        if not rows:
            raise TableError("it has no rows")
        further = results / FURTHER[name] if name in FURTHER else None
        both = [rows] if further is None else [rows, read_csv(further) if further.exists() else []]
        return f"\n{make(*both)}\n\n"
    except TableError as error:
        raise TableError(f"table {name!r} can't be made from {results / file}: {error}") from None
    except KeyError as error:
        raise TableError(f"table {name!r} can't be made from {results / file}: it has no {error}") from None


def drawn(names: set[str], results: Path, folder: Path) -> dict[Path, bytes]:
    """Returns the expected content of the plots in `folder`. Plots drawn by another version of matplotlib are left as
    they are. Raises `TableError`."""
    from .plot_style import NothingToPlot, save
    from .plots import plots_of_results

    figures, wanted = plots_of_results(results), {}
    if missing := names - figures.keys():
        raise TableError(f"no plot is called {sorted(missing)}; there are: {', '.join(figures)}")
    with tempfile.TemporaryDirectory() as temporary:
        for name in sorted(names):
            path, new = folder / f"{name}.svg", Path(temporary, f"{name}.svg")
            try:
                save(figures[name](), new)
            except NothingToPlot as error:
                raise TableError(f"plot {name!r} can't be drawn from {results}: {error}") from None
            content = new.read_bytes()
            if not path.exists() or DRAWN_BY.findall(path.read_bytes()) == DRAWN_BY.findall(content):
                wanted[path] = content
    return wanted


def add_command(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "pages", help="tables and plots of README.md and docs/ from benchmarks/results", description=__doc__
    )
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page isn't current")
    parser.add_argument("--pages", type=Path, nargs="+", default=PAGES, help=argparse.SUPPRESS)
    parser.add_argument("--plots", type=Path, default=PLOTS, help=argparse.SUPPRESS)
    parser.add_argument("--results", type=Path, default=RESULTS, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Writes all pages and plots, or none if one of them can't be made."""
    wanted: dict[Path, bytes] = {}
    for page in options.pages:
        try:
            text = updated(page.read_text(encoding="utf-8"), options.results)
            wanted[page] = text.encode()
            if shown := set(PLOT.findall(text)):
                wanted |= drawn(shown, options.results, options.plots)
        except TableError as error:
            print(f"{page.name}: {error}", file=sys.stderr)
            return 1
    stale = {path: content for path, content in wanted.items() if not path.exists() or path.read_bytes() != content}
    for path, content in stale.items():
        if options.check:
            print(f"{path.name}: not what {options.results} gives: run `python -m benchmarks pages`")
        else:
            path.parent.mkdir(exist_ok=True)
            replace(path, content)
    return 1 if options.check and stale else 0
