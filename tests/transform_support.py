"""Small models of our own for tests of ``transform``, each with the calls it takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from examples.dit import DiT
from examples.functional_dit import FunctionalDiT
from examples.inline_dit import InlineDiT
from examples.randomise import randomise_zeros
from examples.vit import VisionTransformer
from moefx.routing import RoutedFFN

SMALL: dict[str, Any] = {"image_size": 8, "patch": 2, "in_channels": 3, "depth": 2, "width": 32, "heads": 4}
OURS: dict[str, Any] = {
    "DiT": lambda: DiT(**SMALL, classes=5),
    "InlineDiT": lambda: InlineDiT(**SMALL, classes=5),
    "FunctionalDiT": lambda: FunctionalDiT(**SMALL, classes=5),
    "VisionTransformer": lambda: VisionTransformer(image_size=8, patch=2, depth=2, width=32, heads=4, qk_norm=True),
}


def build(name: str = "DiT") -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = randomise_zeros(OURS[name]()).eval()
    return model


def example(name: str = "DiT", batch: int = 2) -> tuple[Tensor, ...]:
    draws = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, 8, 8, generator=draws)
    return (x,) if name == "VisionTransformer" else (x, torch.rand(batch, generator=draws) * 1000, torch.arange(batch))


def routed_modules(model: nn.Module) -> list[RoutedFFN]:
    return [m for m in model.modules() if isinstance(m, RoutedFFN)]


class Residual(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False))
        nn.init.normal_(self.net[0].weight, std=width**-0.5)
        nn.init.normal_(self.net[2].weight, std=hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.net(x)
        return out
