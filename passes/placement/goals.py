"""What strategies minimise: each goal is a value of a placement and a bound that no placement can beat.

A strategy names its goal; the registry computes it, so that no strategy can report its own score.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.flow import crossing, crossing_bound, nearness, together, together_bounds
from moefx.passes.placement.objective import loads, lower_bound, perfect_balance, total_cost
from moefx.passes.placement.placement import Placement
from moefx.passes.placement.predict import predict
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

# Slowdown beyond the allowed imbalance weighs so much more than flow that no plan takes it for affinity.
EXCESS_PRICE = 10.0


@dataclass(frozen=True)
class Problem:
    """What a strategy is asked."""

    trace: RoutingTrace
    topology: Topology
    dims: ModelDims
    budget: Budget

    def homes(self, placement: Placement) -> list[np.ndarray]:
        """Return the primaries as arrays."""
        return [np.asarray(row) for row in placement.primary]

    def slots(self, placement: Placement) -> tuple[int, int]:
        """Return the fewest and the most experts of one layer on one device."""
        counts = [placement.counts(i) for i in range(len(placement.layers))]
        return min(int(c.min()) for c in counts), max(int(c.max()) for c in counts)


@dataclass(frozen=True)
class GoalKind:
    """A named quantity to make small."""

    name: str
    value: Callable[[Problem, Placement], float]
    bound: Callable[[Problem, Placement], float]
    needs: str | None = None


def _load(problem: Problem, placement: Placement) -> float:
    return total_cost(problem.trace, problem.topology, placement)


def load_bound(problem: Problem, placement: Placement) -> float:
    """Return the bound of the load with as many copies as the expert of the placement that has most."""
    copies = max(int(p.holders(i).sum(axis=1).max()) for p in placement.layouts for i in range(len(p.layers)))
    return lower_bound(problem.trace, problem.topology, copies)


def _crossing(problem: Problem, placement: Placement) -> float:
    affinity = problem.trace.need("affinity", "place by affinity")
    return crossing(affinity, problem.dims.experts, problem.homes(placement), nearness(problem.topology))


def _crossing_bound(problem: Problem, placement: Placement) -> float:
    affinity = problem.trace.need("affinity", "place by affinity")
    return crossing_bound(affinity, problem.dims.experts, problem.topology, problem.slots(placement)[1])


def _joint(problem: Problem, placement: Placement) -> float:
    """Return the flow that moves, plus the slowdown beyond the allowed imbalance at its price."""
    balanced = perfect_balance(problem.trace, problem.topology)
    slowdown = _load(problem, placement) / balanced if balanced > 0 else 1.0
    return _crossing(problem, placement) + EXCESS_PRICE * max(0.0, slowdown - 1 - problem.budget.imbalance)


def _apart(problem: Problem, placement: Placement) -> float:
    pairs = problem.trace.need("coactivation", "group experts by co-activation")
    return 1 - together(pairs, problem.dims.experts, problem.homes(placement))


def _apart_bound(problem: Problem, placement: Placement) -> float:
    pairs = problem.trace.need("coactivation", "group experts by co-activation")
    return 1 - together_bounds(pairs, problem.dims.experts, *problem.slots(placement))[1]


def _together(problem: Problem, placement: Placement) -> float:
    pairs = problem.trace.need("coactivation", "group experts by co-activation")
    return together(pairs, problem.dims.experts, problem.homes(placement))


def _together_bound(problem: Problem, placement: Placement) -> float:
    pairs = problem.trace.need("coactivation", "group experts by co-activation")
    return together_bounds(pairs, problem.dims.experts, *problem.slots(placement))[0]


def _seconds(problem: Problem, placement: Placement) -> float:
    return predict(placement, problem.trace, problem.topology, problem.dims, problem.budget).run_s


def _seconds_bound(problem: Problem, placement: Placement) -> float:
    """Return the time of the arithmetic alone, divided over all devices at will."""
    del placement
    flops = (problem.trace.load.sum(axis=(0, 2)) * problem.dims.row_flops).sum()
    return float(flops / problem.topology.flops_per_s.sum())


def _interval(problem: Problem, placement: Placement) -> float:
    """Return the work of the busiest device over a whole run: the time between two requests that follow each other."""
    return float((loads(problem.trace, placement).sum(axis=(0, 1)) / problem.topology.speeds).max())


def _interval_bound(problem: Problem, placement: Placement) -> float:
    del placement
    return perfect_balance(problem.trace, problem.topology)


GOALS = {
    goal.name: goal
    for goal in (
        GoalKind("load", _load, load_bound),
        GoalKind("crossing flow", _crossing, _crossing_bound, needs="affinity"),
        GoalKind("crossing flow and imbalance", _joint, _crossing_bound, needs="affinity"),
        GoalKind("pairs apart", _apart, _apart_bound, needs="coactivation"),
        GoalKind("pairs together", _together, _together_bound, needs="coactivation"),
        GoalKind("seconds", _seconds, _seconds_bound),
        GoalKind("interval", _interval, _interval_bound),
    )
}
