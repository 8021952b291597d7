"""Routing traces: what is counted, against counting by hand; merging, files, drawn traces."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moefx.errors import InputError, OptionError, PlanError, UnsafeInputError
from moefx.passes.placement import RoutingTrace, TraceCollector, synthesise, trace_of_choices
from moefx.passes.placement.trace import OPTIONAL
from moefx.routing import Experts, LinearRouter, RoutedFFN, random_weights

EXPERTS, TOP_K, WIDTH = (3, 5, 4), 2, 8


def by_hand(choices: np.ndarray, experts: int) -> dict[str, np.ndarray]:
    """Count token by token; samples of the second half are the other branch of the first."""
    levels, samples, tokens, depth, k = choices.shape
    found = {
        "load": np.zeros((levels, depth, experts)),
        "affinity": np.zeros((depth - 1, experts, experts)),
        "coactivation": np.zeros((depth, experts, experts)),
        "persistence": np.zeros((levels, depth, 2)),
        "overlap": np.zeros((levels, depth, 2)),
        "position": np.zeros((depth, 64, experts)),
    }
    for s, b, n, i in np.ndindex(levels, samples, tokens, depth):
        mine = choices[s, b, n, i].tolist()
        for expert in mine:
            found["load"][s, i, expert] += 1
            found["position"][i, n * 64 // tokens, expert] += 1
            for other in mine:
                found["coactivation"][i, expert, other] += expert != other
            if i + 1 < depth:
                for after in choices[s, b, n, i + 1].tolist():
                    found["affinity"][i, expert, after] += 1 / k
            if s > 0:
                found["persistence"][s, i] += [expert in choices[s - 1, b, n, i], 1]
            if b < samples // 2:
                found["overlap"][s, i] += [expert in choices[s, b + samples // 2, n, i], 1]
    return found


def draw_choices(levels: int, samples: int, tokens: int, experts: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed)
    return np.argsort(draws.random((levels, samples, tokens, 3, experts)), axis=-1)[..., :TOP_K]


@given(
    st.integers(1, 3), st.sampled_from([2, 4]), st.integers(1, 5), st.integers(TOP_K, 5), st.integers(0, 999)
)  # fmt: skip
def test_tables_are_those_of_counting_by_hand(levels: int, samples: int, tokens: int, experts: int, seed: int) -> None:
    choices = draw_choices(levels, samples, tokens, experts, seed)
    trace = trace_of_choices(choices, experts=experts, branches=2)
    for name, table in by_hand(choices, experts).items():
        np.testing.assert_allclose(getattr(trace, name), table, atol=1e-9, err_msg=name)
    assert trace.affinity is not None
    np.testing.assert_allclose(trace.affinity.sum(axis=2), trace.load.sum(axis=0)[:-1])


class Chain(torch.nn.Module):
    """Three routed FFNs of different width; remembers what they chose."""

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(0)
        self.ffns = torch.nn.ModuleList()
        for experts in EXPERTS:
            weights = random_weights(WIDTH, 4, num_experts=experts, generator=draws)
            router = LinearRouter(WIDTH, experts, std=1.0, generator=draws)
            self.ffns.append(RoutedFFN(router, Experts(weights, torch.nn.functional.relu), top_k=TOP_K))
        self.chosen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = []
        for ffn in self.ffns:
            chosen.append(ffn.route(x).experts.view(*x.shape[:-1], TOP_K))
            x = x + ffn(x)
        self.chosen.append(torch.stack(chosen, dim=2))
        return x


def collected(seed: int = 0, levels: tuple[float, ...] = (0.9, 0.5, 0.1)) -> tuple[RoutingTrace, np.ndarray]:
    """Return the collected trace and the choices ``[S, B, N, L, K]`` of the same runs."""
    model, x = Chain(), torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(seed))
    with TraceCollector(model, branches=2) as collector:
        for sigma in levels:
            with collector.at(sigma):
                model(x * sigma + 0.3)
    return collector.trace(), torch.stack(model.chosen).numpy()


def test_the_collector_counts_all_tables() -> None:
    trace, choices = collected()
    assert trace.experts == EXPERTS
    for name, table in by_hand(choices, max(EXPERTS)).items():
        np.testing.assert_allclose(getattr(trace, name), table, atol=1e-9, err_msg=name)


def test_a_new_run_is_not_compared_with_the_end_of_the_last() -> None:
    model, x = Chain(), torch.randn(2, 5, WIDTH)
    with TraceCollector(model) as collector:
        for sigma in (0.9, 0.1, 0.9, 0.1):
            with collector.at(sigma):
                model(x)
    trace = collector.trace()
    assert trace.persistence is not None
    assert trace.overlap is None
    assert trace.persistence[0].tolist() == [[0, 0]] * 3
    assert trace.persistence[1].tolist() == [[40, 40]] * 3, "the same input twice"
    with pytest.raises(OptionError, match="branches = 3"):
        TraceCollector(model, branches=3)


def test_merged_traces_are_those_of_one_longer_run() -> None:
    first, second = collected(0, (0.9, 0.5))[0], collected(1, (0.5, 0.1))[0]
    both = first.merge(second)
    assert both.sigmas.tolist() == [0.9, 0.5, 0.1]
    assert first.position is not None
    assert second.position is not None
    np.testing.assert_array_equal(both.load[1], first.load[1] + second.load[0])
    np.testing.assert_array_equal(both.load[2], second.load[1])
    np.testing.assert_array_equal(both.position, first.position + second.position)
    only_load = RoutingTrace(first.sigmas, first.layers, first.experts, first.load)
    np.testing.assert_array_equal(only_load.merge(second).affinity, second.affinity)
    assert only_load.merge(only_load).affinity is None
    with pytest.raises(InputError, match="merge traces of one model"):
        first.merge(synthesise("zipf"))


def test_files_keep_all_tables_and_old_files_are_read(tmp_path: Path) -> None:
    path, trace = tmp_path / "trace.npz", collected()[0]
    trace.save(path)
    again = RoutingTrace.open(path)
    for name in ("sigmas", "load", *OPTIONAL):
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name), err_msg=name)
    layers, experts = np.array(trace.layers), np.array(trace.experts)
    fields = {"sigmas": trace.sigmas, "layers": layers, "experts": experts, "load": trace.load}
    np.savez(path, version=np.int64(1), **fields)
    old = RoutingTrace.open(path)
    np.testing.assert_array_equal(old.load, trace.load)
    assert all(getattr(old, name) is None for name in OPTIONAL)
    with pytest.raises(PlanError, match="a trace without affinity"):
        old.need("affinity", "place by affinity")
    places = {"affinity_shape": np.array([2, 5, 5]), "affinity_places": np.array([50]), "affinity_values": np.ones(1)}
    np.savez(path, version=np.int64(2), **fields, **places)
    with pytest.raises(UnsafeInputError, match="IndexError"):
        RoutingTrace.open(path)
    places["affinity_shape"] = np.array([2, 10**6, 10**6])
    np.savez(path, version=np.int64(2), **fields, **places)
    with pytest.raises(UnsafeInputError, match="affinity of shape"):
        RoutingTrace.open(path)


def test_mostly_empty_tables_make_small_files(tmp_path: Path) -> None:
    trace = synthesise("planted", levels=2, layers=8, experts=128, samples=2, tokens=32, groups=8)
    assert trace.affinity is not None
    trace.save(tmp_path / "trace.npz")
    assert (tmp_path / "trace.npz").stat().st_size < trace.affinity.nbytes / 20


def test_pruning_keeps_the_largest_flows() -> None:
    trace = synthesise("planted")
    pruned = trace.pruned(3)
    assert trace.affinity is not None
    assert pruned.affinity is not None
    kept = pruned.affinity > 0
    assert (kept.sum(axis=2) >= 3).mean() > 0.9
    dropped = np.where(kept, 0, trace.affinity).max(axis=2)
    assert (dropped < np.where(kept, trace.affinity, np.inf).min(axis=2)).all()
    with pytest.raises(InputError):
        trace.pruned(0)


def test_counts_that_are_none_are_refused() -> None:
    trace = synthesise("zipf")
    assert trace.affinity is not None
    bad = trace.affinity.copy()
    bad[1, 2, 3] = -1
    with pytest.raises(InputError, match=r"affinity -1.0 at \[1, 2, 3\]"):
        RoutingTrace(trace.sigmas, trace.layers, trace.experts, trace.load, affinity=bad)
    with pytest.raises(InputError, match=r"overlap \(16, 4, 1\), expected \(16, 4, 2\)"):
        RoutingTrace(trace.sigmas, trace.layers, trace.experts, trace.load, overlap=np.ones((16, 4, 1)))
    with pytest.raises(InputError, match="outside"):
        trace_of_choices(np.full((1, 2, 3, 2, 1), 4), experts=4)


def test_drawn_traces_have_the_structure_they_are_named_for() -> None:
    made = {kind: synthesise(kind, seed=3) for kind in ("zipf", "planted", "drifting")}
    zipf, planted, drifting = made.values()

    def together(trace: RoutingTrace) -> float:
        """Return the share of the flow within the best pairing of few successors."""
        assert trace.affinity is not None
        return float(np.sort(trace.affinity, axis=2)[:, :, -4:].sum() / trace.affinity.sum())

    def drift(trace: RoutingTrace) -> float:
        shares = trace.load / trace.load.sum(axis=2, keepdims=True)
        return float(np.abs(shares[0] - shares[len(shares) // 2]).sum(axis=1).mean() / 2)

    assert together(planted) > together(zipf) + 0.1
    assert drift(drifting) > 3 * drift(zipf)
    hottest = np.sort(zipf.load.sum(axis=0), axis=1)
    assert (hottest[:, -1] > 2 * hottest[:, 0]).all()
    for kind, trace in made.items():
        assert trace.persistence is not None
        assert trace.overlap is not None
        kept = trace.persistence[1:].sum(axis=(0, 1))
        assert 0.7 < kept[0] / kept[1] < 1
        shared = trace.overlap.sum(axis=(0, 1))
        assert 0.6 < shared[0] / shared[1] < 1
        np.testing.assert_array_equal(trace.load, synthesise(kind, seed=3).load)
    with pytest.raises(OptionError, match="did you mean 'planted'"):
        synthesise("plantd")
    with pytest.raises(OptionError, match="samples"):
        synthesise("zipf", samples=3)


def test_overlap_is_read_between_levels() -> None:
    trace = synthesise("drifting", levels=3)
    seen = trace.at([0.5, 0.1])
    assert seen.persistence is None
    assert seen.overlap is not None
    assert trace.overlap is not None
    half = (0.5 - trace.sigmas[2]) / (trace.sigmas[1] - trace.sigmas[2])
    np.testing.assert_allclose(seen.overlap[0], half * trace.overlap[1] + (1 - half) * trace.overlap[2])
    np.testing.assert_array_equal(seen.affinity, trace.affinity)
