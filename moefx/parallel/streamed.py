"""A placement with memory tiers as graph: weights are fetched, used and given up by nodes of their own.

On one device. What stays there is computed while the rest of the layer arrives; what is fetched, and when, is known
before the run, since a denoiser visits its layers in the same order at every step.

Legend: L layers, E experts of a layer, K slots per token.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from moefx.errors import PlanError
from moefx.graph import Graph
from moefx.graph.signature import Inputs
from moefx.offloading.layout import stacked
from moefx.offloading.store import FileStore, HostStore
from moefx.parallel import loads
from moefx.parallel.loads import StreamedWeights
from moefx.parallel.program import capture
from moefx.parallel.regions import find_regions
from moefx.parallel.roster import Roster
from moefx.parallel.writer import COMBINE, Plan, Rank, RegionWriter
from moefx.passes.placement import ModelDims, Placement, Topology, routed_layers
from moefx.passes.placement.stacks import stack_of
from moefx.passes.schedule import COPY, Problem, Timeline, lint_graph, order_graph, simulate
from moefx.passes.schedule.price import price_graph, region_costs
from moefx.routing.experts import Experts


class StreamedProgram(nn.Module):
    """A model on one device that is too small for its experts, as a scheduled graph; called like the model.

    Attributes:
        model: the model, without the weights of its experts until :meth:`restore`.
        graph: what is executed.
        timeline: of the graph on the clock.
        late: loads that somebody would wait for, by the rates of the topology.
    """

    def __init__(
        self,
        model: nn.Module,
        graph: Graph,
        weights: Sequence[StreamedWeights],
        timeline: Timeline,
        late: list[Problem],
    ) -> None:
        super().__init__()
        self.model, self.graph, self.weights = model, graph, tuple(weights)
        self.timeline, self.late = timeline, late

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph, for inference."""
        return self.graph(*args, **kwargs)

    def restore(self) -> nn.Module:
        """Return the model with all its weights on the device, to the bit."""
        for weights in self.weights:
            weights.restore()
        return self.model


def schedule_streamed(
    model: nn.Module,
    placement: Placement,
    inputs: Inputs = None,
    *,
    topology: Topology,
    ahead: int = 2,
    folder: Path | None = None,
) -> StreamedProgram:
    """Write the step of a model with the tiers of a placement as a graph, and let go of what is not to stay.

    Args:
        model: with routed FFNs; its experts' weights move into files (CPU, or with a folder) or page-locked memory.
        placement: on one device; experts whose tier is not the device are streamed.
        inputs: an example of what it will get.
        topology: the device, and the memory from which it streams.
        ahead: layers whose streamed experts have room at one time.
        folder: for the files; a temporary one by default.

    Raises:
        PlanError: more than one device, nothing to stream, no room for a layer, or experts that are no stacked FFNs.
    """
    asked = f"stream the experts of {type(model).__name__}"
    paths = [f"{name}.{stack_of(layer).path}" for name, layer in routed_layers(model).items()]
    _check(model, placement, paths, ahead, asked)
    graph, dims = capture(model, inputs), ModelDims.of(model)
    price_graph(graph, topology)
    regions = find_regions(graph, paths)
    rows = [float(region.experts.meta["val"].numel()) for region in regions]
    costs = region_costs(placement, topology, dims, rows.__getitem__)
    loader = ThreadPoolExecutor(1, "moefx-stream")
    weights = _opened(model, placement, paths, folder, loader)
    evictions: list[Node | None] = []
    for i, region in enumerate(regions):
        whole = Roster((tuple(range(len(placement.primary[i]))),), ((),))
        writer = RegionWriter(graph, region, whole, Rank(0, ""), costs[i], Plan())
        before = evictions[i - ahead] if i >= ahead else None
        evictions.append(_write(writer, weights[i], before, topology, placement.tiers[i]))
    graph.prune()
    timeline = simulate(order_graph(graph), len(topology))
    problems = lint_graph(graph, len(topology))
    late = [problem for problem in problems if problem.kind == "deadline"]
    if len(late) < len(problems):
        raise PlanError(asked, found="; ".join(map(str, problems)), do="report this schedule")
    for one in weights:
        one.release()
    program = StreamedProgram(model, graph, weights, timeline, late)
    weakref.finalize(program, loader.shutdown, wait=False)
    return program


