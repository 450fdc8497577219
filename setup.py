from pathlib import Path

from setuptools import find_packages, setup

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
)
