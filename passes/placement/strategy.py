"""The registry of strategies, and the one way in: check, run, score, check.

A strategy is a pure function ``(trace, topology, dims, budget) -> draft``. What it returns is scored and checked here,
so that no strategy can report its own score, and compared with the balanced greedy by the strategy's own goal: where
that is better, its layout is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moefx.errors import OptionError, PlanError, nearest
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Draft, Homes, as_rows
from moefx.passes.placement.goals import GOALS, Problem, load_bound
from moefx.passes.placement.objective import perfect_balance, total_cost
from moefx.passes.placement.placement import Goal, Placement
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

Function = Callable[[RoutingTrace, Topology, ModelDims, Budget], Draft | Homes]
# The strategy that no other may be worse than.
GREEDY = "lpt"


@dataclass(frozen=True)
class Strategy:
    """A named strategy; calling it returns a checked :class:`Placement`.

    Args:
        name: how users ask for it.
        summary: one line.
        function: what drafts.
        goal: what it minimises, a key of ``GOALS``.
        copies: it makes copies of experts, so that there may be more devices than experts.
        baseline: it may be worse than the balanced greedy; others are compared with it.
    """

    name: str
    summary: str
    function: Function
    goal: str = "load"
    copies: bool = False
    baseline: bool = False

    def __call__(
        self, trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget | None = None
    ) -> Placement:
        """Plan.

        Raises:
            PlanError: the trace is of another model or lacks what the strategy reads, there are more devices or copies
                than can be used, or memory is short.
        """
        problem = Problem(trace, topology, dims, budget or Budget())
        self._check(problem)
        placement = self._score(problem, self.function(trace, topology, dims, problem.budget))
        if not self.baseline:
            placement = self._better(problem, placement)
        placement.check(dims, topology, problem.budget)
        return placement

    def _score(self, problem: Problem, draft: Draft | Homes) -> Placement:
        """Return the placement of a draft with its objective, bounds and goal."""
        draft = draft if isinstance(draft, Draft) else Draft(draft)
        bare = Placement(
            strategy=self.name,
            devices=problem.topology.devices,
            layers=problem.dims.layers,
            primary=as_rows(draft.homes),
            replicas=draft.replicas,
            tiers=draft.tiers,
            windows=draft.windows,
            local_first=draft.local_first,
            objective=0.0,
            bound=0.0,
            balanced=perfect_balance(problem.trace, problem.topology),
        )
        scores = {
            "objective": total_cost(problem.trace, problem.topology, bare),
            "bound": load_bound(problem, bare),
            "goal": self._goal(problem, bare),
        }
        return bare.model_copy(update=scores)

    def _goal(self, problem: Problem, placement: Placement) -> Goal | None:
        if self.goal == "load":
            return None
        kind = GOALS[self.goal]
        return Goal(name=kind.name, value=kind.value(problem, placement), bound=kind.bound(problem, placement))

    def _better(self, problem: Problem, placement: Placement) -> Placement:
        """Return the balanced greedy's layout instead if it fits and is better by this strategy's goal."""
        draft = get_strategy(GREEDY).function(problem.trace, problem.topology, problem.dims, problem.budget)
        greedy = self._score(problem, draft)
        if reached(greedy) >= reached(placement):
            return placement
        try:
            greedy.check(problem.dims, problem.topology, problem.budget)
        except PlanError:
            return placement
        return greedy

    def _check(self, problem: Problem) -> None:
        needs = GOALS[self.goal].needs
        if needs is not None:
            problem.trace.need(needs, f"use the placement strategy {self.name!r}")
        if self.goal == "seconds":
            problem.dims.need_rows(f"use the placement strategy {self.name!r}")
        _check_model(problem)
        if not self.copies:
            _check_devices(problem)


def reached(placement: Placement) -> float:
    """Return what the strategy made small: its goal, or else the objective."""
    return placement.objective if placement.goal is None else placement.goal.value


_STRATEGIES: dict[str, Strategy] = {}


def register_strategy(
    name: str, summary: str, *, goal: str = "load", copies: bool = False, baseline: bool = False
) -> Callable[[Function], Strategy]:
    """Register a function as the strategy ``name``; see :class:`Strategy` for the arguments."""

    def register(function: Function) -> Strategy:
        if name in _STRATEGIES:
            raise OptionError(f"register the strategy {name!r}", found="the name is taken", do="choose another")
        _STRATEGIES[name] = Strategy(name, summary, function, goal, copies, baseline)
        return _STRATEGIES[name]

    return register


def strategies() -> list[Strategy]:
    """Return every strategy, by name."""
    return [_STRATEGIES[name] for name in sorted(_STRATEGIES)]


def get_strategy(name: str) -> Strategy:
    """Return the strategy ``name``.

    Raises:
        OptionError: there is none.
    """
    if name not in _STRATEGIES:
        raise OptionError(f"the placement strategy {name!r}", found="no such name", do=nearest(name, _STRATEGIES))
    return _STRATEGIES[name]


def _check_model(problem: Problem) -> None:
    trace, dims = problem.trace, problem.dims
    if (trace.layers, trace.experts) != (dims.layers, dims.experts):
        raise PlanError(
            "place the experts of a model",
            found=f"a trace of {_shape(trace.layers, trace.experts)}, a model of {_shape(dims.layers, dims.experts)}",
            do="collect a trace of this model",
        )


def _check_devices(problem: Problem) -> None:
    dims, devices = problem.dims, len(problem.topology)
    smallest = int(np.argmin(dims.experts))
    if dims.experts[smallest] < devices:
        raise PlanError(
            f"place experts on {devices} devices",
            found=f"{dims.layers[smallest]} has {dims.experts[smallest]} experts",
            do=f"use at most {dims.experts[smallest]} devices, finer experts (granularity), or a strategy with copies",
        )


def _shape(layers: Sequence[str], experts: Sequence[int]) -> str:
    return f"{len(layers)} layers from {layers[0]} on, {min(experts)}-{max(experts)} experts"
