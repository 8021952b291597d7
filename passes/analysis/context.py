"""What every matcher needs to know about one graph, computed once."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from torch.fx import Node

from moefx.graph.kinds import shape
from moefx.passes.analysis.conditioning import Classes
from moefx.passes.analysis.flow import Flow
from moefx.passes.analysis.hidden import Hiddens
from moefx.passes.analysis.lanes import Lanes
from moefx.passes.analysis.modules import Modules, Place
from moefx.passes.analysis.site import Role
from moefx.passes.analysis.streams import Streams

if TYPE_CHECKING:
    from moefx.graph import Graph


class Context:
    """Shared facts about one version of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.flow = Flow(graph)
        self.lanes = Lanes(self.flow)
        self.streams = Streams(self.flow)
        self.modules = Modules(self.flow)
        self._names: dict[str, int] = {}

    @cached_property
    def hiddens(self) -> Hiddens:
        """What every value is made of."""
        return Hiddens(self.flow, self.lanes)

    @cached_property
    def classes(self) -> Classes:
        """What every value depends on."""
        return Classes(self.flow, self.streams)

    def role(self, branch: Node, stream: Node) -> Role:
        """Return the role of a branch of a residual stream, from where they end and what they depend on."""
        if branch in self.streams.aligned or stream in self.streams.aligned:
            return "main"
        found = self.classes.of(stream)
        if "tokens" in found:
            return "context"
        if "text" in found:
            return "refiner"
        return "conditioning" if found & {"timestep", "label"} else "side"

    def per_sample(self, node: Node) -> bool:
        """Whether ``node`` holds one vector or number per sample: shape ``[B]``, ``[B, D]`` or ``[B, 1, ..., D]``."""
        sizes = shape(node)
        return sizes is not None and len(sizes) >= 1 and all(size == 1 for size in sizes[1:-1])

    def name(self, place: Place, suffix: str) -> str:
        """Return a unique site name."""
        wanted = place.name if place.is_module else f"{place.name}:{suffix}"
        count = self._names[wanted] = self._names.get(wanted, 0) + 1
        return wanted if count == 1 else f"{wanted}.{count}"
