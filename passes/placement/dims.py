"""The sizes of a model and the means to run it, as far as a placement needs them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from moefx.errors import OptionError
from moefx.passes.placement.collect import expert_count, routed_layers
from moefx.routing.experts import Experts

# b_out is added once after the experts, on every device.
_NOT_STACKED = "b_out"


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a routed model.

    Args:
        layers: dotted names of the routed FFNs.
        experts: number of experts of each.
        expert_bytes: weights of one expert of each layer.
        shared_bytes: weights that every device keeps: all the others.
    """

    layers: tuple[str, ...]
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    shared_bytes: int = 0

    @classmethod
    def of(cls, model: nn.Module) -> ModelDims:
        """Read the sizes of ``model``, which may be on ``meta``.

        Raises:
            NothingMatched: it has no routed FFN.
        """
        layers = routed_layers(model)
        stacked = {
            name: [p for key, p in _parameters(layer.experts) if key != _NOT_STACKED] for name, layer in layers.items()
        }
        total = sum(p.nbytes for p in model.parameters())
        return cls(
            layers=tuple(layers),
            experts=tuple(expert_count(layer) for layer in layers.values()),
            expert_bytes=tuple(
                sum(p.element_size() * math.prod(p.shape[1:]) for p in stacked[name]) for name in layers
            ),
            shared_bytes=total - sum(p.nbytes for parameters in stacked.values() for p in parameters),
        )


def _parameters(experts: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of experts; an activation with parameters is no expert, but copies of a module are."""
    return experts.named_parameters(recurse=not isinstance(experts, Experts))


@dataclass(frozen=True)
class Budget:
    """What a plan may use.

    Args:
        memory_bytes: of weights per device; None leaves it to the topology.
        copies: how many times each weight is held: 1 for inference, 4 for training with AdamW (weight, gradient, two
            moments).
        restarts: random starts of a local search; more takes longer and can only improve the plan.
        seed: of these starts. The same seed gives the same plan on every machine.
    """

    memory_bytes: float | None = None
    copies: float = 1.0
    restarts: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copies <= 0 or self.restarts < 0 or (self.memory_bytes is not None and self.memory_bytes <= 0):
            raise OptionError("a placement budget", found=str(self), do="use positive numbers")
