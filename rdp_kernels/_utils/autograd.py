"""What autograd is doing at the moment."""

import torch

NO_BACKWARD = -1
"""What `torch._C._current_graph_task_id()` returns outside of a backward."""


def in_backward() -> bool:
    """Whether autograd is running a backward. A forward inside of one is checkpointing's recomputation."""
    return torch._C._current_graph_task_id() != NO_BACKWARD
