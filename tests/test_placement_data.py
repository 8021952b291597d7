"""Placements as data: copies and their shares, windows over noise levels, memory tiers; files of both versions."""

import json
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from moefx.errors import PlanError, UnsafeInputError
from moefx.passes.placement import Budget, ModelDims, Placement, Replica, Topology, Window

DIMS = ModelDims(("a", "b"), (3, 4), (10, 100), 7)
HOMES = ((0, 1, 2), (0, 1, 2, 0))


def make(**fields: object) -> Placement:
    given = {"primary": HOMES, "objective": 3.0, "bound": 2.0, "balanced": 1.0, **fields}
    return Placement.model_validate({"strategy": "x", "devices": ("p", "q", "r"), "layers": ("a", "b"), **given})


def replica(layer: int, expert: int, device: int, share: float) -> Replica:
    return Replica(layer=layer, expert=expert, device=device, share=share)


def test_copies_take_their_shares_and_the_primary_the_rest() -> None:
    placed = make(replicas=(replica(1, 0, 1, 0.25), replica(1, 0, 2, 0.5), replica(0, 2, 0, 1.0)))
    placed.check(DIMS)
    assert placed.shares(1).tolist() == [[0.25, 0.25, 0.5], [0, 1, 0], [0, 0, 1], [1, 0, 0]]
    assert placed.shares(0)[2].tolist() == [1, 0, 0]
    assert placed.copies_of(1, 2).tolist() == [0, 2]
    assert placed.experts_of(1, 2).tolist() == [2]
    assert placed.counts(1).tolist() == [2, 1, 1]
    assert placed.bytes_per_device(DIMS).tolist() == [7 + 20 + 200, 7 + 10 + 200, 7 + 10 + 200]
    assert "a  p: 0,+2  q: 1  r: 2" in str(placed)


@pytest.mark.parametrize(
    ("replicas", "says"),
    [
        ((replica(0, 1, 1, 0.5),), "a copy of expert 1 of layer 0 on device 1 twice"),
        ((replica(1, 1, 0, 0.5), replica(1, 1, 0, 0.1)), "on device 0 twice"),
        ((replica(0, 1, 3, 0.5),), "on device 3, which there is not"),
        ((replica(0, 3, 1, 0.5),), "a copy of expert 3 of layer 0"),
        ((replica(1, 1, 0, 0.7), replica(1, 1, 2, 0.4)), "shares sum to 1.1"),
    ],
)
def test_copies_that_collide_are_refused(replicas: tuple[Replica, ...], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        make(replicas=replicas).check(DIMS)
    assert says in str(caught.value)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_are_fractions(share: float) -> None:
    with pytest.raises(ValidationError):
        replica(0, 0, 0, share)


def test_windows_take_over_at_their_noise_level() -> None:
    later = ((2, 1, 0), (0, 1, 2, 0))
    placed = make(windows=(Window(sigma=0.6, primary=later), Window(sigma=0.2, primary=HOMES)))
    placed.check(DIMS)
    assert [placed.layout_at(s) for s in (1.0, 0.61, 0.6, 0.3, 0.2, 0.0)] == [0, 0, 1, 1, 2, 2]
    assert [layout.primary for layout in placed.layouts] == [HOMES, later, HOMES]
    assert all(not layout.windows for layout in placed.layouts)
    # Experts 0 and 2 of layer a change places: both devices hold both of them meanwhile.
    assert placed.bytes_per_device(DIMS).tolist() == [7 + 20 + 200, 7 + 10 + 100, 7 + 20 + 100]
    assert "from sigma 0.6:" in str(placed)
    rising = make(windows=(Window(sigma=0.2, primary=later), Window(sigma=0.6, primary=HOMES)))
    with pytest.raises(PlanError, match="must fall"):
        rising.check(DIMS)
    with pytest.raises(PlanError, match=r"experts \[0\] of a on no device"):
        make(windows=(Window(sigma=0.2, primary=((9, 0, 0), HOMES[1])),)).check(DIMS)


def test_streamed_experts_need_two_buffers_only() -> None:
    host = [{"name": "host", "kind": "memory"}]
    devices = [{"name": name} for name in "pqr"]
    ends = [(a, b) for a in "pqr" for b in (*"pqr", "host") if a != b]
    links = [{"from": a, "to": b, "alpha_s": 0.0, "beta_s_per_byte": 1e-9} for a, b in ends]
    topology = Topology.from_dict({"devices": devices + host, "links": links})
    assert topology.devices == ("p", "q", "r")
    tiers = (("device",) * 3, ("host", "device", "device", "host"))
    placed = make(tiers=tiers)
    placed.check(DIMS, topology)
    assert placed.resident(1).tolist() == [False, True, True, False]
    assert placed.bytes_per_device(DIMS).tolist() == [7 + 10 + 2 * 100, 7 + 10 + 100, 7 + 10 + 100]
    assert "p: 0~,3~" in str(placed)
    with pytest.raises(PlanError, match="'attic'"):
        make(tiers=(("attic",) * 3, ("device",) * 4)).check(DIMS, topology)
    with pytest.raises(PlanError, match="tiers of"):
        make(tiers=(("device",) * 3,)).check(DIMS)
    with pytest.raises(PlanError, match=r"larger by 17 bytes \(217 in all\)"):
        placed.check(DIMS, topology, Budget(memory_bytes=200))


def test_files_keep_everything_and_old_ones_are_read(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    placed = make(
        replicas=(replica(1, 0, 1, 0.1),),
        tiers=(("device",) * 3, ("disk",) * 4),
        windows=(Window(sigma=0.5, primary=HOMES, replicas=(replica(0, 0, 1, 0.5),)),),
        local_first=True,
        goal={"name": "moved", "value": 0.3, "bound": 0.1},
    )
    placed.save(path)
    assert Placement.open(path) == placed
    old = {"version": 1, "strategy": "x", "devices": ["p", "q", "r"], "layers": ["a", "b"], "primary": HOMES}
    path.write_text(json.dumps({**old, "objective": 3.0, "bound": 2.0, "balanced": 1.0}))
    assert Placement.open(path) == make()
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(UnsafeInputError, match="version 0"):
        Placement.open(path)


def test_ranks_must_agree_on_copies_windows_and_tiers() -> None:
    variants = [
        make(),
        make(replicas=(replica(1, 0, 1, 0.1),)),
        make(replicas=(replica(1, 0, 1, 0.2),)),
        make(tiers=(("device",) * 3, ("disk",) * 4)),
        make(windows=(Window(sigma=0.5, primary=HOMES),)),
        make(local_first=True),
    ]
    assert len({placed.digest for placed in variants}) == len(variants)
    assert make(objective=4.0).digest == make().digest
    assert np.array_equal(make().shares(0), np.eye(3))
