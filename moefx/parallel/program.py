"""A model on many ranks as one graph per rank: priced, ordered and checked before it runs.

Legend: E experts, G ranks, K slots per token, T tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from moefx import graph as graphs
from moefx.errors import MoefxError, PlanError
from moefx.graph import Graph
from moefx.graph.signature import Inputs
from moefx.parallel.agree import text_digest
from moefx.parallel.lower import Plan, Rank, divide_experts
from moefx.parallel.parallelize import _agree_everywhere, _groups, parallel_layers, parallelize
from moefx.parallel.regions import find_regions
from moefx.parallel.roster import Roster
from moefx.parallel.steps import CopiedWeights
from moefx.passes.placement import ModelDims, Placement, RoutingTrace, Topology, routed_layers
from moefx.passes.placement.stacks import stack_of
from moefx.passes.schedule import LayerCost, Task, Timeline, order_digest, simulate
from moefx.passes.schedule.graph_lint import lint_graph
from moefx.passes.schedule.graph_tasks import order_graph, tasks_of
from moefx.passes.schedule.price import price_graph, region_costs
from moefx.routing.experts import Experts

DEGREES = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True, eq=False)
class Scheduled:
    """The graph of one rank under one layout.

    Args:
        graph: what is executed; its marks are what is simulated and checked.
        tasks: its marked nodes, in order.
        chunks: parts of the tokens, of which one travels while another is computed.
        before: time on the clock in the order in which it was written.
        timeline: on the clock, in the order in which it runs.
    """

    graph: Graph
    tasks: tuple[Task, ...]
    chunks: int
    before: Timeline
    timeline: Timeline


class Program(nn.Module):
    """A parallel model that runs as a scheduled graph; called like the model.

    Attributes:
        model: the parallel model; parameters, gradients, checkpoints and :func:`switch` go on as without the graph.
        placement: where the experts live.
        scheduled: one graph per layout of the placement.
    """

    def __init__(self, model: nn.Module, placement: Placement, scheduled: Sequence[Scheduled]) -> None:
        super().__init__()
        self.model, self.placement, self.scheduled = model, placement, tuple(scheduled)
        layouts = placement.layouts
        self._rosters = [[Roster.of(layout, i) for i in range(len(placement.layers))] for layout in layouts]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the layout in force. A collective."""
        return self.current.graph(*args, **kwargs)

    @property
    def current(self) -> Scheduled:
        """The graph of the layout in force.

        Raises:
            PlanError: the model was switched to a layout that is not the placement's.
        """
        now = [layer.roster for layer in parallel_layers(self.model).values()]
        for rosters, scheduled in zip(self._rosters, self.scheduled, strict=True):
            if rosters == now:
                return scheduled
        raise PlanError(
            "run a scheduled graph",
            found="a layout of the experts that the placement does not have",
            do="schedule the model with a placement that has it as a window",
        )


def schedule(
    model: nn.Module,
    mesh: DeviceMesh | None,
    placement: Placement,
    inputs: Inputs = None,
    *,
    topology: Topology | None = None,
    trace: RoutingTrace | None = None,
    chunks: int | None = None,
    once: bool = False,
    memory_bytes: float | None = None,
    verify: bool = True,
) -> Program:
    """Divide the experts of ``model`` as :func:`parallelize` does, in place, and write each rank's step as a graph.

    In the graph every exchange is a launch and a wait, and the order of nodes is what a simulated clock finds best: so
    shared experts, attention of other parts and whatever else does not need the rows runs while they travel. The same
    graph is simulated, checked and executed. Call it on every rank, with inputs of the same shapes on all.

    Results and gradients equal the model's. Auxiliary losses are not part of the graph: train with them on the model.

    Args:
        model: a model with routed FFNs, from :func:`moefx.transform`.
        mesh: see :func:`parallelize`.
        placement: where the experts live.
        inputs: an example of what each rank will get.
        topology: the devices, for the clock; unlimited computing on one bus by default.
        trace: how rows divide among experts; evenly by default.
        chunks: parts of the tokens; the fastest number on the clock by default.
        once: send a token to each rank at most once.
        memory_bytes: that each device has for activations and buffers.
        verify: see :func:`parallelize`.

    Raises:
        PlanError: the graph cannot be divided, fails a check, or ranks would make different collectives. Raised on all
            ranks; what :func:`parallelize` refuses changes nothing.
    """
    asked = f"schedule {type(model).__name__}"
    group, data = _groups(mesh, asked)
    problem: MoefxError | None = None
    prepared: _Maker | None = None
    try:
        prepared = _Maker.of(model, inputs, topology or Topology.processes(len(placement.devices)), trace, once)
    except MoefxError as error:
        problem = error
    _agree_everywhere(asked, {}, problem, [group, data])
    assert prepared is not None
    parallelize(model, mesh, placement, once=once, verify=verify)
    made: list[Scheduled] = []
    orders = bytes(32)
    try:
        degrees = DEGREES if chunks is None else (chunks,)
        made = [prepared.best(model, placement, layout, degrees) for layout in placement.layouts]
        problems = [p for one in made for p in lint_graph(one.graph, len(prepared.topology), memory_bytes=memory_bytes)]
        if problems:
            raise PlanError(asked, found="; ".join(map(str, problems)), do="give more memory, or report this schedule")
        orders = text_digest(repr([order_digest(one.tasks) for one in made]))
    except MoefxError as error:
        problem = error
    _agree_everywhere(asked, {"the orders of collectives": orders}, problem, [group, data])
    return Program(model, placement, made)


