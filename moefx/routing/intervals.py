"""Intervals of timesteps for timestep experts: uniform in t, uniform in log-SNR, or clustered (ANT, arXiv 2306.00354).

Intervals are Python lists: they are made once, before training, and travel in options. ``starts`` are the first indices
of N intervals of T timesteps, ascending from 0; interval i holds timesteps ``starts[i] … starts[i + 1] − 1``, half
open, so that a boundary belongs to one interval only. ``starts[1:]`` are the ``bounds`` of the interval selector.

Legend: T timesteps, N intervals.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moefx.errors import InputError, OptionError

Values = Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]


def uniform_intervals(timesteps: int, count: int) -> list[int]:
    """Return the starts of ``count`` intervals of T timesteps whose lengths differ by at most one.

    Raises:
        OptionError: fewer timesteps than intervals.
    """
    _check(timesteps, count)
    return [timesteps * i // count for i in range(count)]


def snr_intervals(log_snr: Values, count: int) -> list[int]:
    """Return the starts of ``count`` intervals that span equal parts of a monotonic log-SNR, none of them empty.

    A timestep belongs to the part in which its log-SNR lies; where that leaves a part empty, its neighbours give it a
    timestep.

    Args:
        log_snr: ``[T]``, strictly monotonic, see `log_snr_of_alphas` and `log_snr_of_sigmas`.
        count: N.

    Raises:
        InputError: not monotonic, or not finite.
        OptionError: fewer timesteps than intervals.
    """
    values = _monotonic(log_snr)
    _check(len(values), count)
    distance = np.abs(values - values[0]) / abs(values[-1] - values[0]) if len(values) > 1 else np.zeros(1)
    starts = [int(np.searchsorted(distance, i / count - 1e-12)) for i in range(count)]
    for i in range(1, count):
        starts[i] = max(starts[i], starts[i - 1] + 1)
    for i in range(count - 1, 0, -1):
        starts[i] = min(starts[i], len(values) - (count - i))
    return starts


def clustered_intervals(cost: Values, count: int) -> list[int]:
    """Return the starts of the ``count`` intervals with the least ``Σ_intervals Σ_t |v_t − v_centre|``.

    Dynamic programming over all partitions into consecutive intervals, as in ANT: the centre of the timesteps l … r is
    timestep ``(l + r + 1) // 2``. v is the log-SNR or the SNR, or any other affinity of timesteps on a line. O(N·T²)
    time, O(T²) memory; among equal partitions the one with the earliest last start wins.

    Args:
        cost: v, ``[T]``.
        count: N.

    Raises:
        InputError: v is not finite.
        OptionError: fewer timesteps than intervals.
    """
    v = _finite(cost)
    total = len(v)
    _check(total, count)
    within = _interval_costs(v)
    best = within[0].copy()  # best[r]: least cost of timesteps 0 … r in the intervals so far
    choice: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
    for _ in range(1, count):
        # Candidate [l, r]: a last interval l … r behind the best partition of 0 … l − 1.
        candidates = np.full((total, total), np.inf)
        candidates[1:] = best[:-1, None] + within[1:]
        choice.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
    starts, end = [], total - 1
    for picked in reversed(choice):
        start = int(picked[end])
        starts.append(start)
        end = start - 1
    return [0, *reversed(starts)]


def _interval_costs(
    v: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Return ``[l, r]`` → the cost of one interval l … r; infinite for l > r."""
    total = len(v)
    costs = np.full((total, total), np.inf)
    for left in range(total):
        right = np.arange(left, total)
        centre = v[(left + right + 1) // 2]
        distance = np.abs(v[left:][:, None] - centre[None, :])
        costs[left, left:] = np.tril(distance.T).sum(axis=1)
    return costs


def interval_cost(cost: Values, starts: Sequence[int]) -> float:
    """Return what `clustered_intervals` minimises, of given starts."""
    v = _finite(cost)
    ends = [*starts[1:], len(v)]
    spans = [(left, right - 1) for left, right in zip(starts, ends, strict=True)]
    return float(sum(np.abs(v[left : right + 1] - v[(left + right + 1) // 2]).sum() for left, right in spans))


@functools.cache
def schedule_bounds(count: int, cut: str, schedule: str, steps: float = 1000.0) -> tuple[float, ...]:
    """Return the inner boundaries of ``count`` intervals of the timesteps [0, steps), cut by a noise schedule.

    Args:
        count: N.
        cut: ``log-snr``, equal parts of the log-SNR, or ``clusters``, ANT's least distance to a centre in log-SNR.
        schedule: ``linear`` (β from 0.0001 to 0.02) or ``scaled-linear`` (√β from √0.00085 to √0.012), each in 1000
            steps, or ``flow`` (σ = t / steps, as the model receives it, after any shift).
        steps: in the units that the model receives.

    Raises:
        OptionError: no such cut or schedule.
    """
    total = 1000
    if schedule == "flow":
        log_snr = log_snr_of_sigmas([(i + 0.5) / total for i in range(total)])
    elif schedule in ("linear", "scaled-linear"):
        linear = schedule == "linear"
        betas = np.linspace(1e-4, 0.02, total) if linear else np.linspace(0.00085**0.5, 0.012**0.5, total) ** 2
        log_snr = log_snr_of_alphas([float(kept) for kept in np.cumprod(1 - betas)])
    else:
        raise OptionError(f"cut {schedule!r}", found="no such noise schedule", do="use linear, scaled-linear or flow")
    if cut not in ("log-snr", "clusters"):
        raise OptionError(f"cut timesteps by {cut!r}", found="no such cut", do="use log-snr or clusters")
    starts = snr_intervals(log_snr, count) if cut == "log-snr" else clustered_intervals(log_snr, count)
    return tuple(start * steps / total for start in starts[1:])


def interval_of(starts: Sequence[int], timestep: float) -> int:
    """Return the interval of one timestep; beyond the ends, the first or the last."""
    return max(bisect_right(starts, timestep) - 1, 0)


def interval_index(timestep: Tensor, starts: Tensor) -> Tensor:
    """Return the interval of each timestep ``[B]``, int64, on the device and without a host sync.

    Args:
        timestep: ``[B]``, int or float, in the units of ``starts``.
        starts: ``[N]``, ascending.
    """
    index = torch.bucketize(timestep.to(starts.dtype), starts, right=True) - 1
    return index.clamp(min=0)


def log_snr_of_alphas(alphas_cumprod: Values) -> list[float]:
    """Return ``log(ᾱ_t / (1 − ᾱ_t))`` of a variance preserving schedule, ``[T]``."""
    alphas = _finite(alphas_cumprod)
    if not bool(((alphas > 0) & (alphas < 1)).all()):
        raise InputError("the log-SNR of a schedule", found="ᾱ outside (0, 1)", do="clip the schedule's ends")
    return [float(x) for x in np.log(alphas) - np.log1p(-alphas)]


def log_snr_of_sigmas(sigmas: Values, *, shift: float = 1.0) -> list[float]:
    """Return ``2 log((1 − σ)/σ)`` of a rectified flow ``x = (1 − σ) x₀ + σ ε``, ``[T]``.

    A scheduler's ``shift`` s moves σ to ``s σ / (1 + (s − 1) σ)`` before the model sees it, which lowers every log-SNR
    by 2 log s: intervals made for one shift are wrong for another, so cluster what the model will be trained on.
    """
    values = _finite(sigmas)
    if not bool(((values > 0) & (values < 1)).all()):
        raise InputError("the log-SNR of a flow", found="σ outside (0, 1)", do="leave the ends out")
    shifted = shift * values / (1 + (shift - 1) * values)
    return [float(x) for x in 2 * (np.log1p(-shifted) - np.log(shifted))]


def _finite(values: Values) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = np.asarray(values, dtype=np.float64).reshape(-1)
    if not np.isfinite(found).all():
        raise InputError("make intervals", found="values that are not finite", do="leave out the ends of the schedule")
    return found


def _monotonic(values: Values) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = _finite(values)
    steps = np.diff(found)
    if len(steps) and not (bool((steps > 0).all()) or bool((steps < 0).all())):
        raise InputError("make intervals of equal log-SNR", found="values that rise and fall", do="sort the timesteps")
    return found


def _check(timesteps: int, count: int) -> None:
    if not 1 <= count <= timesteps:
        raise OptionError(
            f"make {count} intervals",
            found=f"{timesteps} timesteps",
            do="use at least one and at most one per timestep",
        )
