"""The package on another torch: a new environment in a temporary folder, the library built there, and the quick tests
of what a version can break.

    python -m tests.versions 2.11.0 --triton 3.6.0    # 5 GB; 3 to 9 minutes on 2 cores
    python -m tests.versions 2.10.0 --smoke           # the compiled library alone, against the eager reference

Exits with 0 if everything passed. With `--minutes` it also exits with 0 if time ran out or the versions can't be
installed; the last line says what was left out. It leaves no files and processes behind.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
LIBRARY = Path("rdp_kernels", "_C.abi3.so")
SMOKE = Path("tests", "smoke.py")
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
INSTALL = ("install", "-qq", "--no-compile", "--no-cache-dir", "--only-binary", ":all:")
TOOLS = ("hypothesis", "pytest", "pytest-xdist", "rich", "scipy")
TESTS = (
    "tests/test_registered.py",
    "tests/test_native.py",
    "tests/test_ops.py",
    "tests/test_triton_support.py",
    "tests/test_sequence.py",
    "tests/test_exactness.py",
    "tests/benchmarks/test_launches.py",
    "tests/benchmarks/test_memory.py",
    "tests/integrations/test_compile.py",
    "tests/integrations/test_compile_whole.py",
    "tests/kernels",
)
LEFT_OUT = ("broken_device", "fixed", "kept_features", "nan", "wrong_calls")
"""What is left out of `tests/kernels`, for time: another version is least likely to break it."""
GIGABYTES = 12
"""Room on disk; 2 GB stay free while a torch with its CUDA libraries is unpacked."""


class Unavailable(Exception):
    """The versions can't be installed here."""


def new_environment(folder: Path, *paths: object, python: str = sys.executable) -> Path:
    """The Python of a new environment without packages, in which those in `paths` can be imported."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("".join(f"{path}\n" for path in paths))
    return folder / "bin" / "python"


class Steps:
    """Commands with a common time limit. The processes that they start end with them."""

    def __init__(self, seconds: float | None):
        self.end = None if seconds is None else time.monotonic() + seconds
        self.name = ""

    def run(self, name: str, *command: object, **options: object) -> None:
        self.name = name
        started = time.monotonic()
        process = subprocess.Popen([str(part) for part in command], start_new_session=True, **options)  # type: ignore[call-overload]
        try:
            code = process.wait(None if self.end is None else max(self.end - started, 0))
        finally:
            with contextlib.suppress(ProcessLookupError):  # a group is alive while any of its processes is
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if code != 0:
            raise subprocess.CalledProcessError(code, command)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)


def environment_of_tests() -> dict[str, str]:
    """This process's environment without variables for builds and backends."""
    ours = ("RDP_", "CUDA_", "TORCH_CUDA_", "PYTHONPATH", "TRITON_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    examples = os.environ.get("RDP_EXAMPLES", "1")
    return kept | {"RDP_EXAMPLES": examples, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::DeprecationWarning"}


def what_to_build(python: Path) -> str:
    """CUDA kernels too where nvcc is of torch's CUDA version, or torch has none: only then is a failed build of them an
    error."""
    if shutil.which("nvcc") is None:
        return "cpu"
    ask = "import torch; print(torch.version.cuda or '')"
    wanted = subprocess.run([python, "-W", "ignore", "-c", ask], check=True, capture_output=True, text=True).stdout
    told = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)", told)
    return "cuda" if found and wanted.strip().partition(".")[0] in ("", found[1]) else "cpu"


def requirements(torch: str, triton: str | None, smoke: bool) -> list[str]:
    """Triton's interpreter before 3.7 fails with numpy 2.4."""
    wanted = [f"torch=={torch}", *([f"triton=={triton}"] if triton else []), "ninja", "setuptools"]
    old = triton is not None and tuple(map(int, triton.split(".")[:2])) < (3, 7)
    return wanted if smoke else [*wanted, *TOOLS, "numpy<2.4" if old else "numpy"]


def check(args: argparse.Namespace, folder: Path, steps: Steps) -> None:
    """Raises `Unavailable`, `subprocess.CalledProcessError` or `subprocess.TimeoutExpired`."""
    if shutil.disk_usage(folder).free < GIGABYTES * 1e9:
        raise Unavailable(f"{folder} has no {GIGABYTES} GB of room (TMPDIR says where else)")
    tree = folder / "tree"
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "report", "*.egg-info", "__pycache__", LIBRARY.name)
    shutil.copytree(ROOT, tree, ignore=unwanted)
    python = new_environment(folder / "environment", python=args.python)
    versions = re.compile(r"(torch|torchvision|triton|numpy)==")
    pinned = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not versions.match(line)]
    (folder / "constraints.txt").write_text("\n".join(pinned))
    wanted = requirements(args.torch, args.triton, args.smoke)
    try:
        constraints = ("-c", folder / "constraints.txt")
        steps.run(f"installed {', '.join(wanted)}", *PIP, "--python", python, *INSTALL, *constraints, *wanted)
    except subprocess.CalledProcessError as error:
        raise Unavailable("they can't be installed") from error
    environment = environment_of_tests() | {"PYTHONPATH": str(tree)}
    smoke = (python, "-W", "ignore", SMOKE)
    if (ROOT / LIBRARY).exists():
        shutil.copy(ROOT / LIBRARY, tree / LIBRARY)
        steps.run("the library that was built for this torch", *smoke, cwd=tree, env=environment)
        (tree / LIBRARY).unlink()
    build = {"RDP_BUILD": what_to_build(python), "TORCH_CUDA_ARCH_LIST": "9.0"}
    log = folder / "build.log"
    with log.open("w") as output:
        command = (python, "-W", "ignore", "setup.py", "--quiet", "build_ext", "--inplace")
        try:
            steps.run(
                f"built with RDP_BUILD={build['RDP_BUILD']}", *command,
                cwd=tree, env=environment | build, stdout=output, stderr=output,
            )  # fmt: skip
        except subprocess.CalledProcessError:
            print(log.read_text())
            raise
    steps.run("the library that was built there", *smoke, cwd=tree, env=environment)
    if not args.smoke:
        ignored = [f"--ignore=tests/kernels/test_{name}.py" for name in LEFT_OUT]
        options = ("-n", "2", "--dist", "worksteal", "-m", "not slow", *(["-x"] if args.minutes else []))
        steps.run("tests", python, "-m", "pytest", *options, *TESTS, *ignored, cwd=tree, env=environment)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torch", help="its version, such as 2.11.0")
    parser.add_argument("--triton", metavar="VERSION", help="default: what that torch brings, if any")
    parser.add_argument("--python", metavar="PATH", help="default: this one", default=sys.executable)
    parser.add_argument("--smoke", help="only the compiled library", action="store_true")
    parser.add_argument("--minutes", metavar="N", help="after which it is left out", type=float)
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that cleanup runs
    what = f"torch {args.torch}" + (f" with triton {args.triton}" if args.triton else "")
    started = time.monotonic()
    steps = Steps(None if args.minutes is None else 60 * args.minutes)
    with tempfile.TemporaryDirectory(prefix="rdp-versions-") as folder:
        try:
            check(args, Path(folder), steps)
        except subprocess.CalledProcessError as error:
            print(f"{what}: FAILED, {steps.name} ended with {error.returncode}")
            return 1
        except (Unavailable, subprocess.TimeoutExpired) as error:
            late = isinstance(error, subprocess.TimeoutExpired)
            reason = f"{args.minutes:g} minutes were not enough ({steps.name})" if late else str(error)
            print(f"{what}: LEFT OUT, {reason}")
            return 0 if args.minutes else 1
    print(f"{what}: all was well, in {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
