"""Is the routing alive? A report per routed layer from the statistics of its last call."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from moefx.training.aux_loss import routing_records


@dataclass(frozen=True)
class Health:
    """One routed layer, over its E experts (or tied groups) at its last call.

    Attributes:
        layer: module path.
        max_load: share of all assignments that the busiest expert got; 1/E is perfect.
        dead: experts that got none.
        entropy: mean entropy of the router in nats.
        max_entropy: log E.
    """

    layer: str
    max_load: float
    dead: tuple[int, ...]
    entropy: float
    max_entropy: float


def health(model: nn.Module) -> list[Health]:
    """Return the health of each routed layer that has been called. Waits for the device: not for every step.

    One call says what one batch at one timestep did; experts that serve other timesteps look dead in it.
    """
    reports = []
    for layer, record in routing_records(model):
        if record.terms is None:
            continue
        load = record.load.tolist()
        dead = tuple(index for index, share in enumerate(load) if share == 0)
        reports.append(Health(layer, max(load), dead, record.entropy.item(), math.log(len(load))))
    return reports
