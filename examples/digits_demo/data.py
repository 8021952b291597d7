"""The digits data set and its split."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor


@dataclass(frozen=True)
class Digits:
    """Images [N, 1, 8, 8] in [-1, 1] and labels [N], for training and for validation."""

    train_x: Tensor
    train_y: Tensor
    validation_x: Tensor
    validation_y: Tensor


def load(validation_share: float, seed: int) -> Digits:
    """Load scikit-learn's 1797 digits, split within each class."""
    data = load_digits()
    images = (data.images.astype(np.float32) / 8 - 1)[:, None]
    parts = train_test_split(images, data.target, test_size=validation_share, stratify=data.target, random_state=seed)
    train_x, validation_x, train_y, validation_y = (torch.from_numpy(part) for part in parts)
    return Digits(train_x, train_y.long(), validation_x, validation_y.long())
