"""What must hold before a schedule runs: one wait per launch, one order on all ranks, deadlines, memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefx.passes.schedule.simulate import Timeline, simulate
from moefx.passes.schedule.task import STREAMS, Task

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, and with which task."""

    kind: str
    task: str
    found: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.task}: {self.found}"


def lint(tasks: Sequence[Task], devices: int, *, memory_bytes: Array | float | None = None) -> list[Problem]:
    """Return everything that is wrong with a schedule; nothing if it can run.

    Args:
        tasks: in the order of issue.
        devices: G.
        memory_bytes: that each device has for buffers.
    """
    problems = _names(tasks)
    if problems:
        return problems
    problems += _waits(tasks)
    timeline = simulate(tasks, devices)
    problems += _deadlines(timeline)
    if memory_bytes is not None:
        peak = timeline.peak_bytes()
        over = peak - np.broadcast_to(memory_bytes, devices)
        if (over > 0).any():
            worst = int(over.argmax())
            found = f"device {worst} holds {peak[worst]:,.0f} bytes of buffers, {over[worst]:,.0f} too many"
            problems.append(Problem("memory", "schedule", found))
    return problems


def order_digest(tasks: Sequence[Task]) -> bytes:
    """Return a digest of the collectives in their order; ranks whose digests differ would wait for ever."""
    text = "\n".join(f"{t.name} {t.role} {t.layer} {t.chunk}" for t in tasks if t.collective)
    return hashlib.sha256(text.encode()).digest()


def _names(tasks: Sequence[Task]) -> list[Problem]:
    problems, seen = [], set()
    for task in tasks:
        if task.name in seen:
            problems.append(Problem("name", task.name, "used twice"))
        if task.stream not in STREAMS:
            problems.append(Problem("stream", task.name, f"no stream {task.stream!r}"))
        missing = [name for name in task.after if name not in seen]
        if missing:
            problems.append(Problem("order", task.name, f"waits for {', '.join(missing)}, not issued before it"))
        seen.add(task.name)
    return problems


def _waits(tasks: Sequence[Task]) -> list[Problem]:
    """Find exchanges that nothing waits for, or that a later exchange of the same rows does not follow."""
    waited = {name for task in tasks for name in task.after}
    last = max((t.layer for t in tasks), default=-1)
    problems = [
        Problem("wait", t.name, "nothing waits for this exchange")
        for t in tasks
        if t.collective and t.name not in waited and not (t.role == "combine" and t.layer == last)
    ]
    dispatched = {(t.layer, t.chunk) for t in tasks if t.role == "dispatch"}
    combined = {(t.layer, t.chunk) for t in tasks if t.role == "combine"}
    for layer, chunk in sorted(dispatched ^ combined):
        problems.append(
            Problem("pair", f"layer {layer}, chunk {chunk}", "a dispatch without a combine, or the reverse")
        )
    return problems


def _deadlines(timeline: Timeline) -> list[Problem]:
    """Find prefetches that end after the task they were made for could have started."""
    index = {task.name: n for n, task in enumerate(timeline.tasks)}
    problems = []
    for n, task in enumerate(timeline.tasks):
        if not task.deadline:
            continue
        if task.deadline not in index:
            problems.append(Problem("deadline", task.name, f"no task {task.deadline!r}"))
            continue
        late = float((timeline.end_s[n] - _could_start(timeline, index, index[task.deadline], task.name)).max())
        if late > 0:
            problems.append(Problem("deadline", task.name, f"{task.deadline} waits {late:.3g} s for it"))
    return problems


def _could_start(timeline: Timeline, index: dict[str, int], n: int, but: str) -> Array:
    """Return when a task could start on each device but for one of the tasks it waits for."""
    task = timeline.tasks[n]
    before = [index[name] for name in task.after if name != but]
    before += [k for k in range(n) if timeline.tasks[k].stream == task.stream]
    ends = timeline.end_s[before]
    return np.asarray(ends.max(axis=0, initial=0.0))
