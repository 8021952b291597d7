"""What rewrites with learned thresholds share: their options, their contract, and the gate itself."""

from __future__ import annotations

from typing import TypeVar

import torch
from pydantic import Field
from torch import nn

from moefx.passes.rewrite.base import Context, Contract, Options
from moefx.routing.record import RoutingRecord
from moefx.routing.router import LinearRouter
from moefx.routing.threshold import ThresholdGate

TIMESTEP_WIDTH = 256
Module = TypeVar("Module", bound=nn.Module)


class ThresholdOptions(Options):
    """Options of a gate that the timestep switches (DyDiT, arXiv 2410.03456), and of every gate's losses."""

    router_bias: float = Field(15.0, description="start of the timestep router's bias; positive: every group is on")
    temperature: float = Field(5.0, gt=0, description="divides the timestep router's logits in the soft gate")
    budget: float | None = Field(0.5, gt=0, le=1, description="share of the groups that training aims at; None: no aim")
    warmup: float = Field(0.0, ge=0, le=1, description="fraction of the training over which that share falls from 1")
    losses: dict[str, float] | None = Field(None, description="coefficients of the auxiliary terms; None: the paper's")

    @property
    def expected_share(self) -> float:
        """The share of the groups that training aims at."""
        return 1.0 if self.budget is None else self.budget

    def threshold_contract(self, what: str) -> Contract:
        """Exact while every group is on."""
        if self.router_bias > 0:
            return Contract("exact", 0.0, f"a positive bias switches every {what} on")
        return Contract("approximate", float(getattr(self, "max_error", 1.0)), f"some {what}s are off")

    def with_losses(self, module: Module) -> Module:
        """Return ``module`` with the coefficients asked for in its record."""
        record = getattr(module, "record", None)
        if self.losses is not None and isinstance(record, RoutingRecord):
            record.coefficients = dict(self.losses)
        return module


def threshold_gate(options: ThresholdOptions, context: Context, groups: int, *, cost: float) -> ThresholdGate:
    """Return a gate over ``groups`` groups, of which the first stays on, that reads the timestep alone."""
    tap = context.taps["timestep"].meta["val"]
    raw = tap.ndim <= 1
    device = next(context.graph.root.parameters()).device
    router = LinearRouter(
        0,
        groups - 1,
        tap_dim=TIMESTEP_WIDTH if raw else int(tap.shape[-1]),
        embed_timestep=raw,
        bias=True,
        device=device,
    )
    assert router.bias is not None
    with torch.no_grad():
        router.bias.fill_(options.router_bias)
    gate = ThresholdGate(
        router,
        groups,
        temperature=options.temperature,
        target=options.budget,
        warmup=options.warmup,
        cost=cost,
        device=device,
    )
    return options.with_losses(gate)
