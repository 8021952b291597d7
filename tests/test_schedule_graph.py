"""Schedules as graphs: equal to one process on two, ordered by the clock, and refused when something is planted."""

import json
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import pytest
import torch
from torch import nn
from torch.fx import Node

from moefx.errors import PlanError
from moefx.graph import Graph
from moefx.graph.splice import is_inplace
from moefx.parallel.loads import begin_load, evict
from moefx.parallel.lower import divide_experts
from moefx.parallel.program import capture
from moefx.parallel.regions import find_regions
from moefx.parallel.roster import Roster
from moefx.parallel.streamed import schedule_streamed
from moefx.parallel.writer import Plan, Rank
from moefx.passes.placement import ModelDims, Placement, Topology
from moefx.passes.schedule import COMM, COPY, Mark, lint_graph, mark_of, order_graph, set_mark, simulate, tasks_of
from moefx.passes.schedule.price import price_graph, region_costs
from moefx.routing import DenseFFN, random_weights
from tests import schedule_worker
from tests.placement_worker import WIDTH, Net
from tests.ranks import run

ROOT = Path(__file__).resolve().parent.parent
EQUAL = 1e-10
EXAMPLE = torch.zeros(1, 16, WIDTH, dtype=torch.float64)
HOMES = ((0, 1, 1, 0, 1, 0), (1, 0, 1, 1, 1, 0))


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    out = tmp_path / "numbers.json"
    run(schedule_worker.main, 2, out)
    results: dict[str, dict[str, float]] = json.loads(out.read_text())
    assert len(results) >= 6
    for name, numbers in results.items():
        assert numbers, f"{name} measured nothing"
        assert all(value <= EQUAL for value in numbers.values()), (name, numbers)


# ------------------------------------------------------------------------------------------- graphs without processes


def divided(chunks: int = 2, rank: int = 0, homes: tuple[tuple[int, ...], ...] = HOMES) -> Graph:
    """Return the graph of one rank of two, which is not executed here."""
    net, draws = Net(torch.float64), torch.Generator().manual_seed(3)
    for ffn in net.ffns:
        ffn.shared = DenseFFN(random_weights(WIDTH, 10, generator=draws), nn.functional.gelu).double()
    devices = [{"name": n, "flops_per_s": 1e7, "memory_bytes_per_s": 1e9} for n in ("a", "b")]
    links = [{"from": a, "to": b, "alpha_s": 1e-5, "beta_s_per_byte": 1e-7} for a, b in (("a", "b"), ("b", "a"))]
    topology = Topology.from_dict({"devices": devices, "links": links})
    layers = ("ffns.0", "ffns.1")
    placement = Placement(
        strategy="by hand", devices=("a", "b"), layers=layers, primary=homes, objective=1.0, bound=1.0, balanced=1.0
    )
    graph = capture(net, (torch.zeros(1, 16, WIDTH, dtype=torch.float64),))
    price_graph(graph, topology)
    costs = region_costs(placement, topology, ModelDims.of(net), lambda _: 64.0)
    rosters = [Roster.of(placement, i) for i in range(2)]
    divide_experts(graph, [f"{n}.experts" for n in layers], rosters, Rank(rank, "none"), Plan(chunks), costs)
    return graph


def node_of(graph: Graph, role: str, *, begins: bool = False, waits: bool = False) -> Node:
    return next(n for n in graph.nodes if (m := mark_of(n)) and (m.role, m.begins, m.waits) == (role, begins, waits))


def kinds(graph: Graph, **options: float) -> set[str]:
    return {problem.kind for problem in lint_graph(graph, 2, **options)}


def test_the_clock_shortens_the_step_and_keeps_every_node() -> None:
    graph = divided(chunks=2)
    names, before = {n.name for n in graph.nodes}, simulate(tasks_of(graph), 2)
    tasks = order_graph(graph)
    after = simulate(tasks, 2)
    assert {n.name for n in graph.nodes} == names
    assert after.total_s < before.total_s
    assert after.total_s >= after.busy_s(COMM).max()
    assert not lint_graph(graph, 2)
    # In-place statistics of a layer still follow what they are made of, and each other.
    records = [n for n in graph.nodes if n.target in ("copy_", "add_")]
    assert len(records) == 8
    assert {n.target for n in graph.nodes if is_inplace(n)} == {"copy_", "add_"}  # not the operator and_
    wire = sum(m.wire_bytes for n in graph.nodes if (m := mark_of(n)))
    assert wire == pytest.approx(2 * 2 * 64 / 2 * WIDTH * 8)  # there and back, two layers, half of the rows move


def test_ranks_write_the_same_collectives() -> None:
    graphs = [divided(chunks=3, rank=r, homes=((0,) * 6, (1, 0, 1, 1, 1, 0))) for r in (0, 1)]
    named = [[n.name for n in g.nodes if (m := mark_of(n)) and m.collective] for g in graphs]
    assert named[0] == named[1]
    ordered = [[t.name for t in order_graph(g) if t.collective] for g in graphs]
    assert ordered[0] == ordered[1]


def forget_a_wait(graph: Graph) -> None:
    wait = node_of(graph, "dispatch", waits=True)
    wait.replace_all_uses_with(node_of(graph, "map"), delete_user_cb=lambda user: user is not wait)
    graph.fx.erase_node(wait)


def wait_twice(graph: Graph) -> None:
    wait = node_of(graph, "combine", waits=True)
    with graph.fx.inserting_after(wait):
        graph.fx.node_copy(wait)


