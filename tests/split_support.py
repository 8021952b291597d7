"""A small dense model with its calibration, and what the networks compute written out by hand."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import moefx
from examples.dit import DiT

F64 = torch.float64


def small_dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(image_size=8, patch=2, in_channels=1, depth=2, width=16, heads=2, classes=4, label_dropout=0.0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.double().eval()


def batch(seed: int, count: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 1, 8, 8, generator=draws, dtype=F64)
    t = (torch.arange(count, dtype=F64) + 0.5) * 1000 / count
    return x, t, torch.randint(0, 4, (count,), generator=draws)


def loss(output: Tensor, inputs: Any) -> Tensor:
    return (output - inputs[0]).square().mean()


@functools.cache
def calibrated() -> tuple[DiT, moefx.Calibration]:
    """The model, and a calibration whose sample holds every token."""
    model = small_dit()
    batches = [batch(i) for i in range(4)]
    return model, moefx.calibrate(model, batches, loss=loss, buckets=6, samples=10_000, progress=False)


def convert(recipe: str, **options: Any) -> tuple[DiT, nn.Module]:
    """A dense copy and a split one."""
    model, calibration = calibrated()
    routed = moefx.transform(copy.deepcopy(model), batch(0), recipe=recipe, calibration=calibration, **options)
    return copy.deepcopy(model), routed


def all_tokens(model: DiT, name: str = "blocks.1.mlp") -> Tensor:
    """Every token that entered a network while it was calibrated."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for i in range(4):
        model(*batch(i))
    handle.remove()
    return torch.cat(seen).flatten(0, 1)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


class Plain:
    """The weights of one dense network, with gradients, and its hidden layer."""

    def __init__(self, mlp: Any) -> None:
        parts = (mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        self.w1, self.b1, self.w2, self.b2 = (p.detach().clone().requires_grad_() for p in parts)

    def hidden(self, x: Tensor) -> Tensor:
        return gelu(x @ self.w1.T + self.b1)

    def part(self, x: Tensor, neurons: Tensor) -> Tensor:
        """The output of some neurons of one token or of many, without the bias."""
        h = gelu(x @ self.w1[neurons].T + self.b1[neurons])
        return h @ self.w2[:, neurons].T


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())
