"""In which order tasks are issued: list scheduling by the longest way to the end, equal on all devices.

Costs that differ from device to device would give different orders, and collectives in different orders never end. So
the order is made once, from the slowest device's times, with ties broken by the place in the list.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

import numpy as np

from moefx.errors import OptionError
from moefx.passes.schedule.simulate import simulate
from moefx.passes.schedule.task import STREAMS, Task

DEGREES = (1, 2, 3, 4, 6, 8, 12, 16)
# A stream stays idle rather than begin a task if something more urgent comes within this share of the task's time.
_PATIENCE = (0.0, 0.25, 1.0)


def in_best_order(tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks in the order in which list scheduling would start them.

    Whenever a stream is free, of the tasks that are ready the one with the longest way to the end starts; or, with some
    patience, none, if a running task will soon make a more urgent one ready. The fastest of several patiences and of
    the order that came in is returned.
    """
    seconds = [float(np.max(task.seconds)) for task in tasks]
    users, waits = _edges(tasks)
    rank = _longest_way(seconds, users)
    orders = {tuple(_greedy(tasks, seconds, users, waits, rank, patience)): None for patience in _PATIENCE}
    devices = max((np.size(task.seconds) for task in tasks), default=1)
    found = [*([tasks[n] for n in order] for order in orders), list(tasks)]
    return min(found, key=lambda order: simulate(order, devices).total_s)


def best_degree(
    build: Callable[[int], list[Task]], devices: int, degrees: Sequence[int] = DEGREES
) -> tuple[int, float]:
    """Return how many chunks are fastest on the simulated clock, and the time; the fewest of equals.

    Args:
        build: makes the schedule with so many chunks.
        devices: G.
        degrees: to try.

    Raises:
        OptionError: there is nothing to try.
    """
    if not degrees:
        raise OptionError("choose a number of chunks", found="none to choose from", do="give at least one")
    times = [(simulate(in_best_order(build(r)), devices).total_s, r) for r in degrees]
    best = min(times)[0]
    return next((r, t) for t, r in sorted(times, key=lambda item: item[1]) if t <= best * (1 + 1e-12))


def _edges(tasks: Sequence[Task]) -> tuple[list[list[int]], list[int]]:
    """Return the tasks that come after each one, and how many each one waits for."""
    index = {task.name: n for n, task in enumerate(tasks)}
    users: list[list[int]] = [[] for _ in tasks]
    for n, task in enumerate(tasks):
        for name in task.after:
            users[index[name]].append(n)
    return users, [len(task.after) for task in tasks]


def _longest_way(seconds: list[float], users: list[list[int]]) -> list[float]:
    way = list(seconds)
    for n in reversed(range(len(seconds))):
        way[n] += max((way[u] for u in users[n]), default=0.0)
    return way


def _greedy(
    tasks: Sequence[Task],
    seconds: list[float],
    users: list[list[int]],
    waits: list[int],
    rank: list[float],
    patience: float,
) -> list[int]:
    waits = list(waits)
    # What takes no time starts at once: it may let another stream go on.
    turn = [-way if time else -math.inf for way, time in zip(rank, seconds, strict=True)]
    order: list[int] = []
    ready: dict[str, list[tuple[float, int]]] = {stream: [] for stream in STREAMS}
    running: list[tuple[float, int]] = []
    idle, now = set(STREAMS), 0.0
    for n in range(len(tasks)):
        if not waits[n]:
            heapq.heappush(ready[tasks[n].stream], (turn[n], n))
    while len(order) < len(tasks):
        for stream in STREAMS:
            if stream in idle and ready[stream]:
                n = ready[stream][0][1]
                soon = now + patience * seconds[n]
                if patience and any(end < soon and _more_urgent(users[m], rank, rank[n]) for end, m in running):
                    continue
                heapq.heappop(ready[stream])
                order.append(n)
                idle.discard(stream)
                heapq.heappush(running, (now + seconds[n], n))
        now, n = heapq.heappop(running)
        over = [n]
        while running and running[0][0] <= now:
            over.append(heapq.heappop(running)[1])
        for n in sorted(over):
            idle.add(tasks[n].stream)
            for user in users[n]:
                waits[user] -= 1
                if not waits[user]:
                    heapq.heappush(ready[tasks[user].stream], (turn[user], user))
    return order


def _more_urgent(users: list[int], rank: list[float], than: float) -> bool:
    return any(rank[user] > than for user in users)
