"""Let a device decide among a few schedules, once per shape class, and remember it on disk.

A class is named by spec, device, Triton version, and rows per expert and experts rounded to powers of two: never by a
number of tokens.  Forward projections, their gradients and routed heads are decided alike.  What does not compile, does
not fit or computes something else than torch is pruned.

A first call is bounded: at most five schedules of a class, compiled ahead in processes of their own, several at a time,
and so many seconds of one process for all of it (``MOEFX_AUTOTUNE_SECONDS``, 15 by default).  What is not ready by then
is stopped, the best so far is used, and a later process goes on where compiled kernels were kept.  Nothing is timed
with ``MOEFX_AUTOTUNE=0``, or while a CUDA graph is captured: then the model's choice is used.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefx.codegen import store
from moefx.codegen.schedule import SHORT_LIST, Schedule, choose, row_tile, short_list
from moefx.codegen.spec import Kernel, LinearSpec, digest
from moefx.codegen.targets import Target, target_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


#: Seconds that a call takes, on whatever clock.
Stopwatch = Callable[[Callable[[], Any]], float]


class Timer(ABC):
    """Whatever compiles and times the schedules of one class."""

    @abstractmethod
    def prune(self, schedules: Sequence[Schedule], seconds: float) -> dict[Schedule, str | None]:
        """Compile, for at most so long; return why some will not do, and ``None`` for those that were not ready."""

    @abstractmethod
    def __call__(self, schedule: Schedule) -> float:
        """Return the seconds that one call takes; raise if it does not compile, run, or agree with torch."""


DEFAULT_BUDGET_S = 15.0
#: Share of the time left that compilation may take; the rest is for timing what was compiled.
_COMPILE_SHARE = 0.75
#: Relative error of a schedule's results against torch; bfloat16 results differ by 4e-3.
_TOLERANCE = 2e-2
_clock = time.perf_counter
_spent_s = 0.0
_chosen: dict[str, Schedule] = {}


@dataclass(frozen=True)
class ShapeClass:
    """What a measured choice holds for."""

    spec: LinearSpec | Kernel
    target: Target
    device: str
    load: int
    experts: int
    block_m: int

    @property
    def text(self) -> str:
        """The complete name; equal text means the same choice."""
        experts = 1 << max(0, self.experts - 1).bit_length()
        sizes = f"load={self.load} experts={experts} rows={self.block_m}"
        return f"{self.spec.text}\n{self.target.name} {self.device} triton={_triton_version()}\n{sizes}"

    @property
    def path(self) -> Path:
        """Where the choice is kept."""
        return store.cache_folder() / "schedules" / f"{digest(self.text)[:32]}.json"

    @property
    def preferred(self) -> Schedule:
        """The schedule that is taken without a device."""
        if isinstance(self.spec, LinearSpec):
            return choose(self.spec, self.target, self.load, self.experts, self.block_m)
        return self.spec.schedule(self.target, self.load, self.block_m)

    def candidates(self) -> tuple[Schedule, ...]:
        """Return the schedules to time, the preferred one first."""
        if isinstance(self.spec, LinearSpec):
            return short_list(self.spec, self.target, self.load, self.experts, self.block_m)
        return self.spec.candidates(self.target, self.load, self.block_m)[:SHORT_LIST]


def is_enabled() -> bool:
    """Whether schedules may be timed."""
    return os.environ.get("MOEFX_AUTOTUNE", "1") not in ("0", "off", "false")


def schedule_for(
    spec: LinearSpec | Kernel, target: Target, load: int, experts: int, block_m: int | None = None
) -> Schedule:
    """Return the schedule to run: a measured one on a device that is present, else the model's."""
    device = _device_of(target)
    name = "" if device is None else _name_of(device)
    shape = ShapeClass(spec, target, name, load, experts, block_m or row_tile(load))
    if device is None or not is_enabled():
        return shape.preferred
    return decide(shape, lambda: DeviceTimer(shape, device), may_time=not _is_capturing())


def decide(shape: ShapeClass, timer: Callable[[], Timer], may_time: bool = True) -> Schedule:
    """Return the choice for a class: remembered, read, or timed with what ``timer()`` returns."""
    known = _chosen.get(shape.text) or _read(shape)
    if known is None:
        if not may_time or _left_s() <= 0 or len(shape.candidates()) == 1:
            return shape.preferred
        known = _time(shape, timer)
    _chosen[shape.text] = known
    return known


def clear() -> None:
    """Forget the choices and the time spent in this process; files stay."""
    global _spent_s
    _chosen.clear()
    _spent_s = 0.0


def spent_s() -> float:
    """Return the seconds that timing has taken in this process, compilation included."""
    return _spent_s


def _budget_s() -> float:
    try:
        return float(os.environ.get("MOEFX_AUTOTUNE_SECONDS", DEFAULT_BUDGET_S))
    except ValueError:
        return DEFAULT_BUDGET_S


def _left_s() -> float:
    return _budget_s() - _spent_s