@dataclass(frozen=True, eq=False)
class _Maker:
    """What is known of a model before its experts are divided, from which the graph of any layout is written.

    Args:
        graph: of the whole model, priced.
        paths: of the modules of experts, by layer.
        rows: (token, slot) pairs of each layer on one rank.
        topology: the devices.
        dims: sizes of experts and rows.
        trace: how rows divide among experts, or None.
        once: send a token to each rank at most once.
    """

    graph: Graph
    paths: tuple[str, ...]
    rows: tuple[int, ...]
    topology: Topology
    dims: ModelDims
    trace: RoutingTrace | None
    once: bool

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, topology: Topology, trace: RoutingTrace | None, once: bool) -> _Maker:
        """Capture and price a whole model."""
        paths = tuple(f"{name}.{stack_of(layer).path}" for name, layer in routed_layers(model).items())
        graph = capture(model, inputs)
        price_graph(graph, topology)
        rows = tuple(int(region.experts.meta["val"].numel()) for region in find_regions(graph, paths))
        return cls(graph, paths, rows, topology, ModelDims.of(model), trace, once)

    def best(self, model: nn.Module, whole: Placement, layout: Placement, degrees: Sequence[int]) -> Scheduled:
        """Return the graph of one layout with the number of chunks that is fastest on the clock."""
        costs = self._costs(whole, layout)
        made = [self._written(model, layout, costs, r) for r in degrees]
        least = min(one.timeline.total_s for one in made)
        return next(one for one in made if one.timeline.total_s <= least * (1 + 1e-12))

    def _written(self, model: nn.Module, layout: Placement, costs: list[LayerCost], chunks: int) -> Scheduled:
        layers, graph = list(parallel_layers(model).values()), self.graph.copy()
        rosters = [Roster.of(layout, i) for i in range(len(layers))]
        rank = Rank(layers[0].rank, layers[0].group)
        senders = {
            path: CopiedWeights.of(layer, roster)
            for path, layer, roster in zip(self.paths, layers, rosters, strict=True)
        }
        divide_experts(graph, self.paths, rosters, rank, Plan(chunks, self.once), costs, senders)
        before = simulate(tasks_of(graph), len(self.topology))
        tasks = order_graph(graph)
        return Scheduled(graph, tuple(tasks), chunks, before, simulate(tasks, len(self.topology)))

    def _costs(self, whole: Placement, layout: Placement) -> list[LayerCost]:
        """Return the costs of a layout at the middle of the noise levels that it serves."""
        level = 0
        if self.trace is not None:
            index = whole.layouts.index(layout)
            served = [i for i, sigma in enumerate(self.trace.sigmas) if whole.layout_at(float(sigma)) == index]
            level = served[len(served) // 2] if served else 0
        ranks = len(self.topology)
        return region_costs(layout, self.topology, self.dims, lambda i: self.rows[i] * ranks, self.trace, level)


def capture(model: nn.Module, inputs: Inputs) -> Graph:
    """Return the graph of a model with the operators of its routed FFNs, experts that choose tokens by tokens too."""
    with _by_token(model):
        return graphs.trace(model, inputs, leaf="torch")


@contextmanager
def _by_token(model: nn.Module) -> Iterator[None]:
    experts = [module for module in model.modules() if isinstance(module, Experts) and "by_expert" not in vars(module)]
    for module in experts:
        module.__dict__["by_expert"] = None
    try:
        yield
    finally:
        for module in experts:
            del module.__dict__["by_expert"]
