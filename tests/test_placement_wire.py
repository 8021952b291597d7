"""Predicted bytes by way of the rows: from counts and from the choices themselves."""

from dataclasses import replace

import numpy as np
import pytest

from moefx.errors import OptionError, PlanError
from moefx.passes.placement import ModelDims, Placement, Replica, RoutingTrace, Topology, trace_of_choices, wire_bytes
from moefx.passes.placement.predict import predict

EXPERTS, LAYERS, DEVICES, TOKENS = 8, 4, 3, 50
SIZES = {"row_flops": (1.0,) * LAYERS}
NAMES = tuple(f"layers.{i}" for i in range(LAYERS))


def drawn(k: int) -> tuple[np.ndarray, Placement, RoutingTrace]:
    """Return choices of one device's tokens, a layout, and the trace if every device has the same tokens."""
    draws = np.random.default_rng(0)
    chosen = np.argsort(draws.random((TOKENS, LAYERS, EXPERTS)), axis=2)[:, :, :k]
    homes = tuple(tuple(int(g) for g in draws.integers(0, DEVICES, EXPERTS)) for _ in range(LAYERS))
    where = Placement(
        strategy="drawn",
        devices=Topology.processes(DEVICES).devices,
        layers=NAMES,
        primary=homes,
        objective=1.0,
        bound=1.0,
        balanced=1.0,
    )
    trace = trace_of_choices(np.concatenate([chosen] * DEVICES)[None, None], experts=EXPERTS, layers=NAMES)
    return chosen, where, trace


def dims(row: int, back: int) -> ModelDims:
    layers = (EXPERTS,) * LAYERS, (1,) * LAYERS, 0, (row,) * LAYERS
    return ModelDims(NAMES, *layers, (1.0,) * LAYERS, return_bytes=(back,) * LAYERS)


@pytest.mark.parametrize(("way", "k"), [("home", 1), ("home", 3), ("once", 1), ("once", 2), ("floating", 1)])
def test_prediction_from_counts_is_that_from_choices(way: str, k: int) -> None:
    """Rows alone: what devices tell each other besides is what is left when rows weigh nothing."""
    chosen, where, trace = drawn(k)
    back = 40 if way == "floating" else 24
    rows = wire_bytes([chosen] * DEVICES, where, dims(40, back), way)
    rows -= wire_bytes([chosen] * DEVICES, where, dims(0, 0), way)
    found = predict(where, trace, Topology.processes(DEVICES), dims(40, back), way=way)
    for i in range(DEVICES):
        for j in range(DEVICES):
            if i != j:
                assert found.link_bytes[f"process{i}->process{j}"] == pytest.approx(rows[i, j], rel=1e-9), (i, j)
    assert rows.sum() > 0


def test_each_way_sends_fewer_bytes_than_the_one_before() -> None:
    chosen, where, trace = drawn(1)
    topology = Topology.processes(DEVICES)
    home, floating = (predict(where, trace, topology, dims(40, 40), way=way) for way in ("home", "floating"))
    assert sum(floating.link_bytes.values()) < 0.7 * sum(home.link_bytes.values())
    assert floating.exchange_s.sum() < home.exchange_s.sum()
    chosen, where, trace = drawn(2)
    parts, sizes = [chosen] * DEVICES, dims(4000, 4000)
    by_way = {way: wire_bytes(parts, where, sizes, way).sum() for way in ("home", "once", "floating")}
    assert by_way["home"] > by_way["once"] > by_way["floating"]


def test_what_cannot_be_counted_is_refused() -> None:
    chosen, where, trace = drawn(2)
    topology, sizes = Topology.processes(DEVICES), dims(4, 4)
    with pytest.raises(PlanError, match="several experts per token"):
        predict(where, trace, topology, sizes, way="floating")
    with pytest.raises(OptionError, match="way = 'around'"):
        predict(where, trace, topology, sizes, way="around")
    with pytest.raises(OptionError, match="way = 'around'"):
        wire_bytes([chosen] * DEVICES, where, sizes, "around")
    with pytest.raises(PlanError, match="without coactivation"):
        predict(where, replace(trace, coactivation=None), topology, sizes, way="once")
    free = next(g for g in range(DEVICES) if g != where.primary[0][0])
    copied = where.model_copy(update={"replicas": (Replica(layer=0, expert=0, device=free, share=0.5),)})
    with pytest.raises(PlanError, match="1 copies"):
        wire_bytes([chosen] * DEVICES, copied, sizes)
