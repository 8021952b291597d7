"""Strategies: valid, never worse than the balanced greedy by their own goal, near exact optima and known values."""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import PlanError
from moefx.passes.placement import (
    Budget,
    ModelDims,
    Placement,
    RoutingTrace,
    Strategy,
    Topology,
    place,
    strategies,
    synthesise,
    trace_of_choices,
)
from moefx.passes.placement.goals import GOALS, Problem
from moefx.passes.placement.migration import moves
from moefx.passes.placement.objective import layer_cost
from moefx.passes.placement.predict import predict
from tests.placement_digits import digits_trace
from tests.placement_instances import affinity_instance, dims_of, exact_load, exact_stay, imbalance, stay

ALL = strategies()
QUICK = Budget(restarts=1)


def random_trace(levels: int, layers: int, experts: int, seed: int) -> RoutingTrace:
    draws = np.random.default_rng(seed)
    scores = draws.gumbel(size=(levels, 2, 9, layers, experts)) + 2 * draws.random((levels, 1, 1, layers, experts))
    return trace_of_choices(np.argsort(-scores, axis=-1)[..., :2], experts=experts)


# ------------------------------------------------------------------------------------------------------ all strategies


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.name)
@settings(max_examples=6)
@given(
    levels=st.integers(1, 5), layers=st.integers(1, 3), experts=st.integers(4, 9), devices=st.integers(1, 4),
    seed=st.integers(0, 9999),
)  # fmt: skip
def test_plans_are_whole_bounded_and_no_worse_than_the_greedy(
    strategy: Strategy, levels: int, layers: int, experts: int, devices: int, seed: int
) -> None:
    trace, topology = random_trace(levels, layers, experts, seed), Topology.processes(devices)
    placed = strategy(trace, topology, dims_of(trace), QUICK)
    for layout in placed.layouts:
        for i in range(layers):
            np.testing.assert_allclose(layout.shares(i).sum(axis=1), 1)
            assert (layout.shares(i) <= layout.holders(i)).all()
    assert placed.balanced <= placed.bound * (1 + 1e-9)
    assert placed.bound <= placed.objective * (1 + 1e-9)
    problem = Problem(trace, topology, dims_of(trace), QUICK)
    kind = GOALS[strategy.goal]
    value = placed.objective if placed.goal is None else placed.goal.value
    assert value == pytest.approx(kind.value(problem, placed))
    assert kind.bound(problem, placed) <= value * (1 + 1e-9) + 1e-12
    greedy = place(trace, topology, dims_of(trace), "lpt")
    if not strategy.baseline:
        assert value <= kind.value(problem, greedy) * (1 + 1e-9)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.name)
def test_plans_repeat_survive_files_and_come_at_once_if_asked(strategy: Strategy, tmp_path: Path) -> None:
    trace, topology = synthesise("drifting", layers=3, experts=12), Topology.processes(3)
    placed = strategy(trace, topology, dims_of(trace), QUICK)
    assert strategy(trace, topology, dims_of(trace), QUICK) == placed
    placed.save(tmp_path / "plan.json")
    assert Placement.open(tmp_path / "plan.json") == placed
    start = time.process_time()
    hurried = strategy(trace, topology, dims_of(trace), Budget(restarts=10**6, seconds=1e-6))
    assert time.process_time() - start < 5
    hurried.check(dims_of(trace), topology)


@pytest.mark.parametrize("strategy", ALL, ids=lambda s: s.name)
def test_what_cannot_be_planned_is_refused(strategy: Strategy) -> None:
    trace = synthesise("zipf", layers=2, experts=4, levels=2)
    dims = dims_of(trace)
    other = ModelDims(("x", "y"), (4, 4), (1, 1), 0, (1, 1), (1.0, 1.0))
    with pytest.raises(PlanError, match="collect a trace of this model"):
        strategy(trace, Topology.processes(2), other)
    if not strategy.copies:
        with pytest.raises(PlanError, match="use at most 4 devices"):
            strategy(trace, Topology.processes(5), dims)
    with pytest.raises(PlanError, match=r"memory budget larger by [\d,]+ bytes \([\d,]+ in all\)"):
        strategy(trace, Topology.processes(2), dims, Budget(memory_bytes=600))
    needs = GOALS[strategy.goal].needs
    if needs is not None:
        with pytest.raises(PlanError, match=f"a trace without {needs}"):
            strategy(replace(trace, **{needs: None}), Topology.processes(2), dims)
    if strategy.goal == "seconds":
        with pytest.raises(PlanError, match="row_bytes"):
            strategy(trace, Topology.processes(2), replace(dims, row_bytes=(), row_flops=()))


