"""How `setup.py` builds: values of `RDP_BUILD`, builds where something is missing, and what an installation holds.
Every build works on a copy of the tree. Slow tests install into new environments that see this one's packages.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import rdp_kernels as rdp

from .versions import PIP, ROOT, new_environment

SMOKE = ROOT / "tests" / "smoke.py"
LIBRARY = "rdp_kernels/_C.abi3.so"
PURE = "rdp_kernels-0.1.0-py3-none-any.whl"
COMPILED = f"rdp_kernels-0.1.0-cp310-abi3-{sysconfig.get_platform().replace('-', '_')}.whl"
compiles = pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler")


@pytest.fixture
def tree(tmp_path):
    """The sources that the package is built from, with nothing built."""
    tree = tmp_path / "tree"
    for folder in ("csrc", "rdp_kernels"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    for file in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, tree)
    return tree


def run(*command, cwd, **environment):
    """Runs a command without this process' settings for builds; the result's `stdout` has both of its outputs."""
    ours = ("RDP_", "CUDA_", "MAX_JOBS", "NVCC_", "TORCH_CUDA_", "CXX", "CC", "PYTHONPATH")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | {name: str(value) for name, value in environment.items()},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def succeeds(*command, **options):
    result = run(*command, **options)
    assert result.returncode == 0, result.stdout
    return result.stdout


def fails(*command, **options):
    result = run(*command, **options)
    assert result.returncode != 0, result.stdout
    assert "Traceback" not in result.stdout
    return result.stdout


WHEEL = (sys.executable, "-W", "ignore", "setup.py", "--quiet", "bdist_wheel")
IN_PLACE = (sys.executable, "-W", "ignore", "setup.py", "--quiet", "build_ext", "--inplace")


def wheels(tree):
    return [path.name for path in (tree / "dist").glob("*")]


def told(output):
    """The lines that say what is left out of the build."""
    return [line for line in output.splitlines() if line.startswith("rdp_kernels: ")]


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_unknown_choice_is_named(tree):
    output = fails(*WHEEL, cwd=tree, RDP_BUILD="gpu")
    assert output.splitlines()[-1] == "RDP_BUILD must be auto, cpu, cuda or none, got 'gpu'"


def test_none_makes_a_pure_package(tree):
    assert told(succeeds(*WHEEL, cwd=tree, RDP_BUILD="none", CXX="/nonexistent")) == []
    assert wheels(tree) == [PURE]


@pytest.fixture
def no_torch(tmp_path):
    """A folder that hides the installed torch when it is on PYTHONPATH."""
    (tmp_path / "stub" / "torch").mkdir(parents=True)
    (tmp_path / "stub" / "torch" / "__init__.py").write_text("raise ImportError('hidden')")
    return tmp_path / "stub"


def test_without_torch_auto_makes_a_pure_package(tree, no_torch):
    (line,) = told(succeeds(*WHEEL, cwd=tree, PYTHONPATH=no_torch))
    assert "torch can't be imported" in line
    assert "--no-build-isolation" in line
    assert wheels(tree) == [PURE]


@pytest.mark.parametrize("choice", ["cpu", "cuda"])
def test_without_torch_a_choice_fails(tree, no_torch, choice):
    output = fails(*WHEEL, cwd=tree, PYTHONPATH=no_torch, RDP_BUILD=choice)
    assert output.startswith(f"RDP_BUILD={choice}: torch can't be imported here")


def test_without_a_toolkit_cuda_fails(tree):
    output = fails(*IN_PLACE, cwd=tree, RDP_BUILD="cuda", CUDA_HOME="/nonexistent")
    assert output.splitlines()[-1] == "RDP_BUILD=cuda: no CUDA toolkit at /nonexistent (CUDA_HOME says where)"


def no_compiler(tree):
    return {"CXX": "/nonexistent/compiler"}


def wrong_source(tree):
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text("#error wrong on purpose")
    return {}


ONE_QUICK = pytest.mark.parametrize(
    "broken", [no_compiler, pytest.param(wrong_source, marks=[compiles, pytest.mark.slow])]
)


@ONE_QUICK
def test_where_compiling_fails_auto_makes_a_pure_package(tree, broken):
    """Budget: 5 seconds with a wrong source."""
    lines = told(succeeds(*WHEEL, cwd=tree, CUDA_HOME="/nonexistent", **broken(tree)))
    assert "the compiler failed" in lines[-1]
    assert "without compiled kernels (RDP_BUILD=cpu shows why)" in lines[-1]
    assert all("without CUDA kernels" in line for line in lines[:-1])
    assert max(map(len, lines)) < 320
    assert wheels(tree) == [PURE]


@ONE_QUICK
def test_where_compiling_fails_a_choice_fails(tree, broken):
    """As above."""
    output = fails(*WHEEL, cwd=tree, RDP_BUILD="cpu", **broken(tree))
    assert output.splitlines()[-1].startswith("RDP_BUILD=cpu: the compiler failed (")
    assert broken is no_compiler or "wrong on purpose" in output
    assert wheels(tree) == []


def test_an_old_library_does_not_stay_where_compiling_fails(tree):
    (tree / LIBRARY).write_text("old")
    succeeds(*IN_PLACE, cwd=tree, **no_compiler(tree))
    assert not (tree / LIBRARY).exists()


@compiles
@pytest.mark.slow
def test_variables_that_builds_of_torch_extensions_know(tree, tmp_path):
    """With a ninja that only writes down its arguments, and a stub of a toolkit. Budget: 5 seconds."""
    noted = tmp_path / "noted"
    script(tmp_path / "bin" / "ninja", f'[ "$1" = --version ] || {{ echo "$@" > {noted}; exit 1; }}')
    nvcc = script(tmp_path / "toolkit" / "bin" / "nvcc", "echo a stub")
    (tree / "csrc" / "cuda").mkdir(exist_ok=True)
    (tree / "csrc" / "cuda" / "stub.cu").touch()
    fails(
        *IN_PLACE,
        cwd=tree,
        RDP_BUILD="cuda",
        PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        MAX_JOBS=3,
        NVCC_THREADS=5,
        TORCH_CUDA_ARCH_LIST="9.0",
        CUDA_HOME=tmp_path / "toolkit",
    )
    assert "-j 3" in noted.read_text()
    (plan,) = (tree / "build").rglob("build.ninja")
    commands = plan.read_text()
    assert f"nvcc = {nvcc}" in commands
    assert "--threads=5" in commands
    assert commands.count("-gencode=") == 1
    assert "arch=compute_90,code=sm_90" in commands


@pytest.mark.skipif(os.environ.get("RDP_BUILD") == "none", reason="nothing is to be compiled")
@compiles
def test_where_there_is_a_compiler_the_library_was_built():
    """A source that doesn't compile must not look like a machine without a compiler."""
    assert rdp.available_backends()["native"] is None


