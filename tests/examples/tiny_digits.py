"""The digits example with tiny networks, in this process or as a command: `python -m tests.examples.tiny_digits
...`."""

import sys

from examples import train_digits
from examples.digits import analysis, experiment, training
from examples.models import ResidualMLP, ResNet, ViT

TINY = {
    "vit": training.Network(ViT, {"dim": 16, "depth": 2, "heads": 2}, 5e-3),
    "resnet": training.Network(ResNet, {"widths": (4, 8), "blocks": 2}, 5e-3),
    "mlp": training.Network(ResidualMLP, {"dim": 16, "depth": 4}, 5e-3),
}


def shrink(replace=setattr) -> None:
    """Shrinks the networks and the work around their training; `replace` is `setattr` or a monkeypatch's."""
    replace(training, "NETWORKS", TINY)
    replace(experiment, "COUNTED_STEPS", 10)
    replace(analysis, "REMOVALS", 3)


if __name__ == "__main__":
    shrink()
    sys.exit(train_digits.main())
