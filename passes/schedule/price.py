"""What the nodes of a captured graph cost on each device: marks for all that no exchange and no expert prices.

Legend: G devices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.fx import Node

from moefx.graph import Graph
from moefx.graph.origin import origin_of
from moefx.passes.analysis.cost import cost
from moefx.passes.placement import ModelDims, Placement, RoutingTrace, Topology
from moefx.passes.schedule.cost import LayerCost, layer_costs
from moefx.passes.schedule.mark import Mark, set_mark
from moefx.passes.schedule.task import COMPUTE


def price_graph(graph: Graph, topology: Topology) -> None:
    """Mark every node that computes with the longer of its arithmetic and its memory traffic, in place.

    Args:
        graph: captured on one device's part of the batch, with ``meta["val"]``.
        topology: the devices; what it does not state is unlimited.
    """
    costs = cost(graph)
    for node in graph.nodes:
        found = costs.nodes[node]
        flops, moved = float(found.flops), float(found.bytes)
        if flops or moved:
            seconds = np.maximum(flops / topology.flops_per_s, moved / topology.memory_bytes_per_s)
            role = "shared" if "shared" in origin_of(node).path.split(".") else "dense"
            set_mark(node, Mark(role, COMPUTE, seconds, holds_bytes=_made_bytes(node)))


def _made_bytes(node: Node) -> float:
    made: Any = node.meta.get("val")
    items = made if isinstance(made, tuple | list) else [made]
    return float(sum(t.numel() * t.element_size() for t in items if isinstance(t, torch.Tensor)))


def region_costs(
    placement: Placement,
    topology: Topology,
    dims: ModelDims,
    rows: Callable[[int], float],
    trace: RoutingTrace | None = None,
    level: int = 0,
) -> list[LayerCost]:
    """Return the costs of all layers for a batch of so many rows.

    Args:
        placement: where the experts live; with a trace, its window of the level is used.
        topology: the devices.
        dims: sizes of experts and rows.
        rows: of layer i, over all devices.
        trace: how rows divide among experts; evenly without one.
        level: index of the noise level.
    """
    if trace is None:
        load = np.zeros((1, len(dims.layers), max(dims.experts)))
        for i, count in enumerate(dims.experts):
            load[0, i, :count] = 1.0
        trace, level = RoutingTrace(np.ones(1), dims.layers, dims.experts, load), 0
        placement = placement.layouts[0]
    load = trace.load[level].copy()
    for i in range(len(load)):
        load[i] *= rows(i) / max(float(load[i].sum()), 1.0)
    whole = RoutingTrace(trace.sigmas[level : level + 1], trace.layers, trace.experts, load[None])
    return layer_costs(placement, whole, topology, dims, 0)
