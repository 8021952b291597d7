"""Rectified flow (Liu et al., arXiv:2209.03003): a straight path from data to noise, and its velocity.

x_t = (1 - t) x + t noise, for t in [0, 1]; the model predicts the velocity noise - x.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

TIMESTEP_SCALE = 1000.0  # the model's timestep embedder expects 0..1000


@dataclass(frozen=True)
class Batch:
    """Images, labels, times in [0, 1] and noise: all that one loss depends on besides the model."""

    x: Tensor
    y: Tensor
    t: Tensor
    noise: Tensor


def inputs(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the model's positional inputs for a batch: noisy images, scaled times, labels."""
    t = batch.t.view(-1, 1, 1, 1)
    return (1 - t) * batch.x + t * batch.noise, batch.t * TIMESTEP_SCALE, batch.y


def velocity_errors(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared velocity error of each image [B]."""
    target = batch.noise - batch.x
    errors: Tensor = (model(*inputs(batch)) - target).square().flatten(1).mean(dim=1)
    return errors


def logit_normal(count: int, generator: torch.Generator) -> Tensor:
    """Draw times that favour the middle of the path (Esser et al., arXiv:2403.03206)."""
    return torch.randn(count, generator=generator).sigmoid()


@torch.no_grad()
def sample(
    model: nn.Module,
    y: Tensor,
    null_class: int,
    *,
    steps: int,
    guidance: float,
    seed: int,
    shape: tuple[int, ...] = (1, 8, 8),
) -> Tensor:
    """Return images [B, *shape] for labels [B]: Heun's method with classifier-free guidance, from noise to data."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(y), *shape, generator=generator)
    labels = torch.cat([y, torch.full_like(y, null_class)])

    def velocity(x: Tensor, t: float) -> Tensor:
        times = torch.full((len(labels),), t * TIMESTEP_SCALE)
        conditional, unconditional = model(torch.cat([x, x]), times, labels).chunk(2)
        return torch.lerp(unconditional, conditional, guidance)

    times = torch.linspace(1, 0, steps + 1).tolist()
    for now, then in pairwise(times):
        here = velocity(x, now)
        ahead = velocity(x + (then - now) * here, then) if then > 0 else here
        x = x + (then - now) * (here + ahead) / 2
    return x.clamp(-1, 1)
