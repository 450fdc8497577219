"""What autograd is doing at the moment."""

import torch


def in_backward() -> bool:
    """Whether autograd is running a backward: a forward in there is checkpointing's recomputation."""
    return torch._C._current_graph_task_id() != -1
