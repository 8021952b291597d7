"""The sizes of a model and the means to run it, as far as a placement needs them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moefx.errors import OptionError, PlanError
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
        row_bytes: of one row on its way to an expert of each layer; empty if unknown.
        row_flops: floating-point operations of one row in an expert of each layer; empty if unknown.
    """

    layers: tuple[str, ...]
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    shared_bytes: int = 0
    row_bytes: tuple[int, ...] = ()
    row_flops: tuple[float, ...] = ()

    def need_rows(self, asked: str) -> None:
        """Refuse to go on without the sizes of rows.

        Raises:
            PlanError: they are unknown.
        """
        if not len(self.row_bytes) == len(self.row_flops) == len(self.layers):
            found = f"row_bytes {self.row_bytes} and row_flops {self.row_flops} of {len(self.layers)} layers"
            raise PlanError(asked, found=found, do="use ModelDims.of(model), or give both")

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
            row_bytes=tuple(_row_bytes(layer) for layer in layers.values()),
            row_flops=tuple(2.0 * sum(math.prod(p.shape[1:]) for p in stacked[name] if p.ndim > 2) for name in layers),
        )


def _row_bytes(layer: Any) -> int:
    """Return the bytes of one row: the first stacked matrix [E, F, D] reads it."""
    matrices = [p for _, p in _parameters(layer.experts) if p.ndim > 2]
    return int(matrices[0].shape[-1]) * int(matrices[0].element_size()) if matrices else 0


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
        seconds: after which a search returns the best it has; a plan cut short depends on the machine.
        spare: slots of each layer that each device has for copies of experts; None is one where there is room.
        windows: most layouts in one run.
        imbalance: of the load that a strategy for affinity may leave: 0.05 lets the busiest device have 5% more.
        move_price: what moving one expert costs, in steps of perfectly balanced experts, divided by the devices.
    """

    memory_bytes: float | None = None
    copies: float = 1.0
    restarts: int = 8
    seed: int = 0
    seconds: float = math.inf
    spare: int | None = None
    windows: int = 4
    imbalance: float = 0.05
    move_price: float = 0.05

    def __post_init__(self) -> None:
        positive = (self.copies, self.seconds, self.windows, 1.0 if self.memory_bytes is None else self.memory_bytes)
        whole = (self.restarts, self.spare or 0, self.imbalance, self.move_price)
        if not (all(value > 0 for value in positive) and all(value >= 0 for value in whole)):
            raise OptionError("a placement budget", found=str(self), do="use positive numbers")

    def deadline(self) -> float:
        """Return the time on the monotonic clock at which a search that starts now must end."""
        return time.monotonic() + self.seconds
