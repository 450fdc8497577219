import pytest

from tests.conftest import INTERPRETED

if INTERPRETED:
    raise pytest.UsageError("tests/compiled compiles kernels: run it with TRITON_INTERPRET=0 in the environment")