def test_more_copies_than_devices_are_refused() -> None:
    trace = synthesise("zipf", layers=1, experts=4, levels=1)
    for name in ("eplb", "lp_share"):
        with pytest.raises(PlanError, match="use at most spare=2"):
            place(trace, Topology.processes(2), dims_of(trace), name, Budget(spare=3))
        everywhere = place(trace, Topology.processes(2), dims_of(trace), name, Budget(spare=2))
        assert everywhere.slowdown == pytest.approx(1.0)
        assert all(everywhere.holders(0).all(axis=1))


# ---------------------------------------------------------------------------------------------------- load and windows


def test_measured_load_needs_balance_at_every_level() -> None:
    trace = digits_trace()
    plans = {n: place(trace, Topology.processes(4), dims_of(trace), n) for n in ("contiguous", "lpt", "minimax_time")}
    assert plans["lpt"].slowdown > plans["contiguous"].slowdown > 1.2
    assert plans["minimax_time"].slowdown <= 1.162
    exact = sum(exact_load(trace.layer(i), 2) for i in range(2))
    two = place(trace, Topology.processes(2), dims_of(trace), "minimax_time")
    found = sum(layer_cost(trace.layer(i), np.array(two.primary[i]), np.ones(2)) for i in range(2))
    assert exact * (1 - 1e-9) <= found <= exact * 1.01


def test_windows_follow_the_measured_load() -> None:
    trace, topology = digits_trace(), Topology.processes(4)
    static = place(trace, topology, dims_of(trace), "minimax_time")
    placed = place(trace, topology, dims_of(trace), "windows")
    assert len(placed.layouts) <= 4
    assert placed.slowdown <= 1.13
    dear = place(trace, topology, dims_of(trace), "windows", Budget(move_price=1e6, restarts=2))
    assert not dear.windows
    assert dear.objective <= static.objective * (1 + 1e-9)
    plans = [
        place(trace, topology, dims_of(trace), "windows", Budget(move_price=x, restarts=2)) for x in (0, 0.05, 0.3)
    ]
    moved = [sum(len(moves(a, b)) for a, b in pairwise(plan.layouts)) for plan in plans]
    assert moved[0] >= moved[1] >= moved[2]


def test_exchanges_leave_less_than_a_thousandth_of_load() -> None:
    draws = np.random.default_rng(7)
    load = draws.gamma(2.0, 100, (1, 1, 64))
    trace = RoutingTrace(np.ones(1), ("a",), (64,), load)
    placed = place(trace, Topology.processes(8), dims_of(trace), "minimax_time")
    assert placed.objective <= 1.0006 * placed.bound


def test_copies_of_the_hottest_experts_halve_the_peak() -> None:
    load = np.array([600.0, 560, 120, 120, 20, 10, 10, 10])
    trace = RoutingTrace(np.ones(1), ("a",), (8,), load[None, None])
    dims, topology, budget = dims_of(trace), Topology.processes(8), Budget(spare=1)
    assert place(trace, topology, dims, "eplb", budget).objective < 232  # what the greedy alone reaches
    divided = place(trace, topology, dims, "lp_share", budget)
    assert divided.objective < 232
    assert divided.copies_of(0, 0).size == 2
    assert divided.objective >= load.sum() / 8


