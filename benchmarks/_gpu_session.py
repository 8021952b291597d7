"""What the parts of ``gpu.py`` share: options, clock, time left, results so far, and calls ready to be timed."""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from _gpu_cases import Build, NotHere
from _gpu_clock import Clock

Call = Callable[[], Any]


@dataclass
class Session:
    """Options, device and what was found so far."""

    options: argparse.Namespace
    device: torch.device
    dtype: torch.dtype
    clock: Clock
    builders: dict[str, Build]
    deadline: float
    errors: list[dict[str, Any]] = field(default_factory=list)
    calibration: dict[str, Any] = field(default_factory=dict)
    schedules: list[dict[str, Any]] = field(default_factory=list)
    ffn: list[dict[str, Any]] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def left_s(self, share: float = 1.0) -> float:
        """Return the seconds until a share of the budget is spent."""
        return self.deadline - (1 - share) * float(self.options.budget) - time.monotonic()

    def is_late(self, share: float = 1.0) -> bool:
        """Whether a share of the budget is spent."""
        return self.left_s(share) < 0

    def leave_out(self, what: str, error: BaseException | str) -> None:
        """Note what could not be measured, and why, in one line."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        self.left_out.append(f"{what}: {' '.join(text.split())[:240]}")

    def free(self) -> None:
        """Give memory back between problems."""
        gc.collect()
        if self.clock.is_cuda:
            torch.cuda.empty_cache()

    def prepared(self, makers: dict[str, Callable[[], Call]], what: str) -> tuple[dict[str, Call], dict[str, Any]]:
        """Make and first-call everything; note what the first call took and what a later one needs."""
        calls: dict[str, Call] = {}
        facts: dict[str, Any] = {}
        for name, make in makers.items():
            try:
                calls[name], facts[name] = self._ready(make)
            except NotHere:
                continue
            except Exception as error:  # out of memory, unsupported sizes: a result, not the end of the run
                self.leave_out(f"{name} on {what}", error)
        return calls, facts

    def _ready(self, make: Callable[[], Call]) -> tuple[Call, dict[str, Any]]:
        from moefx.codegen import tune

        before = tune.spent_s()
        call = make()
        first = self.clock.first_call_s(call)
        peak = self.clock.peak_bytes(call)
        return call, {
            "first_call_s": first,
            "tuning_s": tune.spent_s() - before,
            "launches": self.clock.launches(call),
            "peak_mb": None if peak is None else peak / 1e6,
        }

    def modes(self, calls: dict[str, Call], what: str) -> dict[str, dict[str, Call]]:
        """Return the calls as they are, and as replays of captured graphs where there are any."""
        if not self.clock.is_cuda:
            return {"eager": calls}
        found = {}
        for name, call in calls.items():
            if "loop" in name or "padded" in name:
                continue  # they read counts on the host; a failed capture would poison the stream
            try:
                found[name] = self.clock.graphed(call)
            except Exception as error:
                self.leave_out(f"graph of {name} on {what}", error)
                torch.cuda.synchronize()
        return {"eager": calls, "graph": found} if found else {"eager": calls}
