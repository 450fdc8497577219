from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.compiled_code import CUDA, CudaCode, compile_launch, read_cuda_code
from rdp_kernels.kernels.triton.prepared import Launch
from tests.conftest import INTERPRETED

if INTERPRETED:
    raise pytest.UsageError("tests/compiled compiles kernels: run it with TRITON_INTERPRET=0 in the environment")

Read = Callable[..., list[CudaCode]]


@pytest.fixture(scope="module")
def read(tmp_path_factory) -> Read:
    """Compiles launches for a CUDA architecture and reads each code once. The disassembler takes as long as the
    compiler, so that it runs on all codes of a call at the same time. `cached` is `read_cuda_code`'s."""
    folder = tmp_path_factory.mktemp("code")
    codes: dict[tuple[str, frozenset[str]], CudaCode] = {}

    def read(launches: list[Launch], architecture: str, cached: Collection[str] = ()) -> list[CudaCode]:
        compiled = [compile_launch(launch, CUDA[architecture]) for launch in launches]
        new = {(kernel.hash, frozenset(cached)): kernel for kernel in compiled}
        new = {key: kernel for key, kernel in new.items() if key not in codes}
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda kernel: read_cuda_code(kernel, folder, cached), new.values())
            codes.update(zip(new, found, strict=True))
        return [codes[kernel.hash, frozenset(cached)] for kernel in compiled]

    return read


@pytest.fixture(scope="module", autouse=True)
def _new_cache(tmp_path_factory):
    """An empty cache, so that Triton compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield
