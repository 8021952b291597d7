"""The simulated clock against closed forms; schedules and their lint; thousands of devices within the minute."""

import time
from dataclasses import replace

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import OptionError, PlanError
from moefx.passes.placement import ModelDims, Topology, place, synthesise
from moefx.passes.placement.predict import dispatch_bytes, predict
from moefx.passes.schedule import (
    COMM,
    COMPUTE,
    COPY,
    Exchange,
    LayerCost,
    Task,
    best_degree,
    critical_path,
    in_best_order,
    layer_costs,
    lint,
    order_digest,
    simulate,
    step_schedule,
)


def cost(
    exchange: float, experts: float, *, latency: float = 0.0, dense: float = 0.0, shared: float = 0.0
) -> LayerCost:
    one = np.ones(1)
    return LayerCost(dense * one, experts * one, shared * one, latency, exchange, exchange, 100.0, 10.0 * one)


def total(tasks: list[Task], devices: int = 1) -> float:
    return simulate(tasks, devices).total_s


# ------------------------------------------------------------------------------------------------------ closed forms


@given(seconds=st.lists(st.floats(0, 10), min_size=1, max_size=20))
def test_one_stream_takes_the_sum(seconds: list[float]) -> None:
    tasks = [Task(f"{i}", "dense", COMPUTE, s) for i, s in enumerate(seconds)]
    assert total(tasks) == pytest.approx(sum(seconds), abs=1e-12)


@given(chunks=st.integers(1, 12), a=st.floats(0.01, 5), g=st.floats(0.01, 20))
def test_a_pipeline_of_chunks_is_bound_by_its_exchanges_or_by_its_experts(chunks: int, a: float, g: float) -> None:
    """Exchanges of a/r, experts of g/r: r of each, dispatches first."""
    x, y = a / chunks, g / chunks
    wanted = max(2 * chunks * x, x + chunks * y + x, chunks * x + y + x)
    found = total(step_schedule([cost(a, g)], chunks=chunks))
    assert found == pytest.approx(wanted, rel=1e-9)


@given(slots=st.integers(1, 5), load=st.floats(0.1, 5), compute=st.floats(0.1, 5), layers=st.integers(6, 20))
def test_a_ring_of_slots_costs_the_slower_of_loading_and_computing(
    slots: int, load: float, compute: float, layers: int
) -> None:
    """Layer i is loaded into slot i mod K when layer i - K is done."""
    tasks = []
    for i in range(layers):
        free = (f"layer{i - slots}",) if i >= slots else ()
        tasks.append(Task(f"load{i}", "prefetch", COPY, load, free, deadline=f"layer{i}"))
        tasks.append(Task(f"layer{i}", "dense", COMPUTE, compute, (f"load{i}",)))
    serial = layers * (load + compute)
    overlapped = load + compute + (layers - 1) * max(load, compute)
    assert total(tasks) == pytest.approx(serial if slots == 1 else overlapped, rel=1e-9)
    late = [p for p in lint(tasks, 1) if p.kind == "deadline"]
    assert bool(late[1:]) == (slots == 1 or load > compute + 1e-12)


def test_a_collective_waits_for_the_slowest_device_and_others_do_not() -> None:
    work = Task("a", "dense", COMPUTE, np.array([1.0, 5.0, 2.0]))
    alone = Task("b", "dense", COMPUTE, 1.0, ("a",))
    together = Task("c", "dispatch", COMM, 0.5, ("a",), collective=True)
    line = simulate([work, alone, together], 3)
    assert line.end_s[1].tolist() == [2.0, 6.0, 3.0]
    assert line.end_s[2].tolist() == [5.5] * 3
    assert line.busy_s(COMM).tolist() == [0.5] * 3


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 30), devices=st.integers(1, 3))
def test_no_order_beats_the_bounds_and_list_scheduling_never_hurts(seed: int, count: int, devices: int) -> None:
    draws = np.random.default_rng(seed)
    tasks = []
    for i in range(count):
        after = tuple(f"{k}" for k in range(i) if draws.random() < 0.15)
        stream = (COMPUTE, COMM)[int(draws.integers(2))]
        tasks.append(Task(f"{i}", "dense", stream, draws.random(devices), after, collective=stream == COMM))
    line, better = simulate(tasks, devices), simulate(in_best_order(tasks), devices)
    lower = max(critical_path(tasks), *(float(line.busy_s(s).max()) for s in (COMPUTE, COMM)))
    assert lower <= better.total_s + 1e-12
    assert better.total_s <= line.total_s
    assert sorted(t.name for t in better.tasks) == sorted(t.name for t in tasks)
    assert not [p for p in lint(better.tasks, devices) if p.kind in ("order", "name", "stream")]
    graph = nx.DiGraph((name, task.name) for task in tasks for name in task.after)
    place_of = {task.name: n for n, task in enumerate(better.tasks)}
    assert all(place_of[a] < place_of[b] for a, b in graph.edges)


def test_overlap_hides_shared_experts_behind_exchanges() -> None:
    layers = [cost(2.0, 3.0, shared=3.5)] * 4
    apart, together = step_schedule(layers, overlap_shared=False), step_schedule(layers)
    assert total(apart) == pytest.approx(4 * (2 + 3 + 2 + 3.5))
    assert total(in_best_order(together)) == pytest.approx(4 * (3.5 + 3 + 2))


@given(latency=st.floats(0.001, 2), a=st.floats(0.1, 10), g=st.floats(0.1, 30))
def test_the_number_of_chunks_is_the_best_of_all(latency: float, a: float, g: float) -> None:
    def build(r: int) -> list[Task]:
        return step_schedule([cost(a, g, latency=latency)], chunks=r)

    degree, seconds = best_degree(build, 1)
    every = [total(in_best_order(build(r))) for r in (1, 2, 3, 4, 6, 8, 12, 16)]
    assert seconds == pytest.approx(min(every))
    assert total(in_best_order(build(degree))) == pytest.approx(min(every))


def test_latency_decides_against_chunks_and_length_for_them() -> None:
    assert best_degree(lambda r: step_schedule([cost(1.0, 1.0, latency=5.0)], chunks=r), 1)[0] == 1
    assert best_degree(lambda r: step_schedule([cost(50.0, 100.0, latency=0.01)], chunks=r), 1)[0] == 16
    with pytest.raises(OptionError, match="none to choose"):
        best_degree(lambda r: [], 1, ())
    with pytest.raises(OptionError, match="0 chunks"):
        step_schedule([], chunks=0)


def test_buffers_are_held_until_their_last_reader_is_done() -> None:
    tasks = [
        Task("a", "dispatch", COMM, 1.0, collective=True, holds_bytes=100.0),
        Task("b", "expert", COMPUTE, 2.0, ("a",), holds_bytes=np.array([7.0, 9.0])),
        Task("c", "dispatch", COMM, 5.0, ("a",), collective=True, holds_bytes=30.0),
        Task("d", "combine", COMM, 1.0, ("b", "c"), collective=True),
    ]
    assert simulate(tasks, 2).peak_bytes().tolist() == [137.0, 139.0]
    chained = [replace(t, after=("a", "b")) if t.name == "c" else t for t in tasks]
    assert simulate(chained, 2).peak_bytes().tolist() == [137.0, 139.0]  # a is read by c too
    apart = [replace(t, after=("b",)) if t.name == "c" else t for t in tasks]
    assert simulate(apart, 2).peak_bytes().tolist() == [107.0, 109.0]


# ---------------------------------------------------------------------------------------------- models and topologies


def problem(devices: int, kind: str = "drifting") -> tuple[ModelDims, object]:
    trace = synthesise(kind, levels=4, layers=3, experts=max(8, devices), samples=2, tokens=32)
    sizes = (4_000_000,) * 3
    return ModelDims(trace.layers, trace.experts, sizes, 0, (2048,) * 3, (6e6,) * 3), trace


@pytest.mark.parametrize("topology", [Topology.processes(4), Topology.node(8), Topology.cluster(2, 4)], ids=len)
def test_without_overlap_the_clock_shows_the_predicted_step(topology: Topology) -> None:
    dims, trace = problem(len(topology))
    placement = place(trace, topology, dims, "lpt")  # type: ignore[arg-type]
    predicted = predict(placement, trace, topology, dims)  # type: ignore[arg-type]
    for level in range(4):
        costs = layer_costs(placement, trace, topology, dims, level)  # type: ignore[arg-type]
        found = total(step_schedule(costs), len(topology))
        assert found == pytest.approx(float(predicted.step_s[level]), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(nodes=st.integers(1, 3), gpus=st.integers(1, 4), seed=st.integers(0, 999))
def test_sums_per_switch_equal_the_matrix_of_pairs(nodes: int, gpus: int, seed: int) -> None:
    topology = Topology.cluster(nodes, gpus)
    if len(topology) < 2:
        return
    received = np.random.default_rng(seed).random(len(topology)) * 1e6
    matrix = np.tile(received, (len(topology), 1))
    np.fill_diagonal(matrix, 0)
    exchange = Exchange.of(topology)
    assert exchange.levels
    for back, bytes_GG in ((False, matrix), (True, matrix.T)):
        found = exchange.latency_s + exchange.uniform(received, back=back)
        assert found == pytest.approx(topology.exchange_seconds(bytes_GG), rel=1e-9)
    assert exchange.pairs(matrix)[0] == pytest.approx(exchange.uniform(received), rel=1e-6)


def test_local_copies_first_are_priced_by_pairs() -> None:
    topology = Topology.node(4)
    dims, trace = problem(4)
    placement = place(trace, topology, dims, "lpt").model_copy(update={"local_first": True})  # type: ignore[arg-type]
    costs = layer_costs(placement, trace, topology, dims, 0)  # type: ignore[arg-type]
    bytes_GG = dispatch_bytes(placement, 0, trace.layer(0)[0], dims)  # type: ignore[attr-defined]
    assert costs[0].wire_bytes == pytest.approx(bytes_GG.sum())
    assert costs[0].latency_s + costs[0].dispatch_s == pytest.approx(topology.exchange_seconds(bytes_GG))


def test_thousands_of_devices_take_less_than_a_minute() -> None:
    """4,096 devices, 64 layers, 256 experts with sixteen copies each: building, ordering and simulating a step."""
    begin = time.perf_counter()
    nodes, gpus, layers, experts = 512, 8, 64, 256
    topology = Topology.cluster(nodes, gpus)
    exchange, draws = Exchange.of(topology), np.random.default_rng(0)
    home = np.arange(nodes * gpus) % experts
    costs = []
    for _ in range(layers):
        load_E = draws.gamma(2.0, 500.0, experts)
        rows_G = load_E[home] / (nodes * gpus // experts)
        sent_G = rows_G * 6144 / len(topology)
        out, back = exchange.uniform(sent_G), exchange.uniform(sent_G, back=True)
        work_G = rows_G * 5e8 / topology.flops_per_s
        wire = float(sent_G.sum()) * (len(topology) - 1)
        costs.append(LayerCost(work_G, work_G, work_G, exchange.latency_s, out, back, wire, rows_G * 6144))
    degree, seconds = best_degree(lambda r: step_schedule(costs, chunks=r), len(topology), (1, 2, 4))
    line = simulate(in_best_order(step_schedule(costs, chunks=degree)), len(topology))
    assert line.total_s == pytest.approx(seconds)
    assert line.peak_bytes().shape == (4096,)
    assert time.perf_counter() - begin < 60


def test_too_many_devices_on_an_unknown_kind_of_network_is_an_error() -> None:
    with pytest.raises(PlanError, match="nested switches"):
        Exchange.of(Topology.processes(70))
    with pytest.raises(PlanError, match="pair to pair"):
        Exchange.of(Topology.cluster(16, 8)).pairs(np.zeros((128, 128)))


# --------------------------------------------------------------------------------------------------------------- lint


def test_lint_finds_what_would_hang_be_late_or_not_fit() -> None:
    good = step_schedule([cost(1.0, 2.0, shared=1.0)] * 2, chunks=2)
    assert lint(good, 1, memory_bytes=1e6) == []
    kinds = {
        "memory": lint(good, 1, memory_bytes=9.0),
        "wait": lint([replace(t, after=()) if t.role == "expert" else t for t in good], 1),
        "pair": lint([t for t in good if t.name != "combine1.1"], 1),
        "order": lint(list(reversed(good)), 1),
        "name": lint([*good, good[-1]], 1),
        "stream": lint([replace(good[0], stream="other"), *good[1:]], 1),
        "deadline": lint(
            [Task("load", "prefetch", COPY, 9.0, deadline="x"), Task("x", "dense", COMPUTE, 1.0, ("load",))], 1
        ),
    }
    for kind, problems in kinds.items():
        assert kind in {p.kind for p in problems}, kind
    assert "device 0 holds" in str(kinds["memory"][0])
    with pytest.raises(PlanError, match="not all of them earlier"):
        simulate(list(reversed(good)), 1)
    with pytest.raises(PlanError, match="one name"):
        simulate([*good, good[0]], 1)


def test_ranks_agree_on_the_order_of_collectives_alone() -> None:
    tasks = step_schedule([cost(1.0, 2.0)] * 2, chunks=2)
    slower = [replace(t, seconds=9.0) for t in tasks]
    swapped = [tasks[0], tasks[2], tasks[1], *tasks[3:]]
    assert [t.role for t in swapped[1:3]] == ["dispatch", "dispatch"]
    assert order_digest(tasks) == order_digest(slower) != order_digest(swapped)
