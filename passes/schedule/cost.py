"""What a placement makes each part of a layer cost, up to thousands of devices.

Rows start on all devices alike, so what device i sends to device j depends on j alone. Where devices meet at nested
switches (a server's own, then the fabric) the bytes on every link then follow from sums per switch: no matrix of pairs.

Legend: G devices, E experts of a layer, M devices at a switch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moefx.errors import PlanError
from moefx.passes.placement import ModelDims, Placement, RoutingTrace, Topology
from moefx.passes.placement.objective import computed_shares
from moefx.passes.placement.predict import dispatch_bytes, layer_seconds
from moefx.passes.placement.topology import DEVICE, MEMORY

Array = NDArray[np.float64]
IDs = NDArray[np.int64]
_DENSE_LIMIT = 64  # devices up to which matrices of pairs are used


@dataclass(frozen=True, eq=False)
class LayerCost:
    """Seconds of the parts of one layer of one step.

    Args:
        dense_s: what comes before the routed FFN (attention and the like), per device ``[G]``.
        expert_s: routed experts, per device ``[G]``.
        shared_s: shared experts, per device ``[G]``.
        latency_s: of one exchange.
        dispatch_s: of the bytes of the dispatch at the busiest resource.
        combine_s: the same on the way back.
        wire_bytes: of the dispatch between devices, in all.
        buffer_bytes: of the rows that arrive at each device, ``[G]``.
    """

    dense_s: Array
    expert_s: Array
    shared_s: Array
    latency_s: float
    dispatch_s: float
    combine_s: float
    wire_bytes: float
    buffer_bytes: Array


def layer_costs(
    placement: Placement,
    trace: RoutingTrace,
    topology: Topology,
    dims: ModelDims,
    level: int,
    *,
    dense_flops: float = 0.0,
    shared_flops: float = 0.0,
) -> list[LayerCost]:
    """Return the costs of all layers at one noise level.

    Args:
        placement: where the experts live; its window of this level is used.
        trace: rows per expert.
        topology: the devices.
        dims: sizes of experts and rows.
        level: index of the noise level.
        dense_flops: of one layer outside routed experts, over all devices.
        shared_flops: of the shared experts of one layer, over all devices.

    Raises:
        PlanError: the sizes of rows are unknown, or there are many devices and no nested switches.
    """
    dims.need_rows("simulate a schedule")
    layout = placement.layouts[placement.layout_at(float(trace.sigmas[level]))]
    exchange = Exchange.of(topology)
    per_device = len(topology) * topology.flops_per_s
    costs = []
    for i in range(len(trace.layers)):
        load_E = trace.layer(i)[level]
        rows_G = load_E @ computed_shares(layout, i)
        if layout.local_first:
            bytes_GG = dispatch_bytes(layout, i, load_E, dims)
            out, back, wire = *exchange.pairs(bytes_GG), float(bytes_GG.sum())
        else:
            sent_G = rows_G * dims.row_bytes[i] / len(topology)
            out, back = exchange.uniform(sent_G), exchange.uniform(sent_G, back=True)
            wire = float(sent_G.sum() * (len(topology) - 1))
        expert_s = layer_seconds(layout, i, load_E[None], topology, dims)[0]
        buffers = rows_G * dims.row_bytes[i]
        costs.append(
            LayerCost(
                dense_flops / per_device,
                expert_s,
                shared_flops / per_device,
                exchange.latency_s,
                out,
                back,
                wire,
                buffers,
            )
        )
    return costs


@dataclass(frozen=True, eq=False)
class _Links:
    """One link per device: seconds per byte, latency, and the number of the resource it shares, each ``[G]``."""

    beta: Array
    alpha: Array
    resource: IDs

    @classmethod
    def of(cls, links: list[dict[str, Any]], resource: dict[str, int]) -> _Links:
        """Read the attributes of edges; resources get numbers as they come."""
        shared = [resource.setdefault(link["resource"], len(resource)) for link in links]
        beta, alpha = ([link[key] for link in links] for key in ("beta_s_per_byte", "alpha_s"))
        return cls(np.array(beta), np.array(alpha), np.array(shared))


@dataclass(frozen=True, eq=False)
class _Level:
    """The switch of each device at one level ``[G]``, and the links to it and from it."""

    switch: IDs
    up: _Links
    down: _Links

    @classmethod
    def of(cls, graph: nx.DiGraph, devices: tuple[str, ...], switches: list[str], resource: dict[str, int]) -> _Level:
        """Read one level of a topology."""
        up = [graph.edges[pair] for pair in zip(devices, switches, strict=True)]
        down = [graph.edges[pair] for pair in zip(switches, devices, strict=True)]
        number = np.unique(switches, return_inverse=True)[1]
        return cls(number, _Links.of(up, resource), _Links.of(down, resource))


@dataclass(frozen=True, eq=False)
class Exchange:
    """Time of all-to-all exchanges on a topology.

    Args:
        topology: the devices.
        latency_s: of the longest route.
        levels: of nested switches, from the innermost out; empty where pairs are used.
    """

    topology: Topology
    latency_s: float
    levels: tuple[_Level, ...]

    @classmethod
    def of(cls, topology: Topology) -> Exchange:
        """Prepare a topology.

        Raises:
            PlanError: there are more than 64 devices, and they do not meet at nested switches.
        """
        levels = _nested_switches(topology)
        if not levels and len(topology) > _DENSE_LIMIT:
            raise PlanError(
                f"simulate {len(topology)} devices",
                found="links other than from devices to nested switches",
                do=f"use Topology.node or Topology.cluster, or at most {_DENSE_LIMIT} devices",
            )
        if levels:
            return cls(topology, _latency(levels), levels)
        apart = 1.0 - np.eye(len(topology))
        # A latency and a time proportional to the bytes: twice the bytes tell them apart.
        return cls(topology, 2 * topology.exchange_seconds(apart) - topology.exchange_seconds(2 * apart), ())

    def uniform(self, received_G: Array, *, back: bool = False) -> float:
        """Return the time of the bytes if every device sends ``received[j]`` to device j, or all of it comes back."""
        if not self.levels:
            bytes_GG = np.tile(received_G, (len(received_G), 1))
            np.fill_diagonal(bytes_GG, 0)
            return self._wire_seconds(bytes_GG.T if back else bytes_GG)
        busy_s: dict[int, float] = {}
        inner_sum, inner_count = received_G, np.ones(len(received_G))
        for level in self.levels:
            total_G: Array = np.bincount(level.switch, weights=received_G)[level.switch].astype(np.float64)
            count_G = np.bincount(level.switch)[level.switch].astype(np.float64)
            sends, gets = total_G - inner_sum, (count_G - inner_count) * received_G
            if back:
                sends, gets = gets, sends
            for link, moved in ((level.up, sends), (level.down, gets)):
                seconds = np.bincount(link.resource, weights=moved * link.beta)
                for key in np.flatnonzero(seconds).tolist():
                    busy_s[key] = busy_s.get(key, 0.0) + float(seconds[key])
            inner_sum, inner_count = total_G, count_G
        return max(busy_s.values(), default=0.0)

    def pairs(self, bytes_GG: Array) -> tuple[float, float]:
        """Return the time of the bytes there and back, for any matrix ``[G, G]``.

        Raises:
            PlanError: there are too many devices for a matrix of pairs.
        """
        if len(self.topology) > _DENSE_LIMIT:
            raise PlanError(
                f"simulate {len(self.topology)} devices with local copies first",
                found="bytes that differ from pair to pair",
                do=f"use local_first=False, or at most {_DENSE_LIMIT} devices",
            )
        return self._wire_seconds(bytes_GG), self._wire_seconds(bytes_GG.T)

    def _wire_seconds(self, bytes_GG: Array) -> float:
        return self.topology.exchange_seconds(2 * bytes_GG) - self.topology.exchange_seconds(bytes_GG)


def _nested_switches(topology: Topology) -> tuple[_Level, ...]:
    """Return the levels of switches if devices are linked to nested switches alone, inner ones faster; else none."""
    graph = topology.graph
    kind = {name: attributes.get("kind", DEVICE) for name, attributes in graph.nodes(data=True)}
    if any(kind[a] == kind[b] for a, b in graph.edges):
        return ()
    chains = [
        sorted(
            (link["beta_s_per_byte"], switch)
            for _, switch, link in graph.out_edges(device, data=True)
            if kind[switch] != MEMORY and graph.has_edge(switch, device)
        )
        for device in topology.devices
    ]
    if len({len(chain) for chain in chains}) != 1 or not chains[0]:
        return ()
    names = [[switch for _, switch in column] for column in zip(*chains, strict=True)]
    nested = all(len(set(zip(inner, outer, strict=True))) == len(set(inner)) for inner, outer in pairwise(names))
    faster = all(len({beta for beta, _ in chain}) == len(chain) for chain in chains)
    if not nested or not faster or len(set(names[-1])) > 1:
        return ()
    resource: dict[str, int] = {}
    return tuple(_Level.of(graph, topology.devices, column, resource) for column in names)


def _latency(levels: tuple[_Level, ...]) -> float:
    """Return the latency of the longest route: over a switch at which devices meet that did not meet further in."""
    worst, groups = 0.0, len(levels[0].switch)
    for level in levels:
        if len(np.unique(level.switch)) < groups:
            worst = max(worst, float(level.up.alpha.max() + level.down.alpha.max()))
        groups = len(np.unique(level.switch))
    return worst
