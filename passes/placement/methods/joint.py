"""Affinity under a bound on imbalance: nearly all of the affinity, nearly all of the balance.

Balancing first and then naming devices by affinity throws most of the affinity away, because which experts share a
device is settled before affinity is asked. Here each layer that the annealing draws is repaired at once: exchanges with
the busiest device, those that cost least affinity per gain in balance first, until the layer is within the bound.

Legend: S noise levels, E experts of a layer, G devices, P pairs of experts.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.chain import noise_levels
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, Homes
from moefx.passes.placement.goals import EXCESS_PRICE
from moefx.passes.placement.methods.affinity import chain_of
from moefx.passes.placement.methods.lpt import lpt
from moefx.passes.placement.objective import device_load, layer_cost
from moefx.passes.placement.slots import level_ranges
from moefx.passes.placement.strategy import register_strategy
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Array = NDArray[np.float64]
IDs = NDArray[np.int64]

# While searching, levels are summed in this many ranges; the result is scored on all.
_RANGES = 4
_MOST_EXCHANGES = 40
# An annealing with repairs takes several times as long as one without.
_RESTARTS_PER_ANNEALING = 4


@register_strategy("joint", "affinity with bounded imbalance", goal="crossing flow and imbalance")
def joint(trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> Homes:
    """Return the best of several annealed and repaired chains."""
    chain = chain_of(trace, topology, dims)
    draws, until = np.random.default_rng(budget.seed), budget.deadline()
    drafted = lpt.function(trace, topology, dims, budget)
    assert not isinstance(drafted, Draft)
    best: Homes = drafted
    repair = _Repair(trace, topology, best, budget.imbalance)

    def cost(homes: Homes) -> float:
        return chain.crossing(homes) + EXCESS_PRICE * max(0.0, _slowdown(trace, topology, homes) - 1 - budget.imbalance)

    for hot in noise_levels(budget.restarts // _RESTARTS_PER_ANNEALING):
        for homes in chain.anneal(chain.start(draws), draws, hot, until, repair):
            best = min(best, homes, key=cost)
        if time.monotonic() > until:
            break
    return best


def _slowdown(trace: RoutingTrace, topology: Topology, homes: Homes) -> float:
    balanced = trace.load.sum() / topology.speeds.sum()
    found = sum(layer_cost(trace.layer(i), home, topology.speeds) for i, home in enumerate(homes))
    return float(found / balanced) if balanced > 0 else 1.0


class _Repair:
    """Bring one layer within the allowed imbalance at the least loss of affinity."""

    def __init__(self, trace: RoutingTrace, topology: Topology, greedy: Homes, imbalance: float) -> None:
        self.speeds = topology.speeds
        ranges = level_ranges(len(trace.sigmas), _RANGES)
        self.load = [np.stack([trace.layer(i)[a:b].sum(axis=0) for a, b in ranges]) for i in range(len(greedy))]
        balanced_L = np.array([float(load.sum() / self.speeds.sum()) for load in self.load])
        floor_L = np.array([layer_cost(load, home, self.speeds) for load, home in zip(self.load, greedy, strict=True)])
        allowed_L = _limits(floor_L, balanced_L, imbalance) / np.where(balanced_L > 0, balanced_L, 1.0)
        # What a device may take in each range of levels, [S, 1].
        self.limit = [
            load.sum(axis=1, keepdims=True) / self.speeds.sum() * allowed
            for load, allowed in zip(self.load, allowed_L, strict=True)
        ]

    def __call__(self, i: int, home_E: IDs, pull_EG: Array) -> IDs:
        load_SE, limit_S1 = self.load[i], self.limit[i]
        time_SG = device_load(load_SE, home_E, len(self.speeds)) / self.speeds
        for _ in range(_MOST_EXCHANGES):
            over_G = np.maximum(time_SG - limit_S1, 0).sum(axis=0)
            hot = int(over_G.argmax())
            found = self._exchange(load_SE, limit_S1, home_E, pull_EG, time_SG, hot) if over_G[hot] > 0 else None
            if found is None:
                break
            a, b = found
            g, h = home_E[a], home_E[b]
            moved_S = load_SE[:, b] - load_SE[:, a]
            time_SG[:, g] += moved_S / self.speeds[g]
            time_SG[:, h] -= moved_S / self.speeds[h]
            home_E[a], home_E[b] = h, g
        return home_E

    def _exchange(
        self, load_SE: Array, limit_S1: Array, home_E: IDs, pull_EG: Array, time_SG: Array, hot: int
    ) -> tuple[int, int] | None:
        """Return the exchange with ``hot`` that loses least affinity per row below the limit; None if none helps."""
        inside, outside = np.flatnonzero(home_E == hot), np.flatnonzero(home_E != hot)
        a, b = np.repeat(inside, len(outside)), np.tile(outside, len(inside))
        g = home_E[b]
        moved_SP = load_SE[:, b] - load_SE[:, a]
        over_SG = np.maximum(time_SG - limit_S1, 0)
        here_SP = time_SG[:, hot, None] + moved_SP / self.speeds[hot] - limit_S1
        there_SP = time_SG[:, g] - moved_SP / self.speeds[g] - limit_S1
        after_P = (np.maximum(here_SP, 0) + np.maximum(there_SP, 0)).sum(axis=0)
        gain_P = (over_SG[:, hot, None] + over_SG[:, g]).sum(axis=0) - after_P
        useful = np.flatnonzero(gain_P > 1e-9 * limit_S1.sum())
        if not len(useful):
            return None
        a, b, g, gain_P = a[useful], b[useful], g[useful], gain_P[useful]
        loss_P = pull_EG[a, hot] + pull_EG[b, g] - pull_EG[a, g] - pull_EG[b, hot]
        # What loses nothing is free, so the largest gain is taken; the rest goes by loss per gain.
        best = int(np.where(loss_P <= 0, -gain_P, loss_P / gain_P).argmin())
        return int(a[best]), int(b[best])


def _limits(floor_L: Array, balanced_L: Array, imbalance: float) -> Array:
    """Return what each layer may cost, in all ``1 + imbalance`` times balance.

    Layers that cannot be balanced so well, because one expert is too hot, take from the others' allowance.
    """
    low, high = 0.0, imbalance
    for _ in range(40):
        middle = (low + high) / 2
        if np.maximum(floor_L, balanced_L * (1 + middle)).sum() > balanced_L.sum() * (1 + imbalance):
            high = middle
        else:
            low = middle
    return np.asarray(np.maximum(floor_L, balanced_L * (1 + low)))
