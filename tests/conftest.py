import pytest
import torch
from hypothesis import HealthCheck, settings

# Shared, noisy machines: no deadline; and the same examples in every run, so that a red test stays red.
settings.register_profile("default", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("default")

# The tensors are tiny: a second thread only waits, and on a busy machine for very long.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
