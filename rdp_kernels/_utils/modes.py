"""A context in which a model is in eval mode."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Puts `model` into eval mode within; afterwards every module has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