def test_devices_may_outnumber_experts_if_there_are_copies() -> None:
    trace = synthesise("zipf", layers=2, experts=4, levels=2)
    for name in ("eplb", "lp_share", "shadow", "materialise"):
        placed = place(trace, Topology.processes(6), dims_of(trace), name)
        assert len(placed.devices) == 6
    assert place(trace, Topology.processes(6), dims_of(trace), "lp_share").slowdown < 1.6


# ------------------------------------------------------------------------------------------------------------ affinity


@pytest.mark.parametrize(
    ("kind", "restarts", "wanted"), [("planted", 2, 0.418), ("dirichlet", 4, 0.5285), ("weak", 2, 0.2151)]
)
def test_affinity_reaches_the_best_known_values(kind: str, restarts: int, wanted: float) -> None:
    trace = affinity_instance(kind)
    placed = place(trace, Topology.processes(8), dims_of(trace), "affinity", Budget(restarts=restarts))
    assert stay(trace, placed) >= wanted
    assert placed.goal is not None
    assert placed.goal.value == pytest.approx(1 - stay(trace, placed))


@pytest.mark.parametrize(("kind", "wanted"), [("planted", 0.95 * 0.419), ("dirichlet", 0.95 * 0.521)])
def test_joint_keeps_affinity_and_balance(kind: str, wanted: float) -> None:
    trace = affinity_instance(kind)
    placed = place(trace, Topology.processes(8), dims_of(trace), "joint", Budget(restarts=4))
    assert stay(trace, placed) >= wanted
    assert imbalance(trace, placed) <= 1.05


@pytest.mark.parametrize("kind", ["planted", "dirichlet"])
def test_affinity_is_within_a_hundredth_of_the_optimum_of_tiny_instances(kind: str) -> None:
    trace = affinity_instance(kind, layers=3, experts=6, devices=2, tokens=2000)
    exact = exact_stay(trace, 2)
    for name in ("affinity", "pool"):
        placed = place(trace, Topology.processes(2), dims_of(trace), name)
        assert exact * 0.99 <= stay(trace, placed) <= exact * (1 + 1e-9)
        assert placed.goal is not None
        assert placed.goal.bound <= 1 - exact + 1e-9