def _opened(
    model: nn.Module, placement: Placement, paths: Sequence[str], folder: Path | None, loader: ThreadPoolExecutor
) -> list[StreamedWeights]:
    """Put the weights of all experts into a store, and copy those that stay."""
    experts = [loads.stacked_module(model, path) for path in paths]
    device, tensors = experts[0].w_in.device, [dict(stacked(one)) for one in experts]
    store = FileStore(tensors, folder) if device.type == "cpu" or folder is not None else HostStore(tensors, device)
    pins = [tuple(np.flatnonzero(placement.resident(i)).tolist()) for i in range(len(paths))]
    return [StreamedWeights(one, i, pins[i], store, device, loader) for i, one in enumerate(experts)]


def _check(model: nn.Module, placement: Placement, paths: Sequence[str], ahead: int, asked: str) -> None:
    layers = [model.get_submodule(path) for path in paths]
    found = ""
    if len(placement.devices) != 1 or len(placement.layouts) != 1 or not placement.tiers:
        found = f"{len(placement.devices)} devices, {len(placement.layouts)} layouts, tiers {len(placement.tiers)}"
    elif [len(row) for row in placement.primary] != [getattr(layer, "num_experts", 0) for layer in layers]:
        found = "a placement of other layers"
    elif any(type(layer) is not Experts for layer in layers):
        found = "experts that are no stacked feed-forward networks"
    elif ahead < 1:
        found = f"room for {ahead} layers"
    if found:
        do = "plan it for this model on one device with a slower tier (pin_and_stream), with room for a layer"
        raise PlanError(asked, found=found, do=do)


def _write(
    w: RegionWriter, weights: StreamedWeights, before: Node | None, topology: Topology, tiers: Sequence[str]
) -> Node | None:
    """Write one layer; return the node that gives its streamed experts up, or None if all of them stay."""
    region, count = w.region, len(tiers)
    stay = tuple(e for e in range(count) if e not in set(weights.streamed))
    sums, evicted = [], None
    if stay:
        held = {own: w.constant(f"_pinned_{region.layer}_{_name(own)}", weights.pinned[_name(own)]) for own in _own(w)}
        sums.append(_part(w, held, stay, count, 0))
    if weights.streamed:
        cost: dict[str, Any] = {"seconds": _seconds(weights, topology, tiers), "holds_bytes": float(weights.bytes)}
        loading = w.call(
            loads.begin_load, weights, before, role="prefetch", stream=COPY, begins=True,
            deadline=f"end_load_{region.layer}", **cost,
        )  # fmt: skip
        loaded = w.call(loads.end_load, weights, loading, role="prefetch", waits=True, holds_bytes=float(weights.bytes))
        loaded.name = f"end_load_{region.layer}"
        _as_early_as_can_be(loading, before)
        held = {own: w.item(loaded, _name(own)) for own in _own(w)}
        sums.append(_part(w, held, weights.streamed, count, 1))
        evicted = w.call(loads.evict, loaded, weights, sums[-1], role="evict")
    y = sums[0] if len(sums) == 1 else w.call(torch.add, *sums, role="expert")
    w.replace(w.joined([y]))
    return evicted


def _as_early_as_can_be(loading: Node, before: Node | None) -> None:
    """Begin to load when there is room: the clock's copying does not wait for computing, but Python runs in order."""
    if before is not None:
        before.append(loading)
        return
    first = next(n for n in loading.graph.nodes if n.op != "placeholder" and n.target is not loads.begin_load)
    first.prepend(loading)


def _part(w: RegionWriter, held: dict[Node, Node], experts: tuple[int, ...], count: int, chunk: int) -> Node:
    """Write the weighted sums over some of the experts."""
    table = loads.places(experts, count, torch.device("cpu"))
    place = w.constant(f"_place_{w.region.layer}_{chunk}", table.to(w.graph.parameter(str(_own(w)[0].target)).device))
    ids = w.call(loads.some_of, w.region.experts, place, chunk=chunk)
    rows, order = w.experts(held, w.region.x, ids, w.k, chunk, share=len(experts) / count, local=len(experts))
    return w.call(COMBINE, rows, order, w.region.gates, role="expert", chunk=chunk)


def _own(w: RegionWriter) -> tuple[Node, ...]:
    return w.region.weights


def _name(own: Node) -> str:
    return str(own.target).rpartition(".")[2]


def _seconds(weights: StreamedWeights, topology: Topology, tiers: Sequence[str]) -> float:
    """Return how long the streamed experts take from the slowest tier that they use."""
    links = topology.tiers(0)
    used = [links[tier] for tier in {tiers[e] for e in weights.streamed} if tier in links]
    return max((t["alpha_s"] + weights.bytes * t["beta_s_per_byte"] for t in used), default=0.0)