def _time(shape: ShapeClass, timer: Callable[[], Timer]) -> Schedule:
    """Time the candidates and return the fastest of those that were ready; keep the choice if all were."""
    global _spent_s
    start, candidates = _clock(), shape.candidates()
    deadline = start + _left_s()
    try:
        made = timer()
        pruned = made.prune(candidates, _COMPILE_SHARE * (deadline - _clock()))
    except MemoryError as error:
        logger.warning("%s is not timed: no room beside the model (%s)", shape.spec.name, error)
        return shape.preferred
    seconds: dict[Schedule, float] = {}
    for schedule in candidates:
        if schedule in pruned:
            continue
        if _clock() >= deadline:
            pruned[schedule] = None
            continue
        try:
            seconds[schedule] = made(schedule)
        except MemoryError:
            pruned[schedule] = None  # another process may have the room
        except Exception as error:  # a compiler may raise anything; it is the reason why the candidate is out
            pruned[schedule] = f"{type(error).__name__}: {error}"[:500]
    taken_s = _clock() - start
    _spent_s += taken_s
    _report(shape, seconds, pruned, taken_s)
    reasons = {schedule: reason for schedule, reason in pruned.items() if reason is not None}
    best = _best(candidates, seconds, reasons)
    if seconds and len(reasons) == len(pruned):
        _write(shape, best, seconds, reasons)
    return best


def _best(candidates: Sequence[Schedule], seconds: dict[Schedule, float], faulty: dict[Schedule, str]) -> Schedule:
    """Return the fastest; if none was timed, the preferred one of those that are not known to be faulty."""
    if seconds:
        return min(seconds, key=seconds.__getitem__)
    return next((schedule for schedule in candidates if schedule not in faulty), candidates[0])


def _report(
    shape: ShapeClass, seconds: dict[Schedule, float], pruned: dict[Schedule, str | None], taken_s: float
) -> None:
    for schedule, reason in pruned.items():
        logger.info("pruned %s: %s", schedule.describe(), reason or "not ready in time")
    logger.info("timed %d schedules of %s in %.1f s", len(seconds), shape.spec.name, taken_s)


def _write(shape: ShapeClass, best: Schedule, seconds: dict[Schedule, float], pruned: dict[Schedule, str]) -> None:
    entry: dict[str, Any] = {
        "class": shape.text,
        "schedule": dataclasses.asdict(best),
        "seconds": {schedule.describe(): value for schedule, value in seconds.items()},
        "pruned": {schedule.describe(): reason for schedule, reason in pruned.items()},
    }
    store.write(shape.path, json.dumps(entry, indent=1) + "\n")


def _read(shape: ShapeClass) -> Schedule | None:
    """Return the kept choice; a file that is damaged, or of another class, counts as none."""
    try:
        entry = json.loads(shape.path.read_text())
        return Schedule(**entry["schedule"]) if entry["class"] == shape.text else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s cannot be read (%s); its schedules are timed again", shape.path, error)
        return None


def _triton_version() -> str:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _device_of(target: Target) -> torch.device | None:
    """Return the current device if it is one of ``target``'s family."""
    if target.is_interpreter:
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    return device if target_of(device) == target else None


def _name_of(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device)


def _is_capturing() -> bool:
    import torch

    return torch.cuda.is_current_stream_capturing()


class DeviceTimer(Timer):
    """Times schedules on a device, and checks what they compute."""

    def __init__(self, shape: ShapeClass, device: torch.device, clock: Stopwatch | None = None) -> None:
        from moefx.codegen.trials import trial_of

        self.shape, self.device = shape, device
        with _room():
            self.trial = trial_of(shape, device)
        self.clock = clock or median_s

    def prune(self, schedules: Sequence[Schedule], seconds: float) -> dict[Schedule, str | None]:
        """Compile in processes of their own what is to be launched; Triton finds it in its cache then."""
        from moefx.codegen import aot
        from moefx.codegen.reasons import CannotLower

        if self.shape.target.arch != _arch_of(self.device):
            return {}  # compiled for another architecture than it will run on, it says nothing
        spec, target = self.shape.spec, self.shape.target
        with _room():
            jobs = [aot.launch_job(spec, one, self.trial.arguments(one), target) for one in schedules]
        pruned: dict[Schedule, str | None] = {}
        for schedule, found in zip(schedules, aot.compile_within(jobs, seconds), strict=True):
            if isinstance(found, aot.NotInTime):
                pruned[schedule] = None
            elif isinstance(found, CannotLower):
                pruned[schedule] = found.found
            elif problems := found.problems(target):
                pruned[schedule] = "; ".join(problems)
        return pruned

    def __call__(self, schedule: Schedule) -> float:
        """Return the median seconds of one call."""
        with _room():
            return self.clock(self.ready(schedule))

    def ready(self, schedule: Schedule) -> Callable[[], Any]:
        """Return the launch of a schedule, after a first one whose results were compared.

        Raises :class:`ArithmeticError` if they are not what torch computes.
        """
        from moefx.codegen.emit import emit

        launch = store.load(emit(self.shape.spec, schedule), self.shape.spec.name).launch
        arguments = self.trial.arguments(schedule)
        launch(*arguments)
        error = self.trial.error()
        if not error < _TOLERANCE:
            raise ArithmeticError(f"relative error {error:.1e} against torch")
        return lambda: launch(*arguments)


@contextlib.contextmanager
def _room() -> Iterator[None]:
    """Raise torch's lack of memory as Python's: a model may fill the device, and timing needs a part of it."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryError(str(error).partition("\n")[0]) from error


def median_s(call: Callable[[], Any]) -> float:
    """Return the median seconds of a call on the current device, with cold caches."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=5, rep=20, return_mode="median")) / 1e3


def _arch_of(device: torch.device) -> int | str:
    """Return what Triton compiles for on a device."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return int(properties.major * 10 + properties.minor)
