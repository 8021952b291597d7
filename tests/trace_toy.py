"""A module with whatever forward a test gives it, for tests of tracing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# Sizes [B, T, 8]: the captured ones first.
SIZES = ((2, 6), (3, 6), (1, 6), (2, 5), (5, 9))
Forward = Callable[[Any, Tensor], Any]


class Toy(nn.Module):
    """One linear layer, two buffers, and whatever forward a test gives it."""

    def __init__(self, body: Forward, train: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.arange(8.0))
        self.body = body
        self.train(train)

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def batch(size: tuple[int, int], seed: int = 0) -> tuple[Tensor]:
    return (torch.randn(*size, 8, generator=torch.Generator().manual_seed(seed)),)
