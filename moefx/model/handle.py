"""``model.moefx``: what a transformed model gained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moefx.graph import Graph, trace
from moefx.graph.signature import Inputs
from moefx.model.install import Undo
from moefx.model.plan import Plan
from moefx.model.report import Report
from moefx.passes.calibration import Calibration
from moefx.routing.override import override
from moefx.routing.record import RoutingRecord
from moefx.training import aux_loss, routing_records

ATTRIBUTE = "moefx"


@dataclass
class Applied:
    """One transform: its report, how to undo it (None after loading), and the class of the model before it."""

    report: Report
    undos: list[Undo] | None
    model_class: type[nn.Module]


class Handle:
    """The namespace ``model.moefx``.

    The dense modules it keeps for :func:`moefx.untransform` are not part of the model's state. ``calibration`` is what
    the last transform was given; it is saved with the model but for its tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.applied: list[Applied] = []
        self.calibration: Calibration | None = None

    @property
    def report(self) -> Report:
        """The receipt of the last transform; ``print`` it."""
        return self.applied[-1].report

    @property
    def plans(self) -> list[Plan]:
        """The plans that made the model what it is, in order."""
        return [applied.report.plan for applied in self.applied]

    @property
    def undoable(self) -> bool:
        """Whether the dense modules are at hand: not after loading."""
        return all(applied.undos is not None for applied in self.applied)

    @property
    def routing(self) -> dict[str, RoutingRecord]:
        """Routing statistics of the last forward (load, probabilities, entropy), by module name."""
        return dict(routing_records(self._model))

    def aux_loss(self, **coefficients: float) -> torch.Tensor:
        """Return :func:`moefx.aux_loss` of this model."""
        return aux_loss(self._model, **coefficients)

    def override(
        self,
        *,
        top_k: int | None = None,
        ranks: Sequence[int] | None = None,
        experts: Collection[int] | None = None,
        layers: Collection[str] | None = None,
    ) -> AbstractContextManager[list[str]]:
        """Let routed layers choose otherwise for a while; see :func:`moefx.routing.override.override`."""
        return override(self._model, top_k=top_k, ranks=ranks, experts=experts, layers=layers)

    def retarget(self, inputs: Inputs = None, *, dense: nn.Module | None = None, **options: Any) -> None:
        """Change options for good that need no other parameters, such as ``top_k``; see `moefx.model.retarget`."""
        from moefx.model.retarget import retarget

        retarget(self._model, inputs, dense=dense, **options)

    def graph(self, inputs: Inputs = None) -> Graph:
        """Trace the model as it is now; routed modules are leaves."""
        return trace(self._model, inputs)

    def __repr__(self) -> str:
        names = [p.recipe or "+".join(r.name for r in p.passes) for p in self.plans]
        return f"<moefx: {', '.join(names)}>"


def handle_of(model: nn.Module) -> Handle | None:
    """Return ``model.moefx`` of a transformed model, or None."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Handle) else None


def applied_passes(model: nn.Module) -> set[str]:
    """Return the names of the passes that were applied to ``model``."""
    handle = handle_of(model)
    return {p.name for plan in handle.plans for p in plan.passes} if handle else set()
