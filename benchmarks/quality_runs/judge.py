"""Judge a denoiser: loss by noise level, samples against real images, and time.

There are no Inception weights offline, so nothing here is an FID: the Fréchet distances are taken between Gaussians
fitted in the space of principal components of pixels, and in the hidden layer of a small classifier of pixels.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.neural_network import MLPClassifier
from torch import nn

from benchmarks.quality_runs.settings import Setting
from examples.digits_demo.data import Digits
from examples.digits_demo.flow import Batch, inputs, sample
from examples.digits_demo.judge import Array, bucket_errors, frechet, pixels

FEATURES = 48


class Judge:
    """The yardsticks of one data set and seed, fitted to its training images."""

    def __init__(self, setting: Setting, data: Digits, seed: int) -> None:
        self.setting, self.data, self.seed = setting, data, seed
        real, labels = pixels(data.train_x), data.train_y.numpy()
        self.components = PCA(setting.judge.components, random_state=0).fit(real)
        self.classifier = MLPClassifier((FEATURES,), max_iter=60, early_stopping=True, random_state=0).fit(real, labels)
        self.real_components, self.real_features = self.components.transform(real), self._features(real)

    def validation_share(self) -> float:
        """Return the classifier's accuracy on held-out real images: the ceiling of agreement."""
        return float(self.classifier.score(pixels(self.data.validation_x), self.data.validation_y.numpy()))

    def loss(self, model: nn.Module) -> list[float]:
        """Return the validation loss per bucket of time, on noise that is the same for every model."""
        errors = bucket_errors(model.eval(), self.data, self.setting.judge, self.seed + 2)
        return [float(value) for value in errors.mean(dim=1)]

    def samples(self, model: nn.Module) -> dict[str, float]:
        """Draw samples of every class and compare them with real images."""
        judge, classes = self.setting.judge, self.setting.model.classes
        labels = torch.arange(classes).repeat(judge.samples_per_class)
        images = sample(
            model.eval(),
            labels,
            classes,
            steps=judge.sampler_steps,
            guidance=judge.guidance,
            seed=self.seed + 4,
            shape=tuple(self.data.train_x.shape[1:]),
        )
        flat = pixels(images)
        return {
            "frechet_pca": frechet(self.components.transform(flat), self.real_components),
            "frechet_features": frechet(self._features(flat), self.real_features),
            "agreement": float((self.classifier.predict(flat) == labels.numpy()).mean()),
        }

    def time_ratio(self, model: nn.Module, reference: nn.Module, rounds: int = 9) -> dict[str, Any]:
        """Time one denoising step of both models on the same batch, in turns; medians in milliseconds."""
        x = self.data.validation_x[:128]
        batch = Batch(x, self.data.validation_y[:128], torch.full((len(x),), 0.5), torch.randn(x.shape))
        pair = {"model": model.eval(), "reference": reference.eval()}
        seconds: dict[str, list[float]] = {name: [] for name in pair}
        with torch.no_grad():
            for _ in range(rounds + 2):
                for name, each in pair.items():
                    started = time.perf_counter()
                    each(*inputs(batch))
                    seconds[name].append(time.perf_counter() - started)
        middle = {name: statistics.median(values[2:]) for name, values in seconds.items()}
        return {"ms_per_step": 1000 * middle["model"], "time_ratio": middle["model"] / middle["reference"]}

    def _features(self, flat: Array) -> Array:
        hidden: Array = np.maximum(flat @ self.classifier.coefs_[0] + self.classifier.intercepts_[0], 0)
        return hidden
