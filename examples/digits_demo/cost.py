"""Count parameters and floating-point operations, by rules written here and not by the library that is on show.

Multiply and add count as two operations; only matrix products are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from examples.dit import Attention
from moefx.routing import RoutedFFN


@dataclass(frozen=True)
class Cost:
    """Trainable parameters in all, those that one token uses, and operations to denoise one image once."""

    parameters: int
    active_parameters: int
    flops_per_image: int


def routed_layers(model: nn.Module) -> list[tuple[str, RoutedFFN]]:
    """Return the routed layers in module order, with their names."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, RoutedFFN)]


def cost(model: nn.Module, image_inputs: tuple[Tensor, ...]) -> Cost:
    """Count for a model and its inputs for one image."""
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    idle = sum(_idle_parameters(layer) for _, layer in routed_layers(model))
    return Cost(total, total - idle, _flops(model, image_inputs))


def _expert_parameters(layer: RoutedFFN) -> int:
    """Parameters of one expert: those stacked over experts, divided by their number."""
    stacked = [p for p in layer.experts.parameters() if p.shape[0] == layer.experts.num_experts and p.ndim > 1]
    return sum(p.numel() for p in stacked) // layer.experts.num_experts


def _idle_parameters(layer: RoutedFFN) -> int:
    return (layer.experts.num_experts - layer.top_k) * _expert_parameters(layer)


def _tokens(x: Tensor) -> int:
    return x.numel() // x.shape[-1]


def _linear(module: Any, x: Tensor, out: Tensor) -> int:
    return 2 * _tokens(x) * int(module.weight.numel())


def _convolution(module: Any, x: Tensor, out: Tensor) -> int:
    return 2 * out.numel() * int(module.weight[0].numel())


def _attention(module: Any, x: Tensor, out: Tensor) -> int:
    batch, tokens, width = x.shape
    return 4 * batch * tokens * tokens * width


def _routed(module: Any, x: Tensor, out: Tensor) -> int:
    matrices: int = sum(p[0].numel() for p in module.experts.parameters() if p.ndim == 3)
    router: int = sum(p.numel() for p in module.router.parameters() if p.ndim == 2)
    chosen: int = module.top_k
    return 2 * _tokens(x) * (chosen * matrices + router)


RULES: dict[type[nn.Module], Callable[[Any, Tensor, Tensor], int]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
    Attention: _attention,
    RoutedFFN: _routed,
}


@torch.no_grad()
def _flops(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    counted: list[int] = []
    handles = []
    for module in model.modules():
        for kind, rule in RULES.items():
            if isinstance(module, kind):

                def count(
                    module: nn.Module,
                    args: tuple[Tensor, ...],
                    out: Tensor,
                    rule: Callable[[Any, Tensor, Tensor], int] = rule,
                ) -> None:
                    counted.append(rule(module, args[0], out))

                handles.append(module.register_forward_hook(count))
    try:
        model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return sum(counted)
