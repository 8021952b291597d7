"""Constants of the cost model from measured times: found again, kept, read, and what happens without them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from moefx.codegen import LinearSpec, target
from moefx.codegen.calibrate import LOADS, Case, calibrate, calibrate_device, cases, fit, measure
from moefx.codegen.cost import Constants, constants_of, constants_path, estimate
from moefx.codegen.schedule import ranked
from moefx.errors import InputError
from tests.codegen_support import down_projection, up_projection

DEVICE = target("sm_90")
TRUE = Constants(peak=0.62, bandwidth=0.83, fill_s=2.5e-6)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    constants_of.cache_clear()
    yield
    constants_of.cache_clear()


def specs() -> list[LinearSpec]:
    return [up_projection(), down_projection()]


def clock(case: Case) -> float:
    """A device that is exactly as the model says, with constants of its own."""
    return estimate(case.spec, case.schedule, DEVICE, case.load, case.experts, constants=TRUE).seconds


def test_the_constants_of_a_device_are_found_again_and_kept() -> None:
    before = estimate(up_projection(), ranked(up_projection(), DEVICE, 1024, 8)[0], DEVICE, 1024, 8).seconds
    found = calibrate(DEVICE, "a device", clock, specs())
    for name in ("peak", "bandwidth", "fill_s"):
        assert math.isclose(getattr(found, name), getattr(TRUE, name), rel_tol=0.02), name
    assert constants_of(DEVICE) == found, "later estimates use them"
    after = estimate(up_projection(), ranked(up_projection(), DEVICE, 1024, 8)[0], DEVICE, 1024, 8).seconds
    assert after > 1.3 * before


def test_noise_and_a_broken_schedule_do_not_mislead() -> None:
    chosen = cases(specs(), DEVICE)

    def noisy(case: Case) -> float:
        if case is chosen[0]:
            raise RuntimeError("PassManager::run failed")
        number = chosen.index(case)
        return clock(case) * (3.0 if number == 4 else 1 + 0.04 * (-1) ** number)

    measured = measure(chosen, noisy)
    assert len(measured) == len(chosen) - 1
    found = fit(measured, DEVICE)
    assert math.isclose(found.peak, TRUE.peak, rel_tol=0.1)
    assert math.isclose(found.bandwidth, TRUE.bandwidth, rel_tol=0.1)


def test_few_rows_are_bound_by_weights_and_many_by_products() -> None:
    for spec in specs():
        few, many = (estimate(spec, ranked(spec, DEVICE, load, 8)[0], DEVICE, load, 8) for load in (16, 1024))
        assert few.is_memory_bound
        assert not many.is_memory_bound


def test_few_rows_cost_what_their_weights_weigh() -> None:
    """The floor of few rows per expert is the bytes of the weights over the bandwidth, and tiles are of 16 rows."""
    for spec in specs():
        for experts in (8, 64):
            best = ranked(spec, DEVICE, 16, experts)[0]
            found = estimate(spec, best, DEVICE, 16, experts)
            weights = experts * 4608 * 1152 * 2 / (DEVICE.memory_tb_per_s * 1e12)
            assert best.block_m == 16
            assert weights * 0.999 < found.floor_s < 1.1 * weights
            assert found.seconds < 1.3 * found.floor_s


def test_calibration_stops_in_time_and_has_seen_every_load() -> None:
    chosen = cases(specs(), DEVICE)
    assert {case.load for case in chosen[:3]} == set(LOADS), "whoever stops early has seen them all"
    assert measure(chosen, clock, seconds=-1.0) == {}


def test_a_damaged_file_leaves_the_priors(caplog: pytest.LogCaptureFixture) -> None:
    constants_path(DEVICE).parent.mkdir(parents=True)
    for text in ("{", '{"peak": "much"}'):
        constants_path(DEVICE).write_text(text)
        constants_of.cache_clear()
        assert constants_of(DEVICE) == Constants()
    assert caplog.text.count("keeps its priors") == 2
    assert constants_of(target("sm_80")) == Constants()


def test_too_few_cases_and_no_device_are_refused() -> None:
    with pytest.raises(InputError, match="1 measured cases"):
        fit({cases(specs(), DEVICE)[0]: 1.0}, DEVICE)
    if not has_device():
        with pytest.raises(InputError, match="no GPU"):
            calibrate_device()


def has_device() -> bool:
    import torch

    return torch.cuda.is_available()
