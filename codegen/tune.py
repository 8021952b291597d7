"""Let a device decide among a few schedules, once per shape class, and remember it on disk.

A class is named by spec, device, Triton version, and rows per expert and experts rounded to powers of two: never by a
number of tokens.  What does not compile, does not fit or computes something else than torch is pruned.  Nothing is
timed with ``MOEFX_AUTOTUNE=0``, while a CUDA graph is captured, or once a process has spent its budget
(``MOEFX_AUTOTUNE_SECONDS``, 60 by default): then the model's choice is used.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moefx.codegen import store
from moefx.codegen.schedule import Schedule, choose, row_tile, short_list
from moefx.codegen.spec import LinearSpec, digest
from moefx.codegen.targets import Target, target_of

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

#: Seconds that one call of a schedule takes; raises if it does not compile, run, or agree with torch.
Timer = Callable[[Schedule], float]

DEFAULT_BUDGET_S = 60.0
#: A schedule's result is compared in so many rows of so many experts; bfloat16 results differ by 4e-3.
_SAMPLED_EXPERTS, _SAMPLED_ROWS, _TOLERANCE = 8, 16, 2e-2
_spent_s = 0.0
_chosen: dict[str, Schedule] = {}


@dataclass(frozen=True)
class ShapeClass:
    """What a measured choice holds for."""

    spec: LinearSpec
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

    def candidates(self) -> tuple[Schedule, ...]:
        """Return the schedules to time, the model's choice first."""
        return short_list(self.spec, self.target, self.load, self.experts, self.block_m)


def is_enabled() -> bool:
    """Whether schedules may be timed."""
    return os.environ.get("MOEFX_AUTOTUNE", "1") not in ("0", "off", "false")


def schedule_for(spec: LinearSpec, target: Target, load: int, experts: int, block_m: int | None = None) -> Schedule:
    """Return the schedule to run: a measured one on a device that is present, else the model's."""
    block_m = block_m or row_tile(load)
    device = _device_of(target)
    if device is None or not is_enabled():
        return choose(spec, target, load, experts, block_m)
    import torch

    shape = ShapeClass(spec, target, torch.cuda.get_device_name(device), load, experts, block_m)
    return decide(shape, lambda: DeviceTimer(shape, device), may_time=not torch.cuda.is_current_stream_capturing())


def decide(shape: ShapeClass, timer: Callable[[], Timer], may_time: bool = True) -> Schedule:
    """Return the choice for a class: remembered, read, or timed with what ``timer()`` returns."""
    known = _chosen.get(shape.text) or _read(shape)
    if known is None:
        if not may_time or _spent_s >= _budget_s():
            return choose(shape.spec, shape.target, shape.load, shape.experts, shape.block_m)
        known = _time(shape, timer())
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


def _time(shape: ShapeClass, timer: Timer) -> Schedule:
    """Time the candidates, keep what was found, and return the fastest; the model's choice if none ran."""
    global _spent_s
    start = time.perf_counter()
    seconds: dict[Schedule, float] = {}
    pruned: dict[Schedule, str] = {}
    candidates = shape.candidates()
    for schedule in candidates:
        try:
            seconds[schedule] = timer(schedule)
        except Exception as error:  # a compiler may raise anything; it is the reason why the candidate is out
            pruned[schedule] = f"{type(error).__name__}: {error}"[:500]
            logger.info("pruned %s: %s", schedule.describe(), pruned[schedule])
    best = min(seconds, key=seconds.__getitem__) if seconds else candidates[0]
    _spent_s += time.perf_counter() - start
    logger.info(
        "timed %d schedules of %s in %.1f s: %s",
        len(candidates), shape.spec.name, time.perf_counter() - start, best.describe(),
    )  # fmt: skip
    if seconds:
        _write(shape, best, seconds, pruned)
    return best


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


class DeviceTimer:
    """Time schedules on random rows, spread evenly over the experts, and check what they compute."""

    def __init__(self, shape: ShapeClass, device: torch.device) -> None:
        import torch

        spec, experts = shape.spec, shape.experts
        rows = shape.load * experts
        dtype: torch.dtype = getattr(torch, spec.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def draw(*sizes: int) -> torch.Tensor:
            made = torch.empty(sizes, device=device, dtype=dtype)
            return made.normal_(generator=generator)

        tokens = -(-rows // spec.top_k) if spec.gather else rows
        self.spec, self.rows, self.block_m = spec, rows, shape.block_m
        self.x = draw(tokens, spec.in_features)
        scale = spec.in_features**-0.5
        self.weights = [draw(experts, spec.weight_rows, spec.in_features).mul_(scale) for _ in range(spec.weights)]
        self.biases = [draw(experts, spec.weight_rows) for _ in range(spec.weights if spec.bias else 0)]
        self.order = torch.randperm(rows, device=device, generator=generator) if spec.gather else None
        self.offsets = torch.arange(experts + 1, device=device) * shape.load
        self.want = self._sample()

    def __call__(self, schedule: Schedule) -> float:
        """Return the median seconds of one call.

        Raises :class:`ArithmeticError` if the result is not what torch computes.
        """
        import torch
        from triton.testing import do_bench

        from moefx.codegen import runtime

        kernel = runtime.Projection(self.spec, schedule)
        tiles = runtime.tile_map(self.offsets, self.rows, self.block_m)
        out = torch.full((self.rows, self.spec.out_features), torch.nan, device=self.x.device, dtype=self.x.dtype)
        kept = out.new_empty((self.rows, self.spec.weight_rows * self.spec.weights)) if self.spec.keep else None

        def call() -> torch.Tensor:
            return kernel(self.x, self.weights, self.biases, self.order, tiles, out, kept)

        call()
        self._compare(out)
        return float(do_bench(call, warmup=5, rep=20, return_mode="median")) / 1e3

    def _sampled_rows(self) -> list[slice]:
        """Return the first rows of some experts."""
        starts = self.offsets[:-1][:_SAMPLED_EXPERTS].tolist()
        load = self.rows // (self.offsets.shape[0] - 1)
        return [slice(start, start + min(_SAMPLED_ROWS, load)) for start in starts]

    def _sample(self) -> torch.Tensor:
        """Return what the kernel is to write into the sampled rows, by torch in float32 and float64."""
        import torch

        found = []
        for expert, rows in enumerate(self._sampled_rows()):
            source = torch.arange(rows.start, rows.stop, device=self.x.device)
            if self.order is not None:
                source = self.order[rows] // self.spec.top_k
            x = self.x[source].float()
            z = [x @ weight[expert].float().t() for weight in self.weights]
            if self.biases:
                z = [value + bias[expert].float() for value, bias in zip(z, self.biases, strict=True)]
            halves = z if len(z) == self.spec.halves else list(z[0].chunk(2, dim=1))
            found.append(self.spec.epilogue.evaluate(*halves))
        return torch.cat(found)

    def _compare(self, out: torch.Tensor) -> None:
        import torch

        got = torch.cat([out[rows] for rows in self._sampled_rows()]).double()
        error = float((got - self.want).norm() / self.want.norm())
        if not error < _TOLERANCE:
            raise ArithmeticError(f"relative error {error:.1e} against torch")
