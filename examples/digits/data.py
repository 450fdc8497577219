"""scikit-learn's handwritten digits: 1,797 images of 8 × 8 pixels in ten classes, which come with the library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor

from examples.digits.seeds import seed_of

BATCH_SIZE = 64


@dataclass(frozen=True)
class Digits:
    """Returns images `[N, 1, 8, 8]` in [−1, 1] and labels `[N]`."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @classmethod
    def load(cls, device: torch.device, validate: bool = False) -> Digits:
        """Splits off a quarter as the test set. With `validate` that quarter is left out, and the test set is a quarter
        of the remaining images."""
        pixels, labels = load_digits(return_X_y=True)
        images = (pixels.reshape(-1, 1, 8, 8) / 8 - 1).astype("float32")
        for _ in range(1 + validate):
            parts = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
            images, _, labels, _ = parts
        train_images, test_images, train_labels, test_labels = (torch.from_numpy(part).to(device) for part in parts)
        return cls(train_images, train_labels, test_images, test_labels)

    @property
    def batches_per_epoch(self) -> int:
        return len(self.train_images) // BATCH_SIZE

    def batch(self, seed: int, number: int) -> tuple[Tensor, Tensor]:
        """Returns batch `number` = 0, 1, ... of the endless shuffled sequence of `seed`. It is a pure function, so that
        runs are easy to resume."""
        epoch, place = divmod(number, self.batches_per_epoch)
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order = torch.randperm(len(self.train_images), generator=generator)
        rows = order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE].to(self.train_images.device)
        return self.train_images[rows], self.train_labels[rows]


def crops(images: Tensor, count: int, side: int, area: tuple[float, float], generator: torch.Generator) -> Tensor:
    """Returns shifted, scaled, turned and faded parts of `images`, `[count · B, 1, side, side]`, one of each image at a
    time. `area` is the range of their share of an image's area."""
    images = images.repeat(count, 1, 1, 1)
    size, angle, right, down, fade, light = torch.rand(6, len(images), generator=generator)
    zoom = (area[0] + (area[1] - area[0]) * size).sqrt()
    cos, sin = zoom * (0.4 * angle - 0.2).cos(), zoom * (0.4 * angle - 0.2).sin()
    right, down = (1 - zoom) * (2 * right - 1), (1 - zoom) * (2 * down - 1)
    matrix = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, [len(images), 1, side, side], align_corners=False)
    faded = images * (1 - 0.3 * fade).view(-1, 1, 1, 1) + 0.3 * (light - 0.5).view(-1, 1, 1, 1)
    return F.grid_sample(faded, grid, padding_mode="border", align_corners=False)
