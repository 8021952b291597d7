"""Measure a denoiser: validation loss over time, and samples against real digits.

There are no Inception weights offline, so this is not FID: the Fréchet distance is taken in the space of the first
principal components of real training pixels, and class agreement is that of a nearest-neighbour classifier.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor, nn

from examples.digits_demo.config import JudgeConfig
from examples.digits_demo.data import Digits
from examples.digits_demo.flow import Batch, velocity_errors

Array = NDArray[np.float64]


@torch.no_grad()
def bucket_errors(model: nn.Module, data: Digits, judge: JudgeConfig, seed: int) -> Tensor:
    """Return velocity errors [bucket, image], averaged over the draws; the same noise for every model."""
    generator = torch.Generator().manual_seed(seed)
    count = len(data.validation_x)
    rows = []
    for bucket in range(judge.timestep_buckets):
        total = torch.zeros(count)
        for _ in range(judge.draws_per_bucket):
            t = (bucket + torch.rand(count, generator=generator)) / judge.timestep_buckets
            noise = torch.randn(data.validation_x.shape, generator=generator)
            total += velocity_errors(model, Batch(data.validation_x, data.validation_y, t, noise))
        rows.append(total / judge.draws_per_bucket)
    return torch.stack(rows)


def paired_difference(errors: Tensor, reference: Tensor) -> dict[str, float]:
    """Return the mean of errors - reference over images, with its standard error; both [bucket, image]."""
    per_image = (errors - reference).mean(dim=0).double()
    spread = per_image.std().item() / math.sqrt(len(per_image))
    return {
        "mean": per_image.mean().item(),
        "standard_error": spread,
        "relative": (per_image.mean() / reference.mean()).item(),
    }


def frechet(a: Array, b: Array) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two point sets [N, components]."""
    covariance_a, covariance_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = np.sqrt(np.linalg.eigvals(covariance_a @ covariance_b).real.clip(min=0)).sum()
    gap = np.square(a.mean(0) - b.mean(0)).sum()
    return float(gap + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share."""
    z = 1.959964
    centre = (hits + z * z / 2) / (count + z * z)
    half = z / (count + z * z) * math.sqrt(hits * (count - hits) / count + z * z / 4)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass
class Judge:
    """Real digits as a yardstick: principal components and a classifier, both fitted to training images."""

    data: Digits
    config: JudgeConfig

    def __post_init__(self) -> None:
        real = pixels(self.data.train_x)
        self.components = PCA(self.config.components, random_state=0).fit(real)
        self.classifier = KNeighborsClassifier(self.config.neighbours).fit(real, self.data.train_y.numpy())
        self.real: Array = self.components.transform(real)

    def score(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Return Fréchet distance to the training images and agreement with the asked labels."""
        flat = pixels(images)
        hits = int((self.classifier.predict(flat) == labels.numpy()).sum())
        return {
            "samples": len(labels),
            "pca_frechet_distance": frechet(self.components.transform(flat), self.real),
            "knn_agreement": hits,
            "knn_share": hits / len(labels),
            "knn_share_95": wilson(hits, len(labels)),
        }

    def yardsticks(self) -> dict[str, Any]:
        """Score held-out real digits and pure noise: the best and the worst that scores can mean."""
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1000, 1, 8, 8, generator=generator).clamp(-1, 1)
        return {
            "real_validation": self.score(self.data.validation_x, self.data.validation_y),
            "noise": self.score(noise, torch.arange(1000) % 10),
        }


def pixels(images: Tensor) -> Array:
    """Flatten images to rows of pixels."""
    return images.flatten(1).double().numpy()
