"""Every choice of the demo in one place, and the key under which trained weights are kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class ModelConfig:
    """The dense denoiser.

    Width 32 on purpose. At width 64, thirteen runs with several expert layouts and schedules ended between 0.3 %
    below and 0.7 % above the dense validation loss: 1437 images do not need more than the dense network there.
    """

    image_size: int = 8
    patch: int = 2
    in_channels: int = 1
    depth: int = 3
    width: int = 32
    heads: int = 4
    classes: int = 10
    mlp_ratio: float = 4.0
    label_dropout: float = 0.0  # the training loop drops labels, so that both models see the same drops


@dataclass(frozen=True)
class StageConfig:
    """One stage of training."""

    steps: int
    learning_rate: float
    warmup_steps: int
    batch: int = 128
    weight_decay: float = 0.01
    ema_decay: float = 0.995
    label_dropout: float = 0.1
    evaluate_every: int = 50


@dataclass(frozen=True)
class RoutingConfig:
    """What is asked of ``moefx.transform``: 8 copies of the dense network, 1 per token, so equal active width.

    Copies cut in two, 2 halves per token, cost as much and learn less (benchmarks/results/quality_upcycle_digits.md).
    """

    recipe: str = "sparse-upcycling"
    experts: int = 8
    top_k: int = 1
    balance_weight: float = 0.01


@dataclass(frozen=True)
class JudgeConfig:
    """How models are measured."""

    timestep_buckets: int = 8
    draws_per_bucket: int = 4
    samples_per_class: int = 100
    sampler_steps: int = 12
    guidance: float = 1.5
    neighbours: int = 5
    components: int = 24


@dataclass(frozen=True)
class Config:
    """The whole demo."""

    seed: int = 0
    validation_share: float = 0.2
    model: ModelConfig = ModelConfig()
    dense: StageConfig = StageConfig(steps=1500, learning_rate=4e-3, warmup_steps=100)
    finetune: StageConfig = StageConfig(steps=2000, learning_rate=3e-3, warmup_steps=200)
    routing: RoutingConfig = RoutingConfig()
    judge: JudgeConfig = JudgeConfig()

    def shortened(self, steps: int) -> Config:
        """Return the same demo with ``steps`` steps of each stage, measured with fewer samples and draws."""
        short = {"steps": steps, "evaluate_every": min(self.dense.evaluate_every, max(1, steps // 2))}
        return dataclasses.replace(
            self,
            dense=dataclasses.replace(self.dense, **short),
            finetune=dataclasses.replace(self.finetune, **short),
            judge=dataclasses.replace(
                self.judge,
                samples_per_class=min(self.judge.samples_per_class, 8 + steps),
                sampler_steps=min(self.judge.sampler_steps, 1 + steps),
                draws_per_bucket=1,
            ),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for the report."""
        return dataclasses.asdict(self)


def dense_key(config: Config) -> str:
    """Return a short hash of all that the dense weights depend on: choices, code of the training, torch version."""
    here = Path(__file__).parent
    sources = [here.parent / "dit.py", here / "data.py", here / "flow.py", here / "train.py"]
    choices = [config.seed, config.validation_share, dataclasses.asdict(config.model), dataclasses.asdict(config.dense)]
    digest = hashlib.sha256(json.dumps([torch.__version__, *choices], sort_keys=True).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
