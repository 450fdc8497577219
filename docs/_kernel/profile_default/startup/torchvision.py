"""timm and transformers import torchvision where they find it, also one that doesn't match torch's build."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[4]))
from examples.libraries import import_torchvision, installed

if installed("torchvision"):
    import_torchvision()
sys.path.pop()
