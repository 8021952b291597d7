"""The registry of strategies, and the one way in: check, run, check.

A strategy is a pure function ``(trace, topology, dims, budget) -> homes``: for each layer the device of each expert.
What it returns is scored and checked here, so that no strategy can report its own score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefx.errors import OptionError, PlanError, nearest
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.objective import lower_bound, perfect_balance, total_cost
from moefx.passes.placement.placement import Placement
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Homes = Sequence[NDArray[np.int64]]
Function = Callable[[RoutingTrace, Topology, ModelDims, Budget], Homes]


@dataclass(frozen=True)
class Strategy:
    """A named strategy; calling it returns a checked :class:`Placement`."""

    name: str
    summary: str
    function: Function

    def __call__(
        self, trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget | None = None
    ) -> Placement:
        """Plan.

        Raises:
            PlanError: the trace is of another model, there are more devices than experts, or memory is short.
        """
        budget = budget or Budget()
        _check_inputs(trace, topology, dims)
        homes = self.function(trace, topology, dims, budget)
        placement = Placement(
            strategy=self.name,
            devices=topology.devices,
            layers=dims.layers,
            primary=tuple(tuple(int(g) for g in home) for home in homes),
            objective=total_cost(trace, topology, homes),
            bound=lower_bound(trace, topology),
            balanced=perfect_balance(trace, topology),
        )
        placement.check(dims, topology, budget)
        return placement


_STRATEGIES: dict[str, Strategy] = {}


def register_strategy(name: str, summary: str) -> Callable[[Function], Strategy]:
    """Register a function as the strategy ``name``."""

    def register(function: Function) -> Strategy:
        if name in _STRATEGIES:
            raise OptionError(f"register the strategy {name!r}", found="the name is taken", do="choose another")
        _STRATEGIES[name] = Strategy(name, summary, function)
        return _STRATEGIES[name]

    return register


def strategies() -> list[Strategy]:
    """Return every strategy, by name."""
    return [_STRATEGIES[name] for name in sorted(_STRATEGIES)]


def get_strategy(name: str) -> Strategy:
    """Return the strategy ``name``.

    Raises:
        OptionError: there is none.
    """
    if name not in _STRATEGIES:
        raise OptionError(f"the placement strategy {name!r}", found="no such name", do=nearest(name, _STRATEGIES))
    return _STRATEGIES[name]


def _check_inputs(trace: RoutingTrace, topology: Topology, dims: ModelDims) -> None:
    if (trace.layers, trace.experts) != (dims.layers, dims.experts):
        raise PlanError(
            "place the experts of a model",
            found=f"a trace of {_shape(trace.layers, trace.experts)}, a model of {_shape(dims.layers, dims.experts)}",
            do="collect a trace of this model",
        )
    smallest = int(np.argmin(dims.experts))
    if dims.experts[smallest] < len(topology):
        raise PlanError(
            f"place experts on {len(topology)} devices",
            found=f"{dims.layers[smallest]} has {dims.experts[smallest]} experts",
            do=f"use at most {dims.experts[smallest]} devices, or cut experts finer (granularity)",
        )


def _shape(layers: Sequence[str], experts: Sequence[int]) -> str:
    return f"{len(layers)} layers from {layers[0]} on, {min(experts)}-{max(experts)} experts"
