"""Docstrings of public names, in Google's style: what `help()`, an IDE and the reference show.

`make lint` compares sections with signatures (pydoclint). Here every public name has all sections, and an example that
runs. Examples use `torch`, `nn` and `rdp` without importing them, as docs/reference/index.md says.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import importlib
import inspect
import itertools
import re
import textwrap
from collections import Counter
from collections.abc import Iterator

import docstring_parser
import pytest
import torch
from torch import nn

import rdp_kernels as rdp
from examples.libraries import import_torchvision, installed

from .markdown import ROOT

MODULES = (
    "", "diagnostics", "estimate", "convert", "integrations.accelerate", "integrations.compile",
    "integrations.compile_whole", "integrations.cuda_graphs", "integrations.distributed", "integrations.fsdp",
    "integrations.lightning", "integrations.timm", "integrations.transformers",
)  # fmt: skip
NEEDS = {"accelerate", "lightning", "transformers"}


def public_names() -> Iterator[tuple[str, object]]:
    if installed("torchvision"):
        import_torchvision()  # transformers and Lightning import it where they find it
    seen = set()
    for name in MODULES:
        last = name.rpartition(".")[2]
        if last in NEEDS and not installed(last):
            continue
        module = importlib.import_module(f"rdp_kernels.{name}".rstrip("."))
        for public in module.__all__:
            value = getattr(module, public)
            if id(value) not in seen:
                seen.add(id(value))
                yield f"{module.__name__}.{public}", value


PUBLIC = dict(public_names())


def callables() -> Iterator[tuple[str, object]]:
    """Functions, classes that users construct, and public methods; what a class inherits from elsewhere isn't ours."""
    for name, value in PUBLIC.items():
        yield name, value
        for method, member in vars(value).items() if inspect.isclass(value) else ():
            inner = getattr(member, "__func__", member)
            if not method.startswith("_") and inspect.isfunction(inner) and method not in ("forward", "extra_repr"):
                yield f"{name}.{method}", inner


OTHERS_WARN = pytest.mark.filterwarnings("default")  # other libraries' warnings aren't ours to mend
NAMES = [pytest.param(n, marks=[OTHERS_WARN] if NEEDS & {*n.split(".")} else []) for n in PUBLIC]


@pytest.mark.parametrize("name", NAMES)
def test_a_summary_of_one_line_and_an_example_that_runs(name):
    doc = inspect.getdoc(PUBLIC[name]) or ""
    summary, _, _ = doc.partition("\n\n")
    one_line = summary.endswith(".") and "\n" not in summary
    assert one_line, f"{name} begins with one line, a sentence: {summary!r}"
    examples = doctest.DocTestParser().get_doctest(doc, {"torch": torch, "nn": nn, "rdp": rdp}, name, None, None)
    assert examples.examples, f"{name} has no example"
    torch.manual_seed(0)
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not runner.run(examples, out=said.append).failed, "".join(said)


@pytest.mark.parametrize(("name", "value"), callables(), ids=lambda value: value if isinstance(value, str) else "")
def test_sections_say_what_comes_in_and_out(name, value):
    parsed = docstring_parser.parse(inspect.getdoc(value) or "", style=docstring_parser.DocstringStyle.GOOGLE)
    assert parsed.short_description, f"{name} has no docstring"
    result = inspect.isclass(value) and (hasattr(value, "__dataclass_fields__") or issubclass(value, Exception))
    if result:  # users read it, they don't make one: its fields are described
        return
    parameters = [p for p in inspect.signature(value).parameters.values() if p.name not in ("self", "cls")]
    told = {param.arg_name.lstrip("*"): param.description for param in parsed.params}
    assert list(told) == [p.name for p in parameters], name
    assert all(told.values()), name
    for parameter in parameters:
        said = default_in(told[parameter.name])
        assert said in (None, repr(parameter.default).replace("'", '"')), f"{name}: {parameter}"
    for error in parsed.raises:
        assert hasattr(builtins, error.type_name) or error.type_name in rdp.__all__, f"{name}: {error.type_name}"
    if not inspect.isclass(value) and returns_something(value):
        assert parsed.returns or parsed.many_returns or parsed.yields, f"{name} doesn't say what it returns"


def default_in(description: str) -> str | None:
    """The default that a description gives, if it gives one."""
    found = re.search(r'Default: ([\w.]+)\.|`?([\w"]+)`? \(default\)|\b(\w+), the default', description)
    return next(filter(None, found.groups())) if found else None


def returns_something(function: object) -> bool:
    return inspect.signature(function).return_annotation not in (None, "None", inspect.Signature.empty)


CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_properties_are_described(name):
    """A field of a dataclass under `Attributes:` or `Args:`, or by a string below it."""
    cls = CLASSES[name]
    parsed = docstring_parser.parse(inspect.getdoc(cls) or "", style=docstring_parser.DocstringStyle.GOOGLE)
    told = {field.arg_name for field in (*parsed.params, *parsed.attrs) if field.description}
    if "__dataclass_fields__" in vars(cls):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
        for statement, below in itertools.pairwise(tree.body):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                told.add(statement.target.id)
        fields = [field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")]
        assert not [field for field in fields if field not in told]
    for member, value in vars(cls).items():
        if isinstance(value, property) and not member.startswith("_"):
            assert value.__doc__, f"{name}.{member} has no docstring"


def test_the_reference_has_every_public_name():
    pages = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md"))
    listed = re.findall(r"^\.\. auto\w+:: ([\w.]+)", pages, re.MULTILINE)
    missing = [name for name in PUBLIC if name.rpartition(".")[2] not in {entry.rpartition(".")[2] for entry in listed}]
    assert not missing


def test_the_summary_has_every_public_name():
    index = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    listed = Counter(entry.rpartition(".")[2] for entry in re.findall(r"^   ([\w.]+)$", index, re.MULTILINE))
    assert not Counter(name.rpartition(".")[2] for name in PUBLIC) - listed
