"""Schedules: what each device does in one denoising step, in which order, and how long it takes.

``task`` the steps of a schedule, ``cost`` what a placement makes each of them cost, ``build`` the schedule of a model,
``order`` which task is issued when, ``simulate`` the clock, ``lint`` what must hold before anything runs.
"""

from moefx.passes.schedule.build import step_schedule
from moefx.passes.schedule.cost import Exchange, LayerCost, layer_costs
from moefx.passes.schedule.lint import Problem, lint, order_digest
from moefx.passes.schedule.order import best_degree, in_best_order
from moefx.passes.schedule.simulate import Timeline, critical_path, simulate
from moefx.passes.schedule.task import COMM, COMPUTE, COPY, Task

__all__ = [
    "COMM",
    "COMPUTE",
    "COPY",
    "Exchange",
    "LayerCost",
    "Problem",
    "Task",
    "Timeline",
    "best_degree",
    "critical_path",
    "in_best_order",
    "layer_costs",
    "lint",
    "order_digest",
    "simulate",
    "step_schedule",
]
