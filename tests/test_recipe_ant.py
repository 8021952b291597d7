"""ANT's intervals: where the timesteps are cut, and one FFN per interval."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from moefx.errors import OptionError
from moefx.routing.intervals import schedule_bounds
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX

pytestmark = support.MARKS


def log_snr(schedule: str) -> list[float]:
    """Return the log-SNR of 1000 timesteps, written out."""
    if schedule == "flow":
        return [2 * math.log((1 - s) / s) for s in ((i + 0.5) / 1000 for i in range(1000))]
    found, kept = [], 1.0
    for i in range(1000):
        kept *= 1 - (0.0001 + (0.02 - 0.0001) * i / 999)
        found.append(math.log(kept / (1 - kept)))
    return found


def distance(v: list[float], starts: list[int]) -> float:
    total = 0.0
    for left, end in zip(starts, [*starts[1:], len(v)], strict=True):
        centre = v[(left + end - 1 + 1) // 2]
        total += sum(abs(x - centre) for x in v[left:end])
    return total


@pytest.mark.parametrize("schedule", ["linear", "flow"])
def test_clusters_of_a_schedule_cannot_be_improved_by_moving_a_boundary(schedule: str) -> None:
    v = log_snr(schedule)
    starts = [0, *(round(b) for b in schedule_bounds(5, "clusters", schedule))]
    best = distance(v, starts)
    assert best < 0.99 * distance(v, [0, 200, 400, 600, 800])
    for i in range(1, 5):
        for step in (-7, -1, 1, 7):
            moved = sorted({*starts[:i], starts[i] + step, *starts[i + 1 :]})
            assert distance(v, moved) >= best - 1e-9
    in_sigma = schedule_bounds(5, "clusters", schedule, 1.0)
    assert [round(1000 * b) for b in in_sigma] == starts[1:]


def test_equal_parts_of_log_snr() -> None:
    v, bounds = log_snr("linear"), schedule_bounds(4, "log-snr", "linear")
    levels = [v[round(b)] for b in bounds]
    wanted = [v[0] + (v[-1] - v[0]) * i / 4 for i in (1, 2, 3)]
    assert max(abs(a - b) for a, b in zip(levels, wanted, strict=True)) < 0.2
    for arguments in ((4, "time", "linear"), (4, "log-snr", "cosine")):
        with pytest.raises(OptionError, match="no such"):
            schedule_bounds(*arguments)
    with pytest.raises(OptionError, match="give no bounds"):
        support.realised("ant", DIT, bounds=[1.0, 2.0, 3.0, 4.0])


@pytest.mark.parametrize("name", [DIT, FLUX])
def test_models_have_one_network_per_interval(name: str, tmp_path: Path) -> None:
    options = {"noise_schedule": "flow", "timesteps": 1.0} if name == FLUX else {}
    model = support.realised("ant", name, **options)
    support.check_runs(model, name)
    support.check_equal(model, name)
    support.check_learns(model, name, training=True, routers=False)
    layer = next(iter(support.layers(model).values()))
    bounds = schedule_bounds(5, "clusters", options.get("noise_schedule", "linear"), options.get("timesteps", 1000.0))
    assert layer.selector.bounds == bounds
    t = torch.tensor([bounds[0], bounds[1] - 1e-3, 0.99 * options.get("timesteps", 1000.0)])
    assert layer.selector.index(t).flatten().tolist() == [1, 1, 4]
    if name == DIT:
        support.check_saves(model, name, tmp_path)
