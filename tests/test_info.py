import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rdp_kernels as rdp
from rdp_kernels.info import describe
from rdp_kernels.kernels.native.library import has_cuda


def test_describe():
    text = describe()
    assert f"rdp_kernels  {rdp.__version__}, imported from {Path(rdp.__file__).parent}\n" in text
    assert torch.__version__ in text
    for name, reason in rdp.available_backends().items():
        assert any(line.startswith(name) and (reason or "available") in line for line in text.splitlines())
    assert ("native       available, for CPUs and CUDA" in text) == has_cuda()


def test_command_and_import_cost_nothing():
    """Importing queries no GPU and imports no triton; the command prints the report."""
    script = (
        "import sys, torch, rdp_kernels; assert 'triton' not in sys.modules; assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
    shown = subprocess.run([sys.executable, "-m", "rdp_kernels.info"], check=True, capture_output=True, text=True)
    assert "eager        available" in shown.stdout


@pytest.fixture
def checkout(tmp_path):
    """A tree in which nothing was built."""
    ignored = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(Path(rdp.__file__).parent, tmp_path / "checkout" / "rdp_kernels", ignore=ignored)
    return tmp_path / "checkout"


def shown_in(folder, *installed):
    """What the command prints in `folder`, where copies are installed in `installed`."""
    path = os.pathsep.join(map(str, installed))
    done = subprocess.run(
        [sys.executable, "-m", "rdp_kernels.info"], cwd=folder, env=os.environ | {"PYTHONPATH": path}, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout


def test_in_a_checkout_it_tells_of_an_installed_library(checkout, tmp_path):
    """Neither is imported: the installed one isn't even valid Python."""
    copies = [tmp_path / name / "rdp_kernels" for name in ("bare", "built")]
    for copied in copies:
        copied.mkdir(parents=True)
        (copied / "__init__.py").write_text("1 / 0")
    (copies[1] / "_C.abi3.so").touch()
    shown = shown_in(checkout, *(copied.parent for copied in copies))
    assert f"imported from {checkout / 'rdp_kernels'}\n" in shown
    (line,) = [line for line in shown.splitlines() if line.startswith("native")]
    assert f"not built; the copy installed in {copies[1]} has it, but {checkout / 'rdp_kernels'} was imported" in line
    assert "run from another folder, or build it here with a C++ compiler: RDP_BUILD=cpu" in line


def test_in_a_checkout_alone_it_tells_how_to_build(checkout, tmp_path):
    (tmp_path / "link").symlink_to(checkout)
    for installed in ((), (checkout,), (tmp_path / "link",), (tmp_path / "missing",)):
        shown = shown_in(checkout, *installed)
        assert "missing: it was not built; " in shown
        assert "with a C++ compiler: RDP_BUILD=cpu" in shown


def test_in_a_checkout_it_tells_of_an_editable_install(checkout, tmp_path):
    """Its folder needn't be on `sys.path`."""
    package, metadata = tmp_path / "tree" / "rdp_kernels", tmp_path / "site" / "rdp_kernels-0.1.0.dist-info"
    package.mkdir(parents=True)
    (package / "_C.abi3.so").touch()
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Name: rdp_kernels\nVersion: 0.1.0\n")
    url = {"dir_info": {"editable": True}, "url": package.parent.as_uri()}
    (metadata / "direct_url.json").write_text(json.dumps(url))
    assert f"the copy installed in {package} has it" in shown_in(checkout, metadata.parent)
