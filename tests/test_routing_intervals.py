"""Interval builders against brute force and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefx.errors import InputError, OptionError
from moefx.routing import intervals as iv


def brute_force(values: list[float], count: int) -> float:
    best = math.inf
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        starts, total = [0, *cuts], 0.0
        for left, end in zip(starts, [*cuts, len(values)], strict=True):
            centre = values[(left + end - 1 + 1) // 2]
            total += sum(abs(value - centre) for value in values[left:end])
        best = min(best, total)
    return best


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=9), st.data())
@settings(deadline=None, max_examples=60)
def test_clusters_are_the_best_of_all_partitions(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    starts = iv.clustered_intervals(values, count)
    assert starts[0] == 0
    assert len(starts) == count
    assert all(a < b for a, b in itertools.pairwise(starts))
    assert starts[-1] < len(values)
    assert iv.interval_cost(values, starts) == pytest.approx(brute_force(values, count), abs=1e-9)


def test_clusters_find_groups_and_split_them_first() -> None:
    values = [0.0] * 5 + [10.0] * 3 + [11.0] * 4
    assert iv.clustered_intervals(values, 2) == [0, 5]
    assert iv.clustered_intervals(values, 3) == [0, 5, 8]
    assert iv.interval_cost(values, [0, 5, 8]) == 0


def test_a_published_schedule_in_five_intervals() -> None:
    betas = np.linspace(1e-4, 0.02, 1000)
    log_snr = iv.log_snr_of_alphas(np.cumprod(1 - betas))
    clustered = iv.clustered_intervals(log_snr, 5)
    others = [iv.uniform_intervals(1000, 5), iv.snr_intervals(log_snr, 5)]
    assert iv.interval_cost(log_snr, clustered) < min(iv.interval_cost(log_snr, starts) for starts in others)
    lengths = np.diff([*clustered, 1000])
    assert lengths[0] < 200 < lengths.max()  # the log-SNR falls fastest at the first timesteps


@given(st.integers(1, 200), st.data())
@settings(deadline=None)
def test_uniform_intervals_cover_all_and_differ_by_one(timesteps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, timesteps))
    lengths = np.diff([*iv.uniform_intervals(timesteps, count), timesteps])
    assert lengths.sum() == timesteps
    assert lengths.max() - lengths.min() <= 1
    assert lengths.min() >= 1


def test_equal_parts_of_the_log_snr() -> None:
    assert iv.snr_intervals([0.0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 2) == [0, 5]
    assert iv.snr_intervals([10.0, 9.9, 9.8, 5.1, 4.9, 0.0], 2) == [0, 4]
    # All but one timestep lie in the first part: the others get one each.
    assert iv.snr_intervals([0.0, 0.1, 0.2, 10.0], 4) == [0, 1, 2, 3]


def test_shift_lowers_the_log_snr_by_a_constant() -> None:
    sigmas = np.linspace(0.05, 0.95, 19)
    plain, shifted = iv.log_snr_of_sigmas(sigmas), iv.log_snr_of_sigmas(sigmas, shift=3.0)
    np.testing.assert_allclose(np.subtract(plain, shifted), 2 * math.log(3.0), rtol=1e-12)
    np.testing.assert_allclose(plain[9], 0.0, atol=1e-12)
    alphas = 1 - sigmas[:3]
    np.testing.assert_allclose(iv.log_snr_of_alphas(alphas), np.log(alphas / sigmas[:3]), rtol=1e-12)


def test_every_timestep_has_one_interval_on_the_device_too() -> None:
    starts = iv.uniform_intervals(1000, 7)
    times = torch.cat([torch.arange(1000), torch.tensor([-5, 1200])])
    found = iv.interval_index(times, torch.tensor(starts))
    assert found.tolist() == [iv.interval_of(starts, t) for t in times.tolist()]
    counts = torch.bincount(found[:1000], minlength=7)
    assert counts.tolist() == np.diff([*starts, 1000]).tolist()
    assert iv.interval_index(torch.tensor([142.5]), torch.tensor(starts, dtype=torch.float32)).item() == 1


def test_impossible_intervals_are_refused() -> None:
    with pytest.raises(OptionError, match="4 intervals"):
        iv.uniform_intervals(3, 4)
    with pytest.raises(InputError, match="rise and fall"):
        iv.snr_intervals([0.0, 1.0, 0.5], 2)
    with pytest.raises(InputError, match="not finite"):
        iv.clustered_intervals([0.0, math.inf], 2)
    with pytest.raises(InputError, match="outside"):
        iv.log_snr_of_sigmas([0.0, 0.5])
