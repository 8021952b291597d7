"""Placement without processes: topologies, traces, placements, strategies."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError, MoefxError, NothingMatched, OptionError, PlanError, UnsafeInputError
from moefx.passes.placement import (
    Budget,
    ModelDims,
    Placement,
    RoutingTrace,
    Topology,
    TraceCollector,
    get_strategy,
    place,
    strategies,
)
from moefx.passes.placement.objective import device_load, layer_cost, lower_bound
from moefx.passes.placement.swap import improve
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights

NAMES = [strategy.name for strategy in strategies()]
QUICK = Budget(restarts=1)


def make_trace(load: object, experts: tuple[int, ...] | None = None) -> RoutingTrace:
    """Return a trace of loads [S, L, E], with flows and pairs as if every choice were independent."""
    array = np.asarray(load, dtype=np.float64)
    layers = tuple(f"blocks.{i}.mlp" for i in range(array.shape[1]))
    summed_LE = array.sum(axis=0)
    share_LE = summed_LE / np.maximum(summed_LE.sum(axis=1, keepdims=True), 1)
    affinity = summed_LE[:-1, :, None] * share_LE[1:, None, :]
    pairs = summed_LE[:, :, None] * share_LE[:, None, :] * (1 - np.eye(array.shape[2]))
    sigmas, widths = np.linspace(1, 0, array.shape[0]), experts or (array.shape[2],) * len(layers)
    return RoutingTrace(sigmas, layers, widths, array, affinity=affinity, coactivation=pairs)


def dims_of(trace: RoutingTrace) -> ModelDims:
    size = len(trace.layers)
    return ModelDims(trace.layers, trace.experts, (1000,) * size, 500, (16,) * size, (2000.0,) * size)


def drifting(levels: int = 12, layers: int = 2, experts: int = 8, seed: int = 0) -> RoutingTrace:
    """Return loads that rise and fall with the noise level, each expert at another phase: on average all are equal."""
    draws = np.random.default_rng(seed)
    level_S1 = np.arange(levels)[:, None] / levels
    phases = [draws.permutation(experts) / experts for _ in range(layers)]
    load = [np.round(100 * (1 + np.cos(2 * np.pi * (level_S1 - phase_E)))) for phase_E in phases]
    return make_trace(np.stack(load, axis=1))


traces = st.builds(
    lambda levels, layers, experts, seed: make_trace(
        np.random.default_rng(seed).gamma(0.5, 100, (levels, layers, experts)).round()
    ),
    st.integers(1, 6),
    st.integers(1, 3),
    st.integers(4, 11),
    st.integers(0, 10_000),
)


# ------------------------------------------------------------------------------------------------------- strategies


@settings(max_examples=25)
@given(trace=traces, devices=st.integers(1, 4))
def test_load_strategies_balance_slots_and_report_their_cost(trace: RoutingTrace, devices: int) -> None:
    topology = Topology.processes(devices)
    for name in ("contiguous", "lpt", "minimax_time", "affinity", "pool"):
        placed = place(trace, topology, dims_of(trace), name, QUICK)
        for i, experts in enumerate(trace.experts):
            counts = placed.counts(i)
            assert counts.sum() == experts
            assert counts.max() - counts.min() <= 1
            assert sorted(placed.order(i).tolist()) == list(range(experts))
        by_hand = 0.0
        for s, i in itertools.product(range(len(trace.sigmas)), range(len(trace.layers))):
            by_hand += max(trace.load[s, i, placed.experts_of(i, g)].sum() for g in range(devices))
        assert placed.objective == pytest.approx(by_hand)
        assert placed.balanced <= placed.bound * (1 + 1e-12)
        assert placed.bound <= placed.objective * (1 + 1e-12)


@given(trace=traces, devices=st.integers(1, 4), seed=st.integers(0, 99))
def test_minimax_is_never_worse_than_the_others(trace: RoutingTrace, devices: int, seed: int) -> None:
    static = ("contiguous", "lpt", "minimax_time")
    found = {name: get_strategy(name)(trace, Topology.processes(devices), dims_of(trace)).objective for name in static}
    budget = Budget(restarts=1, seed=seed)
    one_start = place(trace, Topology.processes(devices), dims_of(trace), "minimax_time", budget).objective
    assert one_start <= min(found["contiguous"], found["lpt"]) * (1 + 1e-12)
    assert found["minimax_time"] <= min(found["contiguous"], found["lpt"]) * (1 + 1e-12)


@given(trace=traces, devices=st.integers(1, 4))
def test_lpt_is_never_worse_than_contiguous_on_summed_load(trace: RoutingTrace, devices: int) -> None:
    summed = make_trace(trace.load.sum(axis=0, keepdims=True), trace.experts)
    cost = {n: place(summed, Topology.processes(devices), dims_of(summed), n).objective for n in ("contiguous", "lpt")}
    assert cost["lpt"] <= cost["contiguous"] * (1 + 1e-12)


@given(seed=st.integers(0, 200), devices=st.sampled_from([2, 4]))
def test_minimax_finds_nearly_the_exact_optimum_of_small_layers(seed: int, devices: int) -> None:
    load_SE = np.random.default_rng(seed).gamma(0.5, 100, (5, 8))
    homes = set(itertools.permutations(np.repeat(np.arange(devices), 8 // devices).tolist())) if devices == 2 else None
    if homes is None:
        homes = {tuple(home) for home in _pairings(8)}
    exact = min(layer_cost(load_SE, np.array(home), np.ones(devices)) for home in homes)
    trace = make_trace(load_SE[:, None])
    found = place(trace, Topology.processes(devices), dims_of(trace), "minimax_time").objective
    assert exact * (1 - 1e-12) <= found <= exact * 1.01


def _pairings(experts: int) -> list[list[int]]:
    """Return every way to put pairs of experts on devices, up to the names of the devices."""
    found: list[list[int]] = []

    def extend(home: list[int], device: int) -> None:
        if -1 not in home:
            found.append(home)
            return
        first = home.index(-1)
        for other in range(first + 1, experts):
            if home[other] == -1:
                longer = home.copy()
                longer[first] = longer[other] = device
                extend(longer, device + 1)

    extend([-1] * experts, 0)
    return found


def test_averaging_over_time_hides_what_minimax_sees() -> None:
    trace = drifting()
    static = ("contiguous", "lpt", "minimax_time")
    slow = {name: place(trace, Topology.processes(4), dims_of(trace), name).slowdown for name in static}
    assert slow["minimax_time"] == pytest.approx(1.0, abs=0.01)  # opposite phases on one device
    assert slow["lpt"] > 1.15
    assert slow["contiguous"] > 1.15


def test_the_greedy_takes_the_hot_experts_apart() -> None:
    trace = make_trace([[[600, 560, 120, 120, 20, 10, 10, 10]]])
    placed = place(trace, Topology.processes(2), dims_of(trace), "lpt")
    assert placed.primary[0][0] != placed.primary[0][1]
    assert placed.objective == 740  # 600 + 120 + 10 + 10: the best with four experts each
    assert place(trace, Topology.processes(2), dims_of(trace), "contiguous").objective == 1400


def test_a_slow_device_gets_less() -> None:
    devices = [{"name": "fast", "speed": 3.0}, {"name": "slow", "speed": 1.0}]
    ends = [("fast", "slow"), ("slow", "fast")]
    links = [{"from": a, "to": b, "alpha_s": 0.0, "beta_s_per_byte": 1e-9} for a, b in ends]
    topology = Topology.from_dict({"devices": devices, "links": links})
    trace = make_trace([[[30.0, 30.0, 10.0, 10.0]]])
    for name in ("lpt", "minimax_time"):
        placed = place(trace, topology, dims_of(trace), name)
        assert placed.primary == ((0, 0, 1, 1),)
        assert placed.objective == 20
        assert placed.slowdown == 1.0


def test_swaps_move_no_slot_and_end_in_a_local_optimum() -> None:
    draws = np.random.default_rng(3)
    load_SE, home = draws.gamma(0.5, 10, (7, 12)), draws.permutation(np.repeat(np.arange(4), 3))
    better = improve(load_SE, home, np.ones(4))
    assert np.bincount(better).tolist() == [3, 3, 3, 3]
    cost = layer_cost(load_SE, better, np.ones(4))
    assert cost < layer_cost(load_SE, home, np.ones(4))
    for a, b in itertools.combinations(range(12), 2):
        other = better.copy()
        other[a], other[b] = other[b], other[a]
        assert layer_cost(load_SE, other, np.ones(4)) >= cost * (1 - 1e-9)


def test_plans_are_the_same_each_time_and_layers_of_other_widths_fit() -> None:
    load = np.random.default_rng(0).gamma(0.5, 100, (4, 3, 8))
    load[:, 1, 5:] = 0
    trace = make_trace(load, (8, 5, 8))
    plans = [place(trace, Topology.processes(3), dims_of(trace)) for _ in range(2)]
    assert plans[0] == plans[1]
    assert [len(row) for row in plans[0].primary] == [8, 5, 8]
    totals = sum(plans[0].counts(i) for i in range(3))
    assert totals.tolist() == [7, 7, 7], "the device with one more expert rotates"


def test_device_load_sums_the_rows() -> None:
    assert device_load(np.array([[1.0, 2.0, 4.0]]), np.array([1, 0, 1]), 3).tolist() == [[2.0, 5.0, 0.0]]


def test_the_bound_counts_the_hottest_expert() -> None:
    assert lower_bound(make_trace([[[9.0, 1.0, 1.0, 1.0]]]), Topology.processes(4)) == 9.0


# ---------------------------------------------------------------------------------------------------------- refusals


def test_impossible_plans_are_refused() -> None:
    trace = drifting(experts=4)
    with pytest.raises(PlanError, match="use at most 4 devices"):
        place(trace, Topology.processes(5), dims_of(trace))
    with pytest.raises(PlanError, match="a trace of 2 layers"):
        place(trace, Topology.processes(2), dims_of(drifting(experts=8)))
    with pytest.raises(OptionError, match="did you mean 'minimax_time'"):
        place(trace, Topology.processes(2), dims_of(trace), "minimax")
    with pytest.raises(PlanError, match=r"process0 needs 4,500 bytes of weights and has 4,000(.|\n)*larger by 500"):
        place(trace, Topology.processes(2, memory_bytes=4000), dims_of(trace))
    with pytest.raises(InputError, match="pass a Topology"):
        place(trace, "8 GPUs", dims_of(trace))  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="positive"):
        Budget(memory_bytes=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_loads_that_are_no_loads_are_refused(bad: float) -> None:
    trace = drifting()
    load = trace.load.copy()
    load[3, 1, 2] = bad
    with pytest.raises(InputError, match=r"blocks.1.mlp, expert 2, 1 such values"):
        replace(trace, load=load)


def test_traces_out_of_order_are_refused() -> None:
    trace = drifting(levels=2)
    with pytest.raises(InputError, match="unordered sigmas"):
        RoutingTrace(trace.sigmas[::-1], trace.layers, trace.experts, trace.load)
    with pytest.raises(InputError, match="load"):
        RoutingTrace(trace.sigmas, trace.layers, trace.experts, trace.load[:, :, 1:])


# ---------------------------------------------------------------------------------------------------------- topology


def test_presets_price_an_exchange() -> None:
    bytes_GG = np.full((4, 4), 2.1e9) - np.diag(np.full(4, 2.1e9))
    assert Topology.processes(4).exchange_seconds(bytes_GG) == pytest.approx(12 + 290e-6)  # one bus carries all of it
    node = Topology.node(8)
    assert len(node) == 8
    bytes_GG = np.zeros((8, 8))
    bytes_GG[0, 1] = bytes_GG[0, 2] = bytes_GG[3, 4] = 450e9
    assert node.exchange_seconds(bytes_GG) == pytest.approx(2 + 10e-6)  # the way out of gpu0 carries two
    assert node.exchange_seconds(np.zeros((8, 8))) == 0.0


def test_topologies_survive_json(tmp_path: Path) -> None:
    for topology in (Topology.processes(3), Topology.node(2)):
        path = tmp_path / "topology.json"
        path.write_text(json.dumps(topology.to_dict(), allow_nan=False))
        read = Topology.load(path)
        assert read.devices == topology.devices
        assert read.to_dict() == topology.to_dict()
        assert np.array_equal(read.memory_bytes, topology.memory_bytes)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"devices": [{"name": "a"}, {"name": "b"}], "links": []}, "no path from a to b"),
        ({"devices": [], "links": []}, "no node of kind 'device'"),
        ({"devices": [{"name": "a", "speed": 0}], "links": []}, "speed = 0"),
        ({"devices": [{"name": "a"}], "links": [{"from": "a", "to": "b"}]}, "a link a -> b"),
        ({"devices": [{"name": "a"}, {"name": "b"}], "links": [{"from": "a", "to": "b"}]}, "alpha_s = nan"),
        ({"links": []}, "KeyError: 'devices'"),
        ({"devices": ["a"], "links": []}, "TypeError"),
    ],
)
def test_bad_topologies_are_refused(data: dict[str, object], says: str) -> None:
    with pytest.raises(InputError) as caught:
        Topology.from_dict(data)
    assert says in str(caught.value)


def test_a_missing_topology_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeInputError, match="No such file"):
        Topology.load(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------------------- files


def test_traces_and_placements_survive_files(tmp_path: Path) -> None:
    trace = drifting()
    trace.save(tmp_path / "trace.npz")
    read = RoutingTrace.open(tmp_path / "trace.npz")
    assert (read.layers, read.experts) == (trace.layers, trace.experts)
    assert np.array_equal(read.load, trace.load)
    assert np.array_equal(read.sigmas, trace.sigmas)
    placed = place(trace, Topology.processes(4), dims_of(trace))
    placed.save(tmp_path / "placement.json")
    again = Placement.open(tmp_path / "placement.json")
    assert again == placed
    assert again.digest == placed.digest
    other = placed.model_copy(update={"primary": placed.primary[::-1]})
    assert other.digest != placed.digest
    assert other.experts_of(0, 1).tolist() == placed.experts_of(1, 1).tolist()
    assert "blocks.1.mlp  process0:" in str(placed)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["placement.json", "trace.npz"]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    trace = drifting()
    whole, cut = tmp_path / "trace.npz", tmp_path / "cut.npz"
    trace.save(whole)
    cut.write_bytes(whole.read_bytes()[:-40])
    for path in (cut, tmp_path / "none.npz"):
        with pytest.raises(UnsafeInputError):
            RoutingTrace.open(path)
    np.savez(tmp_path / "newer.npz", version=np.int64(99))
    with pytest.raises(UnsafeInputError, match="version 99"):
        RoutingTrace.open(tmp_path / "newer.npz")
    placed = place(trace, Topology.processes(2), dims_of(trace))
    (tmp_path / "cut.json").write_text(placed.model_dump_json()[:-5])
    (tmp_path / "newer.json").write_text(placed.model_copy(update={"version": 99}).model_dump_json())
    for name in ("cut.json", "newer.json", "none.json"):
        with pytest.raises(UnsafeInputError):
            Placement.open(tmp_path / name)


def test_placements_of_other_models_are_refused() -> None:
    trace = drifting()
    placed, dims = place(trace, Topology.processes(2), dims_of(trace)), dims_of(trace)
    lost = placed.model_copy(update={"primary": ((0, 1, 0, 1, 0, 1, 0, 7), placed.primary[1])})
    for wrong, says in (
        (placed.model_copy(update={"layers": ("a", "b")}), "without ['blocks.0.mlp', 'blocks.1.mlp'], with ['a', 'b']"),
        (placed.model_copy(update={"layers": placed.layers[::-1]}), "in another order"),
        (lost, "experts [7] of blocks.0.mlp on no device of 2"),
    ):
        with pytest.raises(MoefxError) as caught:
            wrong.check(dims)
        assert says in str(caught.value)
    with pytest.raises(PlanError, match="devices"):
        placed.check(dims, Topology.node(2))


# ------------------------------------------------------------------------------------------------------------ traces


def test_another_sampler_reads_the_trace_between_its_levels() -> None:
    trace = RoutingTrace(np.array([1.0, 0.5, 0.0]), ("a",), (2,), np.array([[[4, 0]], [[2, 2]], [[0, 4]]]))
    seen = trace.at([2.0, 0.75, 0.25])
    assert seen.load[:, 0].tolist() == [[4, 0], [3, 1], [1, 3]]
    assert seen.sigmas.tolist() == [2.0, 0.75, 0.25]


class Two(torch.nn.Module):
    """Two routed FFNs of different size, the second called twice."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)

        def ffn(experts: int) -> RoutedFFN:
            weights = random_weights(8, 4, num_experts=experts, generator=draws)
            router = LinearRouter(8, experts, std=1.0, generator=draws)
            return RoutedFFN(router, Experts(weights, torch.nn.functional.relu), top_k=2)

        self.first, self.second = ffn(3), ffn(5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(self.second(self.first(x)))
        return out


def test_the_collector_counts_what_the_routers_chose() -> None:
    model, x = Two(), torch.randn(2, 7, 8)
    with TraceCollector(model) as collector:
        model(x)  # outside `at`: not counted
        with collector.at(0.2):
            model(x)
        with collector.at(0.9):
            model(x)
            model(x)
    model(x)  # hooks are gone
    trace = collector.trace()
    assert trace.layers == ("first", "second")
    assert trace.experts == (3, 5)
    assert trace.sigmas.tolist() == [0.9, 0.2]
    assert trace.load.sum(axis=2).tolist() == [[56, 112], [28, 56]]
    assert trace.layer(0)[1].tolist() == pytest.approx((model.first.record.load * 28).tolist())
    assert np.array_equal(trace.load[0], 2 * trace.load[1])
    assert not model.first.experts._forward_pre_hooks


def test_nothing_to_collect_is_an_error() -> None:
    with pytest.raises(NothingMatched, match="no routed FFN"):
        TraceCollector(torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match="no run"):
        TraceCollector(Two()).trace()
