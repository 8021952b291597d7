"""Moves between layouts: who sends what, in the fewest batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moefx.passes.placement import ModelDims, Placement
from moefx.passes.placement.migration import Move, batches, move_bytes, moves


def placed(home: list[int], devices: int, replicas: tuple[dict[str, float], ...] = ()) -> Placement:
    return Placement.model_validate(
        {"strategy": "x", "devices": [f"d{g}" for g in range(devices)], "layers": ["a"], "primary": [home],
         "replicas": replicas, "objective": 1, "bound": 1, "balanced": 1}
    )  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=40))
def test_batches_are_as_few_as_the_busiest_device_needs(ends: list[tuple[int, int]]) -> None:
    found = [Move(0, k, a, b) for k, (a, b) in enumerate(ends) if a != b]
    plan = batches(found)
    assert sorted(m.expert for batch in plan for m in batch) == [m.expert for m in found]
    for batch in plan:
        assert len({m.source for m in batch}) == len({m.target for m in batch}) == len(batch)
    sent, received = (np.bincount([getattr(m, end) for m in found] or [0], minlength=5) for end in ("source", "target"))
    assert len(plan) == (max(sent.max(), received.max()) if found else 0)


@given(st.integers(2, 5), st.integers(1, 12), st.integers(0, 999))
def test_moves_turn_one_layout_into_the_other(devices: int, experts: int, seed: int) -> None:
    draws = np.random.default_rng(seed)
    before, after = (placed(draws.integers(0, devices, experts).tolist(), devices) for _ in range(2))
    held = before.holders(0)
    for move in moves(before, after):
        assert before.holders(0)[move.expert, move.source]
        assert not held[move.expert, move.target]
        held[move.expert, move.target] = True
    assert (held | ~after.holders(0)).all()
    assert not moves(before, before)
    size = move_bytes(moves(before, after), ModelDims(("a",), (experts,), (10,)), devices)
    assert size.sum() == 10 * (np.array(before.primary[0]) != after.primary[0]).sum()


def test_copies_share_the_sending() -> None:
    copies = tuple({"layer": 0, "expert": e, "device": 1, "share": 0.5} for e in range(4))
    before, after = placed([0] * 4, 3, copies), placed([2] * 4, 3)
    assert [m.source for m in moves(before, after)] == [0, 1, 0, 1]
