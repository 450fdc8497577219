"""The package's folders form floors: each imports only from floors below it, and no files import each other.

Imports inside functions and imports for types alone count too. `python docs/pictures.py` draws the floors for
docs/architecture.md.
"""

import ast
import itertools
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = (  # from the lowest floor up; folders of one floor don't import each other
    ("_utils",),
    ("plan",),
    ("kernels",),
    ("ops",),
    ("paths",),
    ("convert",),
    ("scheme",),
    ("estimate", "diagnostics", "integrations"),
    ("__init__",),
    ("info",),
)
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
ALLOWED = {("rdp_kernels.scheme.scheme", "rdp_kernels.estimate")}
"""`ResidualDropPath.estimate` imports its code when it is called, as most trainings don't use it."""


def files() -> dict[str, Path]:
    """The modules of the package by their dotted names."""
    found = {}
    for path in sorted((ROOT / "rdp_kernels").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports() -> dict[str, set[str]]:
    """The modules of the package that each module imports."""
    known, found = files(), defaultdict(set)
    for module, path in known.items():
        package = path.relative_to(ROOT).parts[:-1]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[module] |= {alias.name for alias in node.names} & known.keys()
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else ()
                source = ".".join((*base, *(node.module or "").split("."))).strip(".")
                targets = (f"{source}.{alias.name}" for alias in node.names)
                found[module] |= {target if target in known else source for target in targets} & known.keys()
        found[module].discard(module)
    return found


def wing(module: str) -> str:
    return (*module.split("."), "__init__")[1]


def arrows() -> set[tuple[str, str]]:
    """For each wing, the wings that its files import."""
    pairs = itertools.chain.from_iterable(((a, b) for b in targets) for a, targets in imports().items())
    found = {(wing(a), wing(b)) for a, b in pairs if (a, b) not in ALLOWED}
    return {(a, b) for a, b in found if a != b}


def edges() -> list[tuple[str, str]]:
    """The arrows of the picture: imports between wings, without those that follow from other arrows."""
    drawn = {(a, b) for a, b in arrows() if a not in ("__init__", "info")}

    def reached(start: str, skipped: tuple[str, str]) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            at = todo.pop()
            new = {b for a, b in drawn if a == at and (a, b) != skipped} - seen
            seen |= new
            todo += new
        return seen

    return sorted((a, b) for a, b in drawn if b not in reached(a, (a, b)))


def test_every_module_is_in_a_wing():
    assert {wing(module) for module in files()} == HEIGHT.keys()


def test_imports_run_downward():
    upward = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if wing(module) != wing(target) and HEIGHT[wing(module)] <= HEIGHT[wing(target)]
        if (module, target) not in ALLOWED
    ]
    assert upward == []


def test_no_files_import_each_other():
    targets = {module: {t for t in found if (module, t) not in ALLOWED} for module, found in imports().items()}
    while True:  # removes the modules that import none of the others, and those that none of them imports
        targets = {module: found & targets.keys() for module, found in targets.items()}
        inside = {module for module, found in targets.items() if found} & set().union(*targets.values())
        if inside == targets.keys():
            break
        targets = {module: found for module, found in targets.items() if module in inside}
    assert targets == {}, "these import each other"