def test_near_devices_are_preferred_where_links_differ() -> None:
    trace = synthesise("planted", layers=4, experts=16, groups=2)
    topology = Topology.cluster(2, 2)
    placed = place(trace, topology, dims_of(trace), "affinity")
    assert trace.affinity is not None

    def between_servers(p: Placement) -> float:
        assert trace.affinity is not None
        return sum(
            float(flow[np.array(p.primary[i])[:, None] // 2 != np.array(p.primary[i + 1])[None] // 2].sum())
            for i, flow in enumerate(trace.affinity)
        )

    assert not topology.interchangeable
    assert between_servers(placed) < 0.6 * between_servers(place(trace, topology, dims_of(trace), "lpt"))


# -------------------------------------------------------------------------------------------------------------- groups


def test_groups_find_hidden_ones_and_group_limited_avoids_them() -> None:
    draws = np.random.default_rng(0)
    hidden = draws.permutation(np.repeat(np.arange(4), 3))
    pairs = np.where(hidden[:, None] == hidden[None], 10.0, 1.0) * (1 - np.eye(12))
    load = np.ones((2, 1, 12))
    trace = RoutingTrace(np.array([1.0, 0.5]), ("a",), (12,), load, coactivation=pairs[None])
    same = place(trace, Topology.processes(4), dims_of(trace), "groups", Budget(spare=0))
    homes = np.array(same.primary[0])
    assert all(len(set(homes[hidden == h])) == 1 for h in range(4))
    assert not same.replicas
    apart = np.array(place(trace, Topology.processes(4), dims_of(trace), "group_limited").primary[0])
    assert all(len(set(apart[hidden == h])) == 3 for h in range(4))
    assert np.bincount(apart).tolist() == [3] * 4


# ---------------------------------------------------------------------------------------------------- copies for time


def two_boxes(beta: float) -> Topology:
    names = ("p", "q")
    devices = [{"name": n, "flops_per_s": 1e6} for n in names]
    links = [{"from": a, "to": b, "alpha_s": 0.0, "beta_s_per_byte": beta} for a, b in (names, names[::-1])]
    return Topology.from_dict({"devices": devices, "links": links})


def test_shadows_pay_only_if_rows_cost_more_than_weights() -> None:
    load = np.array([[[90.0, 5.0, 5.0, 0.0]]]).repeat(8, axis=0)
    trace = RoutingTrace(np.linspace(1, 0, 8), ("a",), (4,), load)
    cheap, dear = (ModelDims(("a",), (4,), (size,), 0, (8,), (10.0,)) for size in (100, 10**7))
    many = place(trace, two_boxes(1e-6), cheap, "shadow")
    assert many.local_first
    assert 0 in {r.expert for r in many.replicas}
    assert not place(trace, two_boxes(1e-6), dear, "shadow").replicas
    short = Budget(memory_bytes=250)
    assert len(place(trace, two_boxes(1e-6), cheap, "shadow", short).replicas) == 0


def test_materialised_copies_follow_the_hot_expert() -> None:
    load = np.full((4, 1, 4), 4.0)
    load[:2, 0, 0] = load[2:, 0, 3] = 100.0
    trace = RoutingTrace(np.array([1.0, 0.8, 0.4, 0.2]), ("a",), (4,), load)
    dims = ModelDims(("a",), (4,), (100,), 0, (8,), (1e4,))
    placed = place(trace, two_boxes(1e-9), dims, "materialise", Budget(windows=2))
    copied = [{r.expert for r in layout.replicas} for layout in placed.layouts]
    assert 0 in copied[0]
    assert [3 in found for found in copied] == [False, True]
    assert placed.windows[0].sigma == pytest.approx(0.6)
    assert placed.slowdown < place(trace, two_boxes(1e-9), dims, "minimax_time").slowdown - 0.2


# ------------------------------------------------------------------------------------------------------- memory tiers


def test_hot_experts_go_where_arithmetic_is_fast() -> None:
    devices = [
        {"name": "fast", "flops_per_s": 1e9, "memory_bytes_per_s": 1e6},
        {"name": "near", "flops_per_s": 1e7, "memory_bytes_per_s": 1e6},
    ]
    links = [
        {"from": a, "to": b, "alpha_s": 0.0, "beta_s_per_byte": 1e-15} for a, b in (("fast", "near"), ("near", "fast"))
    ]
    topology = Topology.from_dict({"devices": devices, "links": links})
    load = np.array([[[1000.0, 1, 900, 2, 1, 3]]])
    trace = RoutingTrace(np.ones(1), ("a",), (6,), load)
    dims = ModelDims(("a",), (6,), (1000,), 0, (8,), (1e4,))
    homes = np.array(place(trace, topology, dims, "intensity").primary[0])
    assert homes[0] == homes[2] == 0
    assert (homes[[1, 3, 4, 5]] == 1).all()
    crowded = place(trace, topology, dims, "intensity", Budget(memory_bytes=3000))
    assert crowded.counts(0).tolist() == [3, 3]


def streaming_box() -> Topology:
    devices = [
        {"name": "gpu", "flops_per_s": 1e6},
        {"name": "host", "kind": "memory"},
        {"name": "disk", "kind": "memory"},
    ]
    links = [
        {"from": n, "to": "gpu", "alpha_s": 0.0, "beta_s_per_byte": b} for n, b in (("disk", 1e-3), ("host", 1e-5))
    ]
    return Topology.from_dict({"devices": devices, "links": links})


def test_what_does_not_fit_is_streamed_and_the_busiest_links_are_relieved() -> None:
    load = np.zeros((5, 2, 4))
    load[:, 0] = [100.0, 100, 100, 100]
    load[:, 1] = [1.0, 1, 1, 1]
    load[1:, 1, 3] = 0  # hardly ever needed
    trace = RoutingTrace(np.linspace(1, 0, 5), ("a", "b"), (4, 4), load)
    dims = ModelDims(("a", "b"), (4, 4), (1000, 1000), 0, (8, 8), (1e3, 1e3))
    whole = place(trace, streaming_box(), dims, "pin_and_stream", Budget(memory_bytes=8000))
    assert whole.tiers == ()
    half = place(trace, streaming_box(), dims, "pin_and_stream", Budget(memory_bytes=5000))
    assert half.tiers[0] == ("host",) * 4, "its arithmetic hides the transfers"
    assert half.tiers[1] == ("device", "device", "device", "host")
    assert half.bytes_per_device(dims).tolist() == [5000]
    seconds = [
        place(trace, streaming_box(), dims, "pin_and_stream", Budget(memory_bytes=m)).goal for m in (8000, 5000, 2500)
    ]
    values = [goal.value for goal in seconds if goal is not None]
    assert values == sorted(values)
    assert values[2] > values[1]
    with pytest.raises(PlanError, match="larger by 500 bytes"):
        place(trace, streaming_box(), dims, "pin_and_stream", Budget(memory_bytes=1500))


def test_islands_are_sized_by_their_share_of_the_run() -> None:
    load = np.zeros((40, 1, 2))
    load[:26, 0, 0] = load[26:, 0, 1] = 100.0
    trace = RoutingTrace(np.linspace(1, 0, 40), ("denoiser",), (2,), load)
    dims = ModelDims(("denoiser",), (2,), (10**9,), 0, (100,), (1e9,))
    placed = place(trace, Topology.node(8), dims, "islands")
    assert [len(placed.copies_of(0, g)) for g in range(8)] == [1] * 8, "no device holds both models"
    sizes = placed.holders(0).sum(axis=1).tolist()
    assert sizes == [5, 3], "26 and 14 steps"
    assert placed.goal is not None
    assert placed.goal.value == pytest.approx(2600 / 5)
    assert place(trace, Topology.node(2), dims, "islands").goal == placed.goal.model_copy(
        update={"value": 2600.0, "bound": 2000.0}
    )


# ----------------------------------------------------------------------------------------------------------- predicted


def test_predictions_are_those_of_a_hand_computation() -> None:
    load = np.array([[[30.0, 10.0]], [[10.0, 10.0]]])
    trace = RoutingTrace(np.array([1.0, 0.5]), ("a",), (2,), load)
    dims = ModelDims(("a",), (2,), (1000,), 7, (8,), (100.0,))
    placed = place(trace, two_boxes(1e-3), dims, "contiguous")
    seen = predict(placed, trace, two_boxes(1e-3), dims)
    np.testing.assert_allclose(seen.compute_s, [30 * 100 / 1e6, 10 * 100 / 1e6])
    # Half of each expert's rows start on the other device: 15 rows one way, 5 the other; the busier link counts.
    np.testing.assert_allclose(seen.exchange_s, [2 * 15 * 8e-3, 2 * 5 * 8e-3])
    np.testing.assert_allclose(seen.imbalance, [1.5, 1.0])
    assert seen.link_bytes == {"p->q": (5 + 15 + 5 + 5) * 8, "q->p": (15 + 5 + 5 + 5) * 8}
    assert seen.memory_bytes.tolist() == [1007, 1007]
    assert (seen.setup_s, seen.moving_s) == (0, 0)
    swapped = placed.model_validate(placed.model_dump() | {"windows": [{"sigma": 0.7, "primary": [[1, 0]]}]})
    moving = predict(swapped, trace, two_boxes(1e-3), dims)
    assert moving.moving_s == pytest.approx(1.0 - moving.step_s[0]), "one expert each way, both links at once"
    assert moving.link_bytes["p->q"] == seen.link_bytes["p->q"] + 1000


def test_the_page_lists_every_strategy_as_it_is() -> None:
    page = (Path(__file__).parent.parent / "docs" / "placement.md").read_text()
    rows = [f"| `{s.name}` | {s.goal} | {'yes' if s.copies else ''} | {s.summary} |" for s in ALL]
    start = page.index("| strategy | makes small |")
    assert page[start : page.index("\n\n", start)].splitlines()[2:] == rows
