"""Give zero-initialised parameters values, so that every path of a fresh model carries signal."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


@torch.no_grad()
def randomise_zeros(model: ModelT, *, std: float = 0.2, seed: int = 0) -> ModelT:
    """Fill every all-zero parameter with Normal(0, std) in place; same values for the same seed and names."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator) * std
            parameter.copy_(noise)
    return model
