"""Search for homes of a chain of layers such that tokens change device seldom.

With its neighbours fixed, the best homes of one layer are a linear assignment, solved exactly. Sweeping over the layers
climbs to a local optimum; adding Gumbel noise to the scores (perturb and maximise, Papandreou & Yuille 2011), less and
less of it, is an annealing whose every step replaces a whole layer. Solutions from different starts are glued where
devices are interchangeable: between two layers one may pass from any solution to any other, relabelled as is best.

Legend: L layers, E experts of a layer, G devices, Q solutions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moefx.passes.placement.flow import crossing

Array = NDArray[np.float64]
IDs = NDArray[np.int64]
Repair = Callable[[int, IDs, Array], IDs]
_Step = tuple[IDs, dict[tuple[int, int], IDs]]

# Noise at the start of an annealing, in mean flows between an expert and a device; a restart takes the next.
_HOT, _COLD = (0.5, 1.0, 2.0), 0.05
_SWEEPS = 600
_COLD_SWEEPS = 12
# Where two homes are worth the same an expert stays: sweeps end.
_STAY = 1e-9


class Chain:
    """A chain of layers and the flows between them.

    Args:
        affinity: ``[L-1, E, E]``.
        slots: for each layer, how many experts each device holds ``[G]``.
        near: what flow between two devices is worth, ``[G, G]``, 1 on the diagonal.
    """

    def __init__(self, affinity: Array, slots: Sequence[IDs], near: Array) -> None:
        self.affinity, self.near = affinity, near
        self.experts = [int(s.sum()) for s in slots]
        self.columns = [np.repeat(np.arange(len(s)), s) for s in slots]
        pairs = list(zip(self.experts, self.experts[1:], strict=False))
        self.forward = [np.ascontiguousarray(affinity[i, :a, :b]) for i, (a, b) in enumerate(pairs)]
        self.backward = [np.ascontiguousarray(flow_EE.T) for flow_EE in self.forward]
        cells = max(sum(a * len(near) for a in self.experts), 1)
        self.mean_flow = 2 * float(affinity.sum()) / cells

    def crossing(self, homes: Sequence[IDs]) -> float:
        """Return the share of the flow that moves."""
        return crossing(self.affinity, self.experts, homes, self.near)

    def pull(self, i: int, spots: Sequence[Array], neighbours: tuple[int, ...] = (-1, 1)) -> Array:
        """Return the flow each expert of layer i would keep on each device ``[E, G]``; ``spots`` are one-hot homes."""
        pull_EG = np.zeros((self.experts[i], len(self.near)))
        if i > 0 and -1 in neighbours:
            pull_EG += self.backward[i - 1] @ (spots[i - 1] @ self.near)
        if i + 1 < len(self.experts) and 1 in neighbours:
            pull_EG += self.forward[i] @ (spots[i + 1] @ self.near)
        return pull_EG

    def assign(self, i: int, scores_EG: Array) -> IDs:
        """Return the homes of layer i with the largest sum of scores."""
        rows, columns = linear_sum_assignment(scores_EG[:, self.columns[i]], maximize=True)
        home_E = np.empty(self.experts[i], dtype=np.int64)
        home_E[rows] = self.columns[i][columns]
        return home_E

    def start(self, draws: np.random.Generator) -> list[IDs]:
        """Return drawn homes for the first layer and the best of each next one given the last."""
        homes = [draws.permutation(self.columns[0])]
        spots = [self.spots(homes[0])]
        for i in range(1, len(self.experts)):
            homes.append(self.assign(i, self.pull(i, spots, (-1,))))
            spots.append(self.spots(homes[-1]))
        return homes

    def spots(self, home_E: IDs) -> Array:
        """Return homes as one-hot rows ``[E, G]``."""
        return np.eye(len(self.near))[home_E]

    def climb(self, homes: Sequence[IDs], until: float, sweeps: int = 50) -> list[IDs]:
        """Return homes that no single layer can improve; never worse than ``homes``."""
        homes = [home.copy() for home in homes]
        spots = [self.spots(home) for home in homes]
        for sweep in range(sweeps):
            changed = False
            order = range(len(homes)) if sweep % 2 == 0 else reversed(range(len(homes)))
            for i in order:
                found = self.assign(i, self.pull(i, spots) + _STAY * self.mean_flow * spots[i])
                if (found != homes[i]).any():
                    homes[i], spots[i], changed = found, self.spots(found), True
            if not changed or time.monotonic() > until:
                break
        return homes

    def anneal(
        self, homes: Sequence[IDs], draws: np.random.Generator, hot: float, until: float, repair: Repair | None = None
    ) -> Iterator[list[IDs]]:
        """Yield homes after each of the last, noiseless sweeps of an annealing from ``homes``.

        Args:
            homes: where it starts.
            draws: source of the noise.
            hot: noise at the start, in mean flows.
            until: the time at which it must end.
            repair: changes a layer's drawn homes, given its number, the homes and the pull without noise.
        """
        homes = [home.copy() for home in homes]
        spots = [self.spots(home) for home in homes]
        # Repairs are dear, and before half-time the noise undoes them.
        middle = self.mean_flow * float(np.sqrt(hot * _COLD))
        for noise in [*np.geomspace(hot, _COLD, _SWEEPS) * self.mean_flow, *[0.0] * _COLD_SWEEPS]:
            for i in range(len(homes)):
                pull_EG = self.pull(i, spots)
                drawn = _STAY * self.mean_flow * spots[i] if noise == 0 else noise * _gumbel(draws, pull_EG.shape)
                homes[i] = self.assign(i, pull_EG + drawn)
                if repair is not None and noise < middle:
                    homes[i] = repair(i, homes[i], pull_EG)
                spots[i] = self.spots(homes[i])
            if noise == 0:
                yield [home.copy() for home in homes]
            if time.monotonic() > until:
                return

    def glue(self, pool: Sequence[Sequence[IDs]]) -> list[IDs]:
        """Return the best chain of layers taken from any of the solutions; devices must be interchangeable."""
        count = len(pool)
        value_Q, steps = np.zeros(count), []
        for i in range(len(self.experts) - 1):
            kept, relabel = np.empty((count, count)), {}
            right = [self.spots(solution[i + 1]) for solution in pool]
            for p, solution in enumerate(pool):
                left = self.spots(solution[i]).T @ self.forward[i]
                for q in range(count):
                    flow_GG = left @ right[q]
                    rows, relabel[p, q] = linear_sum_assignment(flow_GG.T, maximize=True)
                    kept[p, q] = flow_GG.T[rows, relabel[p, q]].sum()
            steps.append((np.argmax(value_Q[:, None] + kept, axis=0), relabel))
            value_Q = (value_Q[:, None] + kept).max(axis=0)
        return self._trace_back(pool, steps, int(np.argmax(value_Q)))

    def _trace_back(self, pool: Sequence[Sequence[IDs]], steps: Sequence[_Step], last: int) -> list[IDs]:
        """Return the homes along the best path, all in the labels of its first solution."""
        path = [last]
        for before, _ in reversed(steps):
            path.append(int(before[path[-1]]))
        path.reverse()
        name_G = np.arange(len(self.near))
        homes = [pool[path[0]][0].copy()]
        for i, (_, relabel) in enumerate(steps):
            name_G = name_G[relabel[path[i], path[i + 1]]]
            homes.append(name_G[pool[path[i + 1]][i + 1]])
        return homes


def noise_levels(restarts: int) -> list[float]:
    """Return the noise at the start of each annealing: long ones, half as many as restarts of a local search."""
    return [_HOT[r % len(_HOT)] for r in range(max(restarts // 2, 1))]


def _gumbel(draws: np.random.Generator, shape: tuple[int, ...]) -> Array:
    return -np.log(draws.standard_exponential(shape))
