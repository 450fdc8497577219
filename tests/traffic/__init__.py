"""What the interpreted Triton kernels load and store, counted by `benchmarks/kernel_traffic.py`."""

import pytest

from tests.conftest import INTERPRETED

needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="counts what Triton's interpreter does; this has a GPU")