@pytest.mark.parametrize("content", [None, "not a library"])
def test_without_the_library_all_works_and_info_says_why(tree, content):
    if content is not None:
        (tree / LIBRARY).write_text(content)
    use = "import rdp_kernels as rdp, torch; x = torch.ones(2, 3); print(rdp.residual_add(x, x).sum().item())"
    assert succeeds(sys.executable, "-c", use, cwd=tree) == "12.0\n"
    lines = succeeds(sys.executable, "-m", "rdp_kernels.info", cwd=tree).splitlines()
    (line,) = (line for line in lines if line.startswith("native"))
    why = "it was not built" if content is None else f"can't be loaded by torch {torch.__version__}"
    assert why in line
    assert "RDP_BUILD=cpu pip install --no-build-isolation ." in line


@pytest.fixture
def environment(tmp_path):
    """The Python of a new environment, in which the packages of this one can be imported."""
    return new_environment(tmp_path / "environment", sysconfig.get_path("purelib"))


def loaded_from(python, **options):
    """The path that the package is imported from, if its library agrees with the eager reference."""
    where, line = succeeds(python, "-W", "ignore", SMOKE, **options).splitlines()
    assert "agrees with the eager reference" in line
    return Path(where)


INSTALL = ("install", "--quiet", "--no-deps", "--ignore-installed", "--no-build-isolation")


@pytest.mark.slow
@compiles
def test_source_distribution_and_its_wheel(tree, tmp_path, environment):
    """Budget: 2 minutes."""
    succeeds(sys.executable, "-W", "ignore", "setup.py", "--quiet", "sdist", cwd=tree)
    with tarfile.open(tree / "dist" / "rdp_kernels-0.1.0.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / "rdp_kernels-0.1.0"
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", unpacked / "dist", unpacked)
    succeeds(*PIP, *build, cwd=tmp_path, RDP_BUILD="cpu")
    assert wheels(unpacked) == [COMPILED]
    wheel = unpacked / "dist" / COMPILED
    assert [name for name in zipfile.ZipFile(wheel).namelist() if ".so" in name] == [LIBRARY]
    succeeds(*PIP, "--python", environment, *INSTALL, wheel, cwd=tmp_path)
    assert tmp_path / "environment" in loaded_from(environment, cwd=tmp_path).parents


@pytest.mark.slow
@compiles
def test_editable_installation(tree, tmp_path, environment):
    """Budget: 2 minutes."""
    succeeds(*PIP, "--python", environment, *INSTALL, "--editable", tree, cwd=tmp_path, RDP_BUILD="cpu")
    assert loaded_from(environment, cwd=tmp_path) == tree / "rdp_kernels"
    assert (tree / LIBRARY).exists()


@pytest.mark.slow
def test_isolated_builds_are_pure(tree, tmp_path):
    """Budget: 1 minute."""
    build = (*PIP, "wheel", "--no-deps", "--wheel-dir", tree / "dist", tree)
    assert "RDP_BUILD=cpu: torch can't be imported here" in run(*build, cwd=tmp_path, RDP_BUILD="cpu").stdout
    assert wheels(tree) == []
    succeeds(*build, cwd=tmp_path)
    assert wheels(tree) == [PURE]


@pytest.mark.slow
@compiles
def test_where_cuda_fails_auto_builds_for_cpus(tree, tmp_path):
    """Budget: 1 minute."""
    script(tmp_path / "toolkit" / "bin" / "nvcc", "exit 1")
    (tree / "csrc" / "cuda").mkdir(exist_ok=True)
    (tree / "csrc" / "cuda" / "stub.cu").touch()
    run_setup = (
        "import runpy, sys, torch; torch.version.cuda = '13.0'; "
        "sys.argv = ['setup.py', '--quiet', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    output = succeeds(
        sys.executable, "-W", "ignore", "-c", run_setup, cwd=tree, CUDA_HOME=tmp_path / "toolkit", RDP_BUILD="auto"
    )
    (line,) = told(output)
    assert "building for CUDA failed" in line
    assert "without CUDA kernels" in line
    assert loaded_from(sys.executable, cwd=tree, PYTHONPATH=tree) == tree / "rdp_kernels"
