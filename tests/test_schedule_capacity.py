"""Sizes of messages from a measured trace: enough nearly always, and little more than what is needed."""

import numpy as np
import pytest

from moefx.errors import OptionError, PlanError
from moefx.passes.placement import ModelDims, Placement, RoutingTrace, Topology, place
from moefx.passes.schedule import capacity_table, changed_table
from tests.placement_digits import digits_trace

ROWS, RANKS = 1024, 4


def placed(trace: RoutingTrace) -> Placement:
    layers = len(trace.layers)
    dims = ModelDims(trace.layers, trace.experts, (1000,) * layers, 0, (64,) * layers, (100.0,) * layers)
    return place(trace, Topology.processes(RANKS), dims, "minimax_time")


def drawn_rows(trace: RoutingTrace, placement: Placement, draws: np.random.Generator) -> np.ndarray:
    """Return the rows that one rank has for each device ``[S, L, G]``, its choices drawn independently."""
    found = np.zeros((len(trace.sigmas), len(trace.layers), RANKS), dtype=np.int64)
    for s in range(len(trace.sigmas)):
        for i in range(len(trace.layers)):
            load_E = trace.layer(i)[s]
            counts_E = draws.multinomial(ROWS, load_E / load_E.sum())
            np.add.at(found[s, i], np.array(placement.primary[i]), counts_E)
    return found


def test_ranges_of_noise_levels_save_empty_places() -> None:
    trace = digits_trace()
    placement, draws = placed(trace), np.random.default_rng(0)
    batches = [drawn_rows(trace, placement, draws) for _ in range(10)]
    sent, missed = {}, {}
    for ranges in (1, 4, 16):
        table = capacity_table(trace, placement, [ROWS] * 4, ranges=ranges, margin=1.2)
        assert table.rows.shape == (ranges, 4, RANKS)
        assert (table.rows <= ROWS).all()
        caps = np.stack([table.rows[table.range_at(float(sigma))] for sigma in trace.sigmas])
        sent[ranges] = caps.sum() / (len(trace.sigmas) * 4 * ROWS)
        missed[ranges] = np.mean([np.maximum(rows - caps, 0).sum() / rows.sum() for rows in batches])
        assert table.sent_rows(float(trace.sigmas[0])) == int(table.rows[0].sum())
    assert 1.0 < sent[16] < sent[4] < sent[1] < RANKS
    assert sent[16] <= 1.21
    assert max(missed.values()) < 0.001
    exact = capacity_table(trace, placement, [ROWS] * 4, ranges=16, margin=1.0)
    assert (
        np.mean([(np.maximum(r - exact.rows, 0) > 0).any(axis=2) for r in batches]) > 0.5
    )  # without room it overflows


def test_noise_levels_find_their_range() -> None:
    trace = digits_trace()
    table = capacity_table(trace, placed(trace), [ROWS] * 4, ranges=4)
    assert [table.range_at(s) for s in table.sigmas] == [0, 1, 2, 3]
    assert table.range_at(2 * table.sigmas[0]) == 0
    assert table.range_at(0.0) == 3
    between = (table.sigmas[0] + table.sigmas[1]) / 2
    assert table.range_at(between) == 0


def test_places_for_changes_follow_the_persistence() -> None:
    trace = digits_trace()
    kept = np.tile(np.array([90.0, 100.0]), (len(trace.sigmas), 4, 1))
    kept[0] = 0
    known = RoutingTrace(trace.sigmas, trace.layers, trace.experts, trace.load, persistence=kept)
    placement = placed(trace)
    places = changed_table(known, placement, [ROWS] * 4, margin=1.0)
    whole = capacity_table(known, placement, [ROWS] * 4, ranges=1, margin=1.0).rows[0]
    assert np.allclose(places, whole * 0.1, atol=1.2)
    with pytest.raises(PlanError, match="persistence"):
        changed_table(trace, placement, [ROWS] * 4)
    with pytest.raises(OptionError, match="margin"):
        capacity_table(trace, placement, [ROWS] * 4, margin=0.5)
