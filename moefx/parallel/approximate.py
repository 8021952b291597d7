"""Steps that are not exact, for those who say how far off they may be: measured first, and refused beyond that.

Frozen steps keep the experts and gates of an earlier step, so that no router runs and nothing is counted. Stale steps
add what the experts made of the tokens one step before, so that rows travel behind all other work (displaced expert
parallelism, DICE, arXiv 2411.16786).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from moefx.errors import OptionError, PlanError
from moefx.graph.signature import Inputs
from moefx.parallel.parallelize import parallel_layers
from moefx.parallel.program import FIRST, Program
from moefx.parallel.writer import Plan

KINDS = ("frozen", "stale")


def approximate(
    program: Program, kind: str, *, tolerance: float, runs: Sequence[Sequence[Inputs]], every: int = 4
) -> Program:
    """Let a program take approximate steps between exact ones, if their error on given inputs is small enough.

    Call it on every rank, with runs of the same lengths. Each run is what this rank passes in successive steps of a
    sampler; at each step the approximate output is compared with the exact one for the same inputs. What one run shows
    need not hold for others: pass inputs like those to come, with the steps that the sampler will take.

    Args:
        program: an exact one, from :func:`schedule`; used in place, for inference.
        kind: ``"frozen"`` or ``"stale"``.
        tolerance: largest allowed relative error of an output, as a ratio of norms, over ranks, runs and steps.
        runs: inputs of this rank, by run and step.
        every: one step in so many is exact; call ``forget()`` where another batch begins.

    Raises:
        OptionError: an unknown kind, no tolerance, or nothing to measure on.
        PlanError: the error is larger than the tolerance; the message has it. The program stays exact.
    """
    if kind not in KINDS or not tolerance > 0 or every < 2 or not any(len(run) > 1 for run in runs):
        found = f"kind {kind!r}, tolerance {tolerance}, every {every}, runs of {[len(run) for run in runs]} steps"
        raise OptionError(
            "approximate steps", found=found, do="choose frozen or stale, a positive tolerance, every >= 2, runs"
        )
    if program.repeated or program.capacity is not None:
        raise PlanError("approximate steps", found="a program that is not plain", do="schedule one without options")
    program.add(FIRST, Plan(way="first"))
    program.add(kind, Plan(way=kind))
    program.repeated, program.every = kind, every
    worst = _over_ranks(program, max(_error(program, run) for run in runs))
    program.forget()
    if not worst <= tolerance:
        program.repeated, program.every = "", 0
        raise PlanError(
            f"take {kind} steps, exact every {every}",
            found=f"a relative error of {worst:.3g} on the given runs, above the tolerance of {tolerance:g}",
            do="allow more, take exact steps more often (every=), or stay exact",
        )
    program.measured = worst
    return program


@torch.no_grad()
def _error(program: Program, run: Sequence[Inputs]) -> float:
    """Return the largest relative error over the steps of one run."""
    program.forget()
    worst = 0.0
    for inputs in run:
        args, kwargs = ((), inputs) if isinstance(inputs, dict) else (tuple(inputs or ()), {})
        found = _leaves(program(*args, **kwargs))
        wanted = _leaves(program.exact.graph(*args, **kwargs))
        for one, other in zip(found, wanted, strict=True):
            size = float(other.double().norm())
            error = float((one.double() - other.double()).norm())
            worst = max(worst, error / size if size else error)
    return worst


def _leaves(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _over_ranks(program: Program, value: float) -> float:
    layer = next(iter(parallel_layers(program.model).values()))
    found = torch.tensor([value], dtype=torch.float64, device=layer.slot_bounds.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_resolve_process_group(cast(Any, layer.group)))
    return float(found)
