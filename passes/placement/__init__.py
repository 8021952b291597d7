"""Placement: where experts live.

``topology`` devices and links, ``collect`` and ``trace`` what the routers did, ``dims`` the model's sizes and the
budget, ``methods`` the strategies, one file each, ``strategy`` their registry, ``goals`` what they minimise,
``placement`` the result, ``predict`` what it gives, ``wire`` its bytes to the byte, ``migration`` what moves,
``stacks`` where weights are. ``moefx.parallel`` carries it out.
"""

from __future__ import annotations

from moefx.errors import InputError
from moefx.passes.placement import methods
from moefx.passes.placement.collect import TraceCollector, routed_layers
from moefx.passes.placement.count import trace_of_choices
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.placement import Goal, Layout, Placement, Replica, Window
from moefx.passes.placement.strategy import Strategy, get_strategy, register_strategy, strategies
from moefx.passes.placement.synthesise import synthesise
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace
from moefx.passes.placement.wire import wire_bytes

# Importing it registers the strategies.
_METHODS = methods

__all__ = [
    "Budget",
    "Goal",
    "Layout",
    "ModelDims",
    "Placement",
    "Replica",
    "RoutingTrace",
    "Strategy",
    "Topology",
    "TraceCollector",
    "Window",
    "get_strategy",
    "place",
    "register_strategy",
    "routed_layers",
    "strategies",
    "synthesise",
    "trace_of_choices",
    "wire_bytes",
]


def place(
    trace: RoutingTrace,
    topology: Topology,
    dims: ModelDims,
    strategy: str = "minimax_time",
    budget: Budget | None = None,
) -> Placement:
    """Plan where the experts of a model live.

    Args:
        trace: what its routers did; see :class:`TraceCollector`.
        topology: the devices.
        dims: ``ModelDims.of(model)``.
        strategy: a name from :func:`strategies`.
        budget: memory and effort.

    Raises:
        OptionError: the strategy is unknown.
        PlanError: the trace is of another model, there are more devices than experts, or memory is short.
    """
    for value, kind in ((trace, RoutingTrace), (topology, Topology), (dims, ModelDims)):
        if not isinstance(value, kind):
            raise InputError("place experts", found=f"a {type(value).__name__}", do=f"pass a {kind.__name__}")
    return get_strategy(strategy)(trace, topology, dims, budget)
