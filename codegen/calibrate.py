"""Fit the constants of the cost model to what a device was measured to do, and keep them.

The model (`moefx.codegen.cost`) starts from the vendor's peaks. What a device reaches of them, and what a tile costs
before its first product, is found by timing a few schedules of a few shapes, compute-bound and weight-bound ones, and
by least squares over the logarithms of the times: all shapes count alike, however long they take.
``python -m moefx.codegen.calibrate`` does so on the device that is present.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from moefx.codegen import cost, store
from moefx.codegen.cost import Constants
from moefx.codegen.schedule import Schedule, row_tile, short_list
from moefx.codegen.spec import LinearSpec
from moefx.codegen.targets import Target
from moefx.errors import InputError

logger = logging.getLogger(__name__)

#: Rows per expert that are timed: weights are the traffic of the first, products the work of the last.
LOADS = (16, 128, 1024)
EXPERTS, _SCHEDULES = 8, 2


@dataclass(frozen=True)
class Case:
    """One schedule of one projection under one load."""

    spec: LinearSpec
    schedule: Schedule
    load: int
    experts: int = EXPERTS


#: Seconds that a case takes; raises if it does not run.
Clock = Callable[[Case], float]


def cases(specs: Iterable[LinearSpec], target: Target, loads: Sequence[int] = LOADS) -> list[Case]:
    """Return what to time: for every projection and load the best schedules by the model as it is; loads take turns."""
    given = list(specs)
    return [
        Case(spec, schedule, load)
        for place in range(_SCHEDULES)
        for spec in given
        for load in loads
        for schedule in short_list(spec, target, load, EXPERTS, row_tile(load), _SCHEDULES)[place : place + 1]
    ]


def measure(chosen: Iterable[Case], clock: Clock, seconds: float = math.inf) -> dict[Case, float]:
    """Time the cases, for at most so long; one that does not run is left out, with its reason in the log."""
    found: dict[Case, float] = {}
    end = time.monotonic() + seconds
    for case in chosen:
        if time.monotonic() > end:
            break
        try:
            found[case] = clock(case)
        except Exception as error:  # a compiler may raise anything; it is the reason why the case is out
            logger.info("left out %s: %s: %s", case.schedule.describe(), type(error).__name__, error)
    return found


def fit(measured: dict[Case, float], target: Target) -> Constants:
    """Return the constants that explain the measured times best.

    Raises :class:`InputError` for fewer cases than constants.
    """
    from scipy.optimize import least_squares

    names = [field.name for field in dataclasses.fields(Constants)]
    if len(measured) < len(names):
        raise InputError(
            f"fit {len(names)} constants of the cost model",
            found=f"{len(measured)} measured cases",
            do="time more shapes",
        )

    def residuals(logarithms: Any) -> list[float]:
        constants = Constants(*(math.exp(value) for value in logarithms))
        return [
            math.log(
                cost.estimate(c.spec, c.schedule, target, c.load, c.experts, constants=constants).seconds / seconds
            )
            for c, seconds in measured.items()
        ]

    start = [math.log(getattr(Constants(), name)) for name in names]
    # A floor is a maximum of two terms, each of which only some cases feel: a smooth loss would be misled by outliers.
    found = least_squares(residuals, start, loss="soft_l1", f_scale=0.1)
    return Constants(*(math.exp(value) for value in found.x))


def keep(constants: Constants, target: Target, device: str, cases: int) -> bool:
    """Write the constants of a target into the cache, for this and later processes; false if the folder refuses."""
    entry = {"target": target.name, "device": device, "cases": cases, **dataclasses.asdict(constants)}
    written = store.write(cost.constants_path(target), json.dumps(entry, indent=1) + "\n")
    cost.constants_of.cache_clear()
    return written


def calibrate(
    target: Target, device: str, clock: Clock, specs: Iterable[LinearSpec] | None = None, seconds: float = math.inf
) -> Constants:
    """Time, fit and keep: the whole step, with any clock."""
    from moefx.codegen.table import standard_specs

    measured = measure(cases(specs or standard_specs(), target), clock, seconds)
    constants = fit(measured, target)
    keep(constants, target, device, len(measured))
    return constants


def calibrate_device(seconds: float = math.inf, specs: Iterable[LinearSpec] | None = None) -> Constants:
    """Calibrate for the device that is present, in about so many seconds.

    Raises :class:`InputError` if there is none, or too little time.
    """
    import torch

    from moefx.codegen.targets import target_of
    from moefx.codegen.tune import DeviceTimer, ShapeClass

    if not torch.cuda.is_available():
        raise InputError("calibrate the cost model", found="no GPU", do="run this on the machine that has one")
    device = torch.device("cuda", torch.cuda.current_device())
    target, name = target_of(device), torch.cuda.get_device_name(device)

    def clock(case: Case) -> float:
        shape = ShapeClass(case.spec, target, name, case.load, case.experts, case.schedule.block_m)
        return DeviceTimer(shape, device)(case.schedule)

    return calibrate(target, name, clock, specs, seconds)


if __name__ == "__main__":
    print(calibrate_device())
