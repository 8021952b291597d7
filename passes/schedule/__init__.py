"""Schedules: what each device does in one denoising step, in which order, and how long it takes.

``task`` the steps of a schedule, ``cost`` what a placement makes each of them cost, ``build`` the schedule of a model,
``order`` which task is issued when, ``simulate`` the clock, ``lint`` what must hold before anything runs. Graphs:
``mark`` what a node does and costs, ``price`` what captured nodes cost, ``graph_tasks`` a graph on the clock and in its
best order, ``graph_lint`` what must hold of it; ``capacity`` how many rows may go to each device at once.
"""

from moefx.passes.schedule.build import step_schedule
from moefx.passes.schedule.capacity import CapacityTable, capacity_table, changed_table
from moefx.passes.schedule.cost import Exchange, LayerCost, layer_costs
from moefx.passes.schedule.graph_lint import inexact, lint_graph
from moefx.passes.schedule.graph_tasks import order_graph, tasks_of
from moefx.passes.schedule.lint import Problem, lint, order_digest
from moefx.passes.schedule.mark import Mark, mark_of, set_mark
from moefx.passes.schedule.order import best_degree, in_best_order
from moefx.passes.schedule.simulate import Timeline, critical_path, simulate
from moefx.passes.schedule.task import COMM, COMPUTE, COPY, Task

__all__ = [
    "COMM",
    "COMPUTE",
    "COPY",
    "CapacityTable",
    "Exchange",
    "LayerCost",
    "Mark",
    "Problem",
    "Task",
    "Timeline",
    "best_degree",
    "capacity_table",
    "changed_table",
    "critical_path",
    "in_best_order",
    "inexact",
    "layer_costs",
    "lint",
    "lint_graph",
    "mark_of",
    "order_digest",
    "order_graph",
    "set_mark",
    "simulate",
    "step_schedule",
    "tasks_of",
]
