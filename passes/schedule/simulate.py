"""The clock: when each task of a schedule starts and ends on each device.

A stream does its tasks in the order of the list, a task waits for those it comes after, and a collective for the
slowest device. So the next event of every stream is known from the events before it, and one pass over the list, for
all devices at once, gives the times of all events: no queue of events is needed.

Legend: N tasks, G devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from moefx.errors import PlanError
from moefx.passes.schedule.task import STREAMS, Task

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Timeline:
    """Start and end of every task on every device.

    Args:
        tasks: in the order of the list.
        start_s: ``[N, G]``.
        end_s: ``[N, G]``.
    """

    tasks: tuple[Task, ...]
    start_s: Array
    end_s: Array

    @property
    def total_s(self) -> float:
        """Time until the last device is done."""
        return float(self.end_s.max(initial=0.0))

    def busy_s(self, stream: str) -> Array:
        """Return how long a stream works on each device, ``[G]``; a collective that waits for others does not work."""
        mine = [n for n, task in enumerate(self.tasks) if task.stream == stream]
        return np.asarray((self.end_s[mine] - self.start_s[mine]).sum(axis=0))

    @property
    def exposed_s(self) -> Array:
        """Time of each device in which it does not compute, ``[G]``."""
        return self.total_s - self.busy_s("compute")

    @property
    def wire_bytes(self) -> float:
        """Bytes that all collectives move."""
        return sum(task.wire_bytes for task in self.tasks)

    def peak_bytes(self) -> Array:
        """Return the most bytes of buffers that each device holds at one time, ``[G]``."""
        users: dict[str, list[int]] = {}
        for n, task in enumerate(self.tasks):
            for name in task.after:
                users.setdefault(name, []).append(n)
        holding = [n for n, task in enumerate(self.tasks) if np.any(np.asarray(task.holds_bytes) > 0)]
        devices = self.start_s.shape[1]
        if not holding:
            return np.zeros(devices)
        begin = self.start_s[holding]
        until = np.stack([self.end_s[[n, *users.get(self.tasks[n].name, ())]].max(axis=0) for n in holding])
        size = np.stack([np.broadcast_to(self.tasks[n].holds_bytes, devices) for n in holding])
        times = np.concatenate([until, begin])  # at one time, what ends goes before what begins
        order = np.argsort(times, axis=0, kind="stable")
        steps = np.take_along_axis(np.concatenate([-size, size]), order, axis=0)
        return np.asarray(steps.cumsum(axis=0).max(axis=0))


def simulate(tasks: Sequence[Task], devices: int) -> Timeline:
    """Run a schedule on the clock.

    Raises:
        PlanError: a task comes after one that is not earlier in the list, or two have one name.
    """
    index = {task.name: n for n, task in enumerate(tasks)}
    if len(index) < len(tasks):
        raise PlanError("simulate a schedule", found="two tasks of one name", do="name each task once")
    start, end = np.zeros((len(tasks), devices)), np.zeros((len(tasks), devices))
    free = {stream: np.zeros(devices) for stream in STREAMS}
    for n, task in enumerate(tasks):
        earlier = [index.get(name, n) for name in task.after]
        if any(k >= n for k in earlier):
            raise PlanError(
                "simulate a schedule",
                found=f"{task.name} comes after {', '.join(task.after)}, not all of them earlier in the list",
                do="list tasks after those they wait for",
            )
        ready = free[task.stream]
        for k in earlier:
            ready = np.maximum(ready, end[k])
        if task.collective:
            ready = np.full(devices, ready.max(initial=0.0))
        start[n] = ready
        end[n] = ready + (np.max(task.seconds) if task.collective else task.seconds)
        free[task.stream] = end[n]
    return Timeline(tuple(tasks), start, end)


def critical_path(tasks: Sequence[Task]) -> float:
    """Return the longest chain of tasks: with any number of streams no order can be faster.

    Of a task that takes different times on different devices the shortest counts, unless all take part.
    """
    graph = nx.DiGraph()
    for task in tasks:
        graph.add_node(task.name)
        for name in task.after:
            graph.add_edge(name, task.name)
    longest: dict[str, float] = {}
    cost = {t.name: float(np.max(t.seconds) if t.collective else np.min(t.seconds)) for t in tasks}
    for name in nx.topological_sort(graph):
        longest[name] = cost[name] + max((longest[p] for p in graph.predecessors(name)), default=0.0)
    return max(longest.values(), default=0.0)
