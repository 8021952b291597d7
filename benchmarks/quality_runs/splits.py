"""Splits of the trained dense model: fewer active neurons, before and after a short distillation."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import moefx
from benchmarks.quality_runs.conditions import Build, Condition, Start, Train, dense
from benchmarks.quality_runs.settings import Setting
from examples.digits_demo.config import StageConfig
from examples.digits_demo.data import Digits
from examples.digits_demo.flow import Batch, inputs
from examples.digits_demo.train import draw
from moefx.training.distil import distil

CALIBRATION_BATCHES = 12
TOKENS = 4096
RATE = 4e-3


def batches(setting: Setting, data: Digits, seed: int) -> Iterator[Batch]:
    """Draw training batches for ever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield draw(data, setting.extra, setting.model.classes, generator)


def task(output: Tensor, batch: Batch) -> Tensor:
    """Return the velocity error."""
    return (output - (batch.noise - batch.x)).square().mean()


def calibration(setting: Setting, start: Start) -> moefx.Calibration:
    """Measure the dense model on training images at evenly spread noise levels; some labels are dropped."""
    levels = torch.Generator().manual_seed(start.seed + 8)
    drawn = itertools.islice(batches(setting, start.data, start.seed + 7), CALIBRATION_BATCHES)
    spread = [Batch(b.x, b.y, torch.rand(len(b.t), generator=levels), b.noise) for b in drawn]
    return moefx.calibrate(start.dense, spread, inputs=inputs, loss=task, samples=TOKENS, progress=False)


def split(setting: Setting, recipe: str, **options: Any) -> Build:
    """Return a builder that calibrates and splits."""

    def build(start: Start) -> nn.Module:
        return start.transformed(recipe, calibration=calibration(setting, start), **options)

    return build


def random_slices(setting: Setting, active: int, slices: int = 32) -> Build:
    """Return a builder of random slices behind a random router: what any method has to beat."""

    def build(start: Start) -> nn.Module:
        return start.transformed(
            "moefication",
            calibration=calibration(setting, start),
            experts=slices,
            top_k=active,
            partition="random",
            router="normal",
            max_error=10.0,
        )

    return build


def trained(setting: Setting) -> Train:
    """Return the distillation: outputs and block features of the dense model, and the task."""

    def train(model: nn.Module, start: Start, stage: StageConfig) -> float:
        started = time.perf_counter()
        distil(
            model,
            start.dense,
            batches(setting, start.data, start.seed + 1),
            steps=stage.steps,
            rate=RATE,
            inputs=inputs,
            task=task,
            features=[f"blocks.{i}" for i in range(setting.model.depth)],
        )
        return time.perf_counter() - started

    return train


def table(setting: Setting) -> list[Condition]:
    """Splits with 75, 50 and 25 % of the neurons active, before and after distillation for a fifth of the steps."""
    ours = {"moefx-split, 75 % active": (24, 8, 16), "moefx-split, 50 % active": (24, 8, 8)}
    ours["moefx-split, 25 % active"] = (28, 4, 4)
    made = [(name, split(setting, "moefx-split", experts=e, shared=s, top_k=k)) for name, (e, s, k) in ours.items()]
    made += [
        ("random slices, 50 % active", random_slices(setting, 16)),
        ("d2dmoe, 50 % active", split(setting, "d2dmoe", experts=32, top_k=16, router_hidden=16)),
        ("cmoe, 50 % active", split(setting, "cmoe", experts=24, shared=8, top_k=8)),
        ("moefication, 50 % active", split(setting, "moefication", experts=32, top_k=16)),
        ("read-me, 50 % active", split(setting, "read-me")),
    ]
    train = trained(setting)
    return [
        Condition("dense, not trained further", dense, steps=0),
        Condition("dense, distilled further", dense, steps=setting.fifth, train=train),
        *(Condition(name, build, steps=setting.fifth, train=train) for name, build in made),
    ]
