"""Builds the package, and the compiled library of `csrc/` with it.

`RDP_BUILD` says what is compiled: `auto` (default) the CPU kernels, and CUDA's too where torch has CUDA and a toolkit is
found; it goes on without what can't be built, saying so in a line. `cpu` and `cuda` (both) fail instead. `none`: pure
Python. Torch must be importable: `pip install --no-build-isolation .`; an isolated build has no torch and makes a pure
package. Known to torch's own extensions, and so here: MAX_JOBS, NVCC_THREADS, TORCH_CUDA_ARCH_LIST, CUDA_HOME.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    from torch.utils import cpp_extension
except ImportError:
    cpp_extension = None

BUILD = os.environ.get("RDP_BUILD", "auto")
STABLE_ABI = "0x020a000000000000"  # LibTorch's, as of torch 2.10
PYTHON_ABI = "cp310"
ARCHITECTURES = "8.0;9.0;10.0+PTX"  # unless TORCH_CUDA_ARCH_LIST or a GPU says otherwise


def sources(kind, pattern):
    return sorted(str(path) for path in Path("csrc", kind).glob(pattern))


def degrade(reason, without):
    """Goes on without what was asked for by nobody in particular; else fails."""
    if BUILD != "auto":
        sys.exit(f"RDP_BUILD={BUILD}: {reason}")
    print(f"rdp_kernels: {reason}; building without {without}", file=sys.stderr)


def why_no_cuda():
    """Finds the toolkit. With `RDP_BUILD=cuda` that alone decides: torch on the building machine may be a CPU build."""
    import torch

    if BUILD == "auto" and torch.version.cuda is None:
        return "this torch has no CUDA"
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or (str(Path(nvcc).parent.parent) if nvcc else "/usr/local/cuda")
    if not Path(home, "bin", "nvcc").exists():
        return f"no CUDA toolkit at {home} (CUDA_HOME says where)"
    cpp_extension.CUDA_HOME = home
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ARCHITECTURES)
    return None


def extension():
    """The compiled library; it isn't a Python module, torch loads it."""
    flags = ["-O3", "-ffp-contract=off", "-fvisibility=hidden", f"-DTORCH_TARGET_VERSION={STABLE_ABI}"]
    options = dict(extra_compile_args={"cxx": flags}, extra_link_args=[])
    files = ["csrc/bindings.cpp", *sources("cpu", "*.cpp")]
    if BUILD != "cpu":
        reason = why_no_cuda()
        if reason is None:
            files += sources("cuda", "*.cu")
            options["define_macros"] = [("RDP_CUDA", None)]
            threads = os.environ.get("NVCC_THREADS")
            options["extra_compile_args"]["nvcc"] = [
                *("-O3", "-DUSE_CUDA", flags[-1], "-Xcompiler=-fvisibility=hidden"),
                *([f"--threads={threads}"] if threads else []),
            ]
            # torch's own CUDA library, which has the current stream, comes along with libtorch where there is one
            options["extra_link_args"] += ["-lcudart_static", "-Wl,--no-as-needed", "-ltorch"]
            options["library_dirs"] = [str(Path(cpp_extension.CUDA_HOME, "lib64"))]
        else:
            degrade(reason, "CUDA kernels")
    return cpp_extension.CppExtension("rdp_kernels._C", files, py_limited_api=True, **options)


def build():
    """The arguments of `setup` that have to do with compiling."""
    if BUILD not in ("auto", "cpu", "cuda", "none"):
        sys.exit(f"RDP_BUILD must be auto, cpu, cuda or none, got {BUILD!r}")
    if BUILD == "none":
        return {}
    if cpp_extension is None:
        degrade("torch can't be imported here (pip's --no-build-isolation lets it)", "compiled kernels")
        return {}

    class Build(cpp_extension.BuildExtension):
        def run(self):
            try:
                super().run()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                degrade(f"the compiler failed ({error})", "compiled kernels (RDP_BUILD=cpu shows why)")
                self.extensions = []

    return {
        "ext_modules": [extension()],
        "cmdclass": {"build_ext": Build},
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
            "hypothesis",
            "matplotlib",
            "mypy",
            "ninja",
            "numpy",
            "pytest",
            "pytest-benchmark",
            "pytest-xdist",
            "rich",
            "ruff",
            "scikit-learn",
            "scipy",
            "triton",
        ],
        "triton": ["triton"],
    },
    **build(),
)
