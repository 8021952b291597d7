"""How ``gpu.py`` measures: interleaved rounds, cold caches, device events, graph replay, launches, memory.

On a CPU, where the script is only rehearsed, the same code runs with the host's clock and without graphs.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Timing:
    """Seconds of one call: median, and the 20th and 80th percentile."""

    median_s: float
    low_s: float
    high_s: float

    @classmethod
    def of(cls, seconds: list[float]) -> Timing:
        """Summarise."""
        ordered = sorted(seconds)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)])


class Clock:
    """Times calls on one device."""

    def __init__(self, device: torch.device, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.is_cuda = device.type == "cuda"
        size = _FLUSH_BYTES if self.is_cuda else 1
        self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def interleaved(self, calls: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        """Return the timing of each call; every round runs all, in an order of its own, with a cold L2 cache."""
        shuffle = random.Random(0)
        marks: dict[str, list[Any]] = {name: [] for name in calls}
        for call in calls.values():
            call()
        for _ in range(self.rounds):
            for name in shuffle.sample(sorted(calls), len(calls)):
                self._flush.zero_()
                marks[name].append(self._timed(calls[name]))
        if self.is_cuda:
            torch.cuda.synchronize()
        return {name: Timing.of([self._seconds(mark) for mark in made]) for name, made in marks.items()}

    def _timed(self, call: Callable[[], Any]) -> Any:
        if self.is_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            return start, end
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    @staticmethod
    def _seconds(mark: Any) -> float:
        return mark if isinstance(mark, float) else mark[0].elapsed_time(mark[1]) / 1e3

    def first_call_s(self, call: Callable[[], Any]) -> float:
        """Return the wall time of a first call: compilation and tuning included."""
        begin = time.perf_counter()
        call()
        if self.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Return the replay of a captured call. Raises whatever forbids the capture, such as a host synchronisation."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def launches(self, call: Callable[[], Any]) -> int | None:
        """Return how many kernels one call starts."""
        if not self.is_cuda:
            return None
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        return sum(event.count for event in profiled.key_averages() if event.device_type.name == "CUDA")

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Return how much memory one call takes beyond what is held before it."""
        if not self.is_cuda:
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
