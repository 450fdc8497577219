"""timm and transformers import torchvision where they find it, also one that doesn't match torch's build.

This file isn't named torchvision.py because IPython puts its folder first on the path while it runs.
"""

import sys
import warnings
from pathlib import Path

sys.path.append(str(Path(__file__).parents[4]))
from examples.libraries import import_torchvision, installed

if installed("torchvision"):
    import_torchvision()
sys.path.pop()
warnings.filterwarnings("ignore", message="IProgress not found")  # tqdm's, about progress bars that no page has
