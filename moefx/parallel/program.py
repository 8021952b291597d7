"""A model on many ranks as one graph per rank: priced, ordered and checked before it runs.

Legend: E experts, G ranks, K slots per token, T tokens of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]

from moefx import graph as graphs
from moefx.errors import MoefxError, PlanError
from moefx.graph import Graph
from moefx.graph.signature import Inputs
from moefx.parallel.agree import agree, text_digest
from moefx.parallel.divided import DividedExperts
from moefx.parallel.lower import divide_experts
from moefx.parallel.memory import Memory
from moefx.parallel.parallelize import agree_everywhere, find_groups, parallel_layers, parallelize
from moefx.parallel.regions import find_regions
from moefx.parallel.roster import Roster
from moefx.parallel.steps import CopiedWeights
from moefx.parallel.writer import Plan, Rank
from moefx.passes.placement import ModelDims, Placement, RoutingTrace, Topology, routed_layers
from moefx.passes.placement.stacks import stack_of
from moefx.passes.schedule import CapacityTable, LayerCost, Task, Timeline, order_digest, simulate
from moefx.passes.schedule.graph_lint import lint_graph
from moefx.passes.schedule.graph_tasks import order_graph, tasks_of
from moefx.passes.schedule.price import price_graph, region_costs
from moefx.routing.experts import Experts

DEGREES = (1, 2, 3, 4, 6, 8)
EXACT, FIRST = "exact", "first"


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
    """A parallel model that runs as scheduled graphs; called like the model.

    Attributes:
        model: the parallel model; parameters, gradients, checkpoints and :func:`switch` go on as without the graph.
        placement: where the experts live.
        variants: graphs by layout of the placement and by way of tokens.
        measured: largest relative error of an approximate way on the inputs it was measured on; 0 for exact ones.
    """

    def __init__(self, model: nn.Module, placement: Placement, maker: Maker, memory_bytes: float | None) -> None:
        super().__init__()
        self.model, self.placement, self.maker = model, placement, maker
        self.memory_bytes = memory_bytes
        self.variants: dict[tuple[int, str], Scheduled] = {}
        self.capacity: CapacityTable | None = None
        self.repeated, self.every, self.measured = "", 0, 0.0
        layouts = placement.layouts
        self._rosters = [[Roster.of(layout, i) for i in range(len(placement.layers))] for layout in layouts]
        self._memories = [[Memory() for _ in placement.layers] for _ in layouts]
        self._range, self._since, self._layout = 0, 0, 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph of the layout in force. A collective.

        Raises:
            PlanError: approximate steps were asked for gradients, or the layout has no graph.
        """
        if self.measured and torch.is_grad_enabled():
            raise PlanError(
                f"compute gradients through {self.repeated} steps",
                found="choices and results of other steps, which have no gradient",
                do="run under torch.no_grad(), or train an exact program",
            )
        out = self.current.graph(*args, **kwargs)
        self._since += 1
        return out

    @property
    def current(self) -> Scheduled:
        """The graph that the next call runs."""
        layout = self._layout_in_force()
        if layout != self._layout:
            self.forget()
            self._layout = layout
        if self.capacity is not None:
            return self.variants[layout, f"capacity {self._range}"]
        if not self.repeated:
            return self.variants[layout, EXACT]
        anew = not self._since or (self.every and self._since % self.every == 0)
        lost = any(memory.overflowed for memory in self._memories[layout])
        return self.variants[layout, FIRST if anew or lost else self.repeated]

    @property
    def exact(self) -> Scheduled:
        """The graph of the layout in force that depends on no other step."""
        return self.variants[self._layout_in_force(), EXACT]

    def forget(self) -> None:
        """Begin another batch: the next step does not go on from the last. Call it on every rank."""
        self._since = 0
        for memories in self._memories:
            for memory in memories:
                memory.forget()

    @contextmanager
    def at(self, sigma: float) -> Iterator[Program]:
        """Use the sizes of messages for noise level ``sigma`` inside the block; without, those of the first range."""
        before = self._range
        self._range = 0 if self.capacity is None else self.capacity.range_at(sigma)
        try:
            yield self
        finally:
            self._range = before

    def add(self, way: str, plan: Plan, degrees: Sequence[int] = (1,)) -> None:
        """Write, order and check the graphs of one more way of tokens, for every layout. A collective.

        Raises:
            PlanError: a graph fails a check, or ranks would make different collectives. Raised on all ranks.
        """
        asked = f"schedule {type(self.model).__name__}"
        problem, orders, made = None, bytes(32), dict[tuple[int, str], Scheduled]()
        layers = list(parallel_layers(self.model).values())
        try:
            for i, layout in enumerate(self.placement.layouts):
                one = replace(plan, memories=self._memories[i])
                made[i, way] = self.maker.best(layers, self.placement, layout, one, degrees)
            self._check([one.graph for one in made.values()], asked)
            orders = text_digest(repr([order_digest(one.tasks) for one in made.values()]))
        except MoefxError as error:
            problem = error
        group = _resolve_process_group(cast(Any, layers[0].group))
        agree(asked, {"the orders of collectives": orders}, problem, layers[0].slot_bounds.device.type, group)
        self.variants |= made

    def _check(self, graphs: Sequence[Graph], asked: str) -> None:
        devices = len(self.maker.topology)
        problems = [p for graph in graphs for p in lint_graph(graph, devices, memory_bytes=self.memory_bytes)]
        if problems:
            raise PlanError(asked, found="; ".join(map(str, problems)), do="give more memory, or report this schedule")

    def _layout_in_force(self) -> int:
        now = [layer.roster for layer in parallel_layers(self.model).values()]
        if now not in self._rosters:
            raise PlanError(
                "run a scheduled graph",
                found="a layout of the experts that the placement does not have",
                do="schedule the model with a placement that has it as a window",
            )
        return self._rosters.index(now)


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
    capacity: CapacityTable | None = None,
    changes: NDArray[np.int64] | None = None,
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
        capacity: send messages of fixed sizes, from :func:`capacity_table`: no number of a routing decision is waited
            for before the exchange. Rows that do not fit follow in a second one. Run each step inside ``at(sigma)``.
        changes: send rows where they went in the step before, and those whose choice changed in a second message with
            so many places, from :func:`changed_table`. Call ``forget()`` where another batch begins.
        memory_bytes: that each device has for activations and buffers.
        verify: see :func:`parallelize`.

    Raises:
        PlanError: the graph cannot be divided, fails a check, or ranks would make different collectives. Raised on all
            ranks; what :func:`parallelize` refuses changes nothing.
    """
    asked = f"schedule {type(model).__name__}"
    group, data = find_groups(mesh, asked)
    problem: MoefxError | None = None
    maker: Maker | None = None
    try:
        maker = Maker.of(model, inputs, topology or Topology.processes(len(placement.devices)), trace)
    except MoefxError as error:
        problem = error
    agree_everywhere(asked, {}, problem, [group, data])
    assert maker is not None
    parallelize(model, mesh, placement, verify=verify)
    program = Program(model, placement, maker, memory_bytes)
    if capacity is None and changes is None:
        program.add(EXACT, Plan(way="once" if once else "slots"), DEGREES if chunks is None else (chunks,))
    if capacity is not None:
        for i, caps in enumerate(capacity.rows.tolist()):
            program.add(f"capacity {i}", Plan(way="capacity", caps=caps))
        program.capacity = capacity
    if changes is not None:
        program.add(FIRST, Plan(way="first"))
        program.add("delta", Plan(way="delta", caps=changes.tolist()))
        program.repeated = "delta"
    return program


@dataclass(frozen=True, eq=False)
class Maker:
    """What is known of a model before its experts are divided, from which the graph of any layout is written.

    Args:
        graph: of the whole model, priced.
        paths: of the modules of experts, by layer.
        rows: (token, slot) pairs of each layer on one rank.
        topology: the devices.
        dims: sizes of experts and rows.
        trace: how rows divide among experts, or None.
    """

    graph: Graph
    paths: tuple[str, ...]
    rows: tuple[int, ...]
    topology: Topology
    dims: ModelDims
    trace: RoutingTrace | None

    @classmethod
    def of(cls, model: nn.Module, inputs: Inputs, topology: Topology, trace: RoutingTrace | None) -> Maker:
        """Capture and price a whole model."""
        paths = tuple(f"{name}.{stack_of(layer).path}" for name, layer in routed_layers(model).items())
        graph = capture(model, inputs)
        price_graph(graph, topology)
        rows = tuple(int(region.experts.meta["val"].numel()) for region in find_regions(graph, paths))
        return cls(graph, paths, rows, topology, ModelDims.of(model), trace)

    def best(
        self,
        layers: Sequence[DividedExperts],
        whole: Placement,
        layout: Placement,
        plan: Plan,
        degrees: Sequence[int] = DEGREES,
    ) -> Scheduled:
        """Return the graph of one layout with the number of chunks that is fastest on the clock.

        Args:
            layers: divided experts; none for a graph of rank 0 to look at.
            whole: the placement.
            layout: one of its layouts.
            plan: how tokens travel.
            degrees: numbers of chunks to try.
        """
        costs = self._costs(whole, layout)
        made = [self._written(layers, layout, costs, replace(plan, chunks=r)) for r in degrees]
        least = min(one.timeline.total_s for one in made)
        return next(one for one in made if one.timeline.total_s <= least * (1 + 1e-12))

    def _written(
        self, layers: Sequence[DividedExperts], layout: Placement, costs: list[LayerCost], plan: Plan
    ) -> Scheduled:
        graph = self.graph.copy()
        rosters = [Roster.of(layout, i) for i in range(len(self.paths))]
        rank = Rank(layers[0].rank, layers[0].group) if layers else Rank(0, "")
        senders = {
            path: CopiedWeights.of(layers[i] if layers else None, roster, rank.number)
            for i, (path, roster) in enumerate(zip(self.paths, rosters, strict=True))
        }
        divide_experts(graph, self.paths, rosters, rank, plan, costs, senders)
        before = simulate(tasks_of(graph), len(self.topology))
        tasks = order_graph(graph)
        return Scheduled(graph, tuple(tasks), plan.chunks, before, simulate(tasks, len(self.topology)))

    def _costs(self, whole: Placement, layout: Placement) -> list[LayerCost]:
        """Return the costs of a layout at the middle of the noise levels that it serves."""
        level = 0
        if self.trace is not None:
            index = whole.layouts.index(layout)
            served = [i for i, sigma in enumerate(self.trace.sigmas) if whole.layout_at(float(sigma)) == index]
            level = served[len(served) // 2] if served else 0
        ranks = len(self.topology)
        return region_costs(layout, self.topology, self.dims, lambda i: self.rows[i] * ranks, self.trace, level)


def preview(
    model: nn.Module,
    placement: Placement,
    inputs: Inputs = None,
    *,
    topology: Topology,
    trace: RoutingTrace | None = None,
    chunks: int | None = None,
) -> Scheduled:
    """Return the graph of the first layout on rank 0 as :func:`schedule` would order it, without any process.

    The model may be on ``meta``; the graph is to be looked at and simulated, not run.
    """
    maker = Maker.of(model, inputs, topology, trace)
    layout = placement.layouts[0]
    return maker.best((), placement, layout, Plan(), DEGREES if chunks is None else (chunks,))


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
