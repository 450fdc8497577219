"""Builds the package, and the compiled library of `csrc/` with it.

`RDP_BUILD` says which kernels are compiled. `auto` (default) builds the CPU kernels, and the CUDA kernels if torch has
CUDA and a toolkit is found. If a part can't be built, it prints a line and continues without it. `cpu` and `cuda`
(both) fail instead. `none` makes a pure Python package. Torch must be importable: `pip install --no-build-isolation .`.
An isolated build has no torch and makes a pure package. As in torch's own extensions, these variables are used:
MAX_JOBS, NVCC_THREADS, TORCH_CUDA_ARCH_LIST, CUDA_HOME.
"""

import os
import shutil
import sys
import textwrap
from pathlib import Path

import setuptools
from setuptools import find_packages, setup

if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit(f"rdp_kernels needs setuptools 77 or later, not {setuptools.__version__}: pip install 'setuptools>=77'")

try:
    from torch.utils import cpp_extension
except (ImportError, OSError):  # no torch, or one with missing libraries
    cpp_extension = None

BUILD = os.environ.get("RDP_BUILD") or "auto"
STABLE_ABI = "0x020a000000000000"  # the stable ABI of torch 2.10
PYTHON_ABI = "cp310"
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # the default without TORCH_CUDA_ARCH_LIST and GPU


def sources(kind, pattern):
    return sorted(str(path) for path in Path("csrc", kind).glob(pattern))


def degrade(reason, without):
    """Continues without a part if RDP_BUILD is `auto`, else exits."""
    if BUILD != "auto":
        sys.exit(f"RDP_BUILD={BUILD}: {reason}")
    print(f"rdp_kernels: {reason}; building without {without}", file=sys.stderr)


def why_no_cuda():
    """Returns why CUDA kernels can't be built, or None. With `RDP_BUILD=cuda` only the toolkit is needed, as the torch
    of the building machine may be a CPU build."""
    import torch

    if BUILD == "auto" and torch.version.cuda is None:
        return "this torch has no CUDA"
    home = os.environ.get("CUDA_HOME") or toolkit()
    if not Path(home, "bin", "nvcc").exists():
        return f"no CUDA toolkit at {home} (CUDA_HOME says where)"
    cpp_extension.CUDA_HOME = home
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    return None


def toolkit():
    """Returns the folder of the toolkit whose `nvcc` is on PATH. If this `nvcc` is a wrapper script, returns the
    default."""
    nvcc = shutil.which("nvcc")
    home = Path(nvcc).resolve().parent.parent if nvcc else None
    return str(home) if home and (home / "include" / "cuda_runtime.h").exists() else "/usr/local/cuda"


def extension(cuda):
    """Returns the compiled library. It isn't a Python module: torch loads it."""
    flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    options = dict(extra_compile_args={"cxx": flags})
    files = ["csrc/bindings.cpp", *sources("cpu", "*.cpp")]
    if cuda:
        files += sources("cuda", "*.cu")
        options["define_macros"] = [("RDP_CUDA", None)]
        threads = os.environ.get("NVCC_THREADS")
        options["extra_compile_args"]["nvcc"] = [
            *("-O3", "-DUSE_CUDA", flags[-1], "-Xcompiler=-fvisibility=hidden"),
            *([f"--threads={threads}"] if threads else []),
        ]
        # libtorch brings torch's own CUDA library, which has the current CUDA stream, if there is one
        options["extra_link_args"] = ["-lcudart_static", "-Wl,--no-as-needed", "-ltorch"]
        options["library_dirs"] = [str(Path(cpp_extension.CUDA_HOME, folder)) for folder in ("lib64", "lib")]
    return cpp_extension.CppExtension("rdp_kernels._C", files, py_limited_api=True, **options)


def build_command(cuda):
    """Returns a `build_ext` that degrades in steps: first without CUDA, then to a pure package."""

    class Build(cpp_extension.BuildExtension):
        with_cuda = cuda

        def run(self):
            self.built_into = {self.build_lib, "." if self.inplace else self.build_lib}
            super().run()

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                said = textwrap.shorten(str(error).replace("\\n", " "), 200, placeholder=" ...")
                if self.with_cuda:
                    degrade(f"building for CUDA failed ({said})", "CUDA kernels (RDP_BUILD=cuda shows why)")
                    self.with_cuda = False
                    vars(self.extensions[0]).update(vars(extension(cuda=False)))
                    self.build_extensions()
                else:
                    degrade(f"the compiler failed ({said})", "compiled kernels (RDP_BUILD=cpu shows why)")
                    self.extensions = self.distribution.ext_modules = []
                    for root in self.built_into:
                        Path(root, "rdp_kernels", "_C.abi3.so").unlink(missing_ok=True)  # from an earlier build
                    wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
                    if wheel is not None:
                        wheel.root_is_pure = True  # the name of the wheel must not say that it has a library

    return Build


def build():
    """Returns the arguments of `setup` for compiling."""
    if BUILD not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"RDP_BUILD must be auto, cpu, cuda or none, got {BUILD!r}")
    if BUILD == "none":
        return {}
    if cpp_extension is None:
        degrade("torch can't be imported here (pip's --no-build-isolation lets it)", "compiled kernels")
        return {}
    cuda = BUILD != "cpu"
    if cuda:
        reason = why_no_cuda()
        if reason is not None:
            degrade(reason, "CUDA kernels")
            cuda = False
    # ninja's folder, if it was installed for a Python whose environment isn't active.
    os.environ["PATH"] += os.pathsep + str(Path(sys.executable).parent)
    return {
        "ext_modules": [extension(cuda)],
        "cmdclass": {"build_ext": build_command(cuda)},
        "options": {"bdist_wheel": {"py_limited_api": PYTHON_ABI}},
    }


setup(
    name="rdp_kernels",
    version="0.1.0",
    description="Cheap stochastic depth and the two-iteration ResidualDroppath scheme for PyTorch",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["rdp_kernels", "rdp_kernels.*"]),
    package_data={"rdp_kernels": ["py.typed"]},
    install_requires=["torch>=2.10"],
    extras_require={
        "demo": ["matplotlib", "rich", "scikit-learn", "scipy"],
        "dev": [
            "accelerate",
            "hypothesis",
            "lightning",
            "matplotlib",
            "mypy",
            "myst-nb",
            "ninja",
            "numpy",
            "pydata-sphinx-theme",
            "pydoclint",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "rich",
            "ruff",
            "scikit-learn",
            "scipy",
            "sphinx",
            "sphinx-copybutton",
            "transformers",
            "triton",
        ],
        "triton": ["triton"],
    },
    **build(),
)