def read_too_early(graph: Graph) -> None:
    flight, wait = (node_of(graph, "dispatch", **how) for how in ({"begins": True}, {"waits": True}))
    user = next(iter(wait.users))
    user.replace_input_with(wait, flight)


def wait_for_nothing(graph: Graph) -> None:
    wait = node_of(graph, "dispatch", waits=True)
    wait.args = (node_of(graph, "map"), *wait.args[1:])


def compute_before_its_inputs(graph: Graph) -> None:
    flight = node_of(graph, "combine", begins=True)
    flight.append(node_of(graph, "dispatch", waits=True))


def prefetch_late(graph: Graph) -> None:
    """Weights that are needed at once and take longer than all before them."""
    user = node_of(graph, "expert")
    weight = user.all_input_nodes[0]
    with graph.fx.inserting_before(user):
        load = graph.fx.call_function(torch.clone, (weight,))
        done = graph.fx.call_function(torch.clone, (load,))
    set_mark(load, Mark("prefetch", COPY, 10.0, begins=True, deadline=done.name))
    set_mark(done, Mark("prefetch", waits=True))
    user.replace_input_with(weight, done)


def use_after_eviction(graph: Graph) -> None:
    source = node_of(graph, "expert")
    with graph.fx.inserting_after(source):
        gone = graph.fx.call_function(id, (source,))
    set_mark(gone, Mark("evict", COPY))


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (forget_a_wait, "wait"),
        (wait_twice, "wait"),
        (read_too_early, "early"),
        (wait_for_nothing, "wait"),
        (compute_before_its_inputs, "order"),
        (prefetch_late, "deadline"),
        (use_after_eviction, "evict"),
    ],
)
def test_lint_finds_what_is_planted(fault: Callable[[Graph], None], kind: str) -> None:
    graph = divided()
    assert kinds(graph) == set()
    fault(graph)
    assert kind in kinds(graph)


def test_lint_finds_the_moment_at_which_memory_is_too_small() -> None:
    graph = divided()
    peak = float(simulate(tasks_of(graph), 2).peak_bytes().max())
    assert kinds(graph, memory_bytes=peak) == set()
    assert kinds(graph, memory_bytes=peak - 1) == {"memory"}


def test_a_layer_that_runs_twice_or_in_another_form_is_refused() -> None:
    net = Net(torch.float64)
    graph = capture(net, (torch.zeros(1, 4, WIDTH, dtype=torch.float64),))
    with pytest.raises(PlanError, match="0 times"):
        find_regions(graph, ["ffns.0.experts", "elsewhere.experts"])
    net.ffns[1] = net.ffns[0]
    graph = capture(net, (torch.zeros(1, 4, WIDTH, dtype=torch.float64),))
    with pytest.raises(PlanError, match="2 times"):
        find_regions(graph, ["ffns.0.experts"])


# --------------------------------------------------------------------------------------------------- memory tiers


def two_tiers(beta: float) -> Topology:
    graph = nx.DiGraph()
    graph.add_node("device", flops_per_s=1e7, memory_bytes_per_s=1e9)
    graph.add_node("host", kind="memory", tier="host")
    graph.add_edge("host", "device", alpha_s=1e-6, beta_s_per_byte=beta, resource="bus")
    return Topology(graph)


def with_tiers(*tiers: str) -> Placement:
    """Layer by layer: ``h`` an expert in host memory, ``d`` one on the device."""
    names = tuple(tuple({"h": "host", "d": "device"}[c] for c in row) for row in tiers)
    return Placement(
        strategy="by hand", devices=("device",), layers=tuple(f"ffns.{i}" for i in range(len(tiers))),
        primary=((0,) * 6,) * len(tiers), tiers=names, objective=1.0, bound=1.0, balanced=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("gated", [False, True])
def test_streamed_experts_equal_resident_ones_and_return(gated: bool) -> None:
    whole, net = (Net(torch.float64, gated=gated) for _ in range(2))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    program = schedule_streamed(net, with_tiers("hhdhdd", "hhhhhh"), (EXAMPLE,), topology=two_tiers(1e-9), ahead=1)
    assert net.ffns[1].experts.w_in.numel() == 0
    for tokens in (16, 5):
        x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(program(x), whole(x), rtol=1e-12, atol=1e-12)
        assert [weights.held for weights in program.weights] == [0, 0]
    targets = [n.target for n in program.graph.nodes if n.target in (begin_load, evict)]
    assert targets == [begin_load, evict, begin_load, evict]  # room for one layer: the second waits for the first
    program.restore()
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_loads_are_begun_early_where_there_is_room_and_late_ones_are_named() -> None:
    plan = with_tiers("hhdhdd", "hhhhhh")
    for beta, late in ((1e-12, 0), (1e-3, 2)):
        program = schedule_streamed(Net(torch.float64), plan, (EXAMPLE,), topology=two_tiers(beta), ahead=2)
        order = [n.target for n in program.graph.nodes]
        assert order.index(begin_load) < order.index(torch.ops.moefx.group.default)
        second = [i for i, target in enumerate(order) if target is begin_load][1]
        assert second < order.index(evict)  # the second layer is on its way while the first computes
        assert len(program.late) == late
        assert {p.kind for p in program.late} <= {"deadline"}
    with pytest.raises(PlanError, match="0 layers"):
        schedule_streamed(Net(torch.float64), plan, (EXAMPLE,), topology=two_tiers(1e-9), ahead=0)
    bare = plan.model_copy(update={"tiers": ()})
    with pytest.raises(PlanError, match="tiers 0"):
        schedule_streamed(Net(torch.float64), bare, (EXAMPLE,), topology=two_tiers(1e-9))
