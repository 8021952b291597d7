"""The sizes of a model and the means to run it, as far as a placement needs them."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from torch import nn

from moefx.errors import OptionError, PlanError
from moefx.passes.placement.collect import routed_layers
from moefx.passes.placement.stacks import expert_count, row_widths, stack_of, stacked_parameters


@dataclass(frozen=True)
class ModelDims:
    """Sizes of a routed model.

    Args:
        layers: dotted names of the routed FFNs.
        experts: number of experts of each.
        expert_bytes: weights of one expert of each layer.
        shared_bytes: weights that every device keeps: all the others.
        row_bytes: of one row on its way to an expert of each layer; empty if unknown.
        return_bytes: of one row on its way back; empty if it is as many.
        row_flops: floating-point operations of one row in an expert of each layer; empty if unknown.
    """

    layers: tuple[str, ...]
    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    shared_bytes: int = 0
    row_bytes: tuple[int, ...] = ()
    row_flops: tuple[float, ...] = ()
    return_bytes: tuple[int, ...] = ()

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
        stacks = [stack_of(layer).experts for layer in layers.values()]
        stacked = [list(stacked_parameters(experts).values()) for experts in stacks]
        total = sum(p.nbytes for p in model.parameters())
        widths = [pair for experts in stacks if (pair := row_widths(experts)) is not None]
        known = len(widths) == len(stacks)  # rows of whole modules are as long as the samples
        sizes = [max((p.element_size() for p in parameters), default=0) for parameters in stacked]
        there, back = ([width[way] * size for width, size in zip(widths, sizes, strict=False)] for way in (0, 1))
        return cls(
            layers=tuple(layers),
            experts=tuple(expert_count(layer) for layer in layers.values()),
            expert_bytes=tuple(sum(p.element_size() * math.prod(p.shape[1:]) for p in of) for of in stacked),
            shared_bytes=total - sum(p.nbytes for parameters in stacked for p in parameters),
            row_bytes=tuple(there) if known else (),
            row_flops=tuple(2.0 * sum(math.prod(p.shape[1:]) for p in of if p.ndim > 2) for of in stacked)
            if known
            else (),
            return_bytes=tuple(back) if known and back != there else (),
        )

    def back_bytes(self, layer: int) -> int:
        """Return the bytes of one row of a layer on its way back."""
        return (self.return_bytes or self.row_bytes)[layer]


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
