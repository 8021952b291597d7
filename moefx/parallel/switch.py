"""Going from one layout of the experts to another while a job runs: weights and optimizer state change hands.

Legend: G ranks, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _resolve_process_group  # type: ignore[attr-defined]
from torch.optim import Optimizer

from moefx.errors import InputError, MoefxError, PlanError
from moefx.parallel.agree import agree, text_digest
from moefx.parallel.divided import DividedExperts, flat_rows
from moefx.parallel.exchange import exchange
from moefx.parallel.parallelize import PLACEMENT, parallel_layers
from moefx.parallel.roster import Roster
from moefx.passes.placement import Placement

Optimizers = Optimizer | Iterable[Optimizer] | None


def switch(model: nn.Module, layout: Placement | float, optimizers: Optimizers = None) -> bool:
    """Let each expert live where another layout has it, and say whether anything changed. A collective.

    Each rank sends the experts it gives up, with what the optimizers remember of them, to their new homes in one
    exchange per tensor. Parameters whose experts change become new objects, in the model and in these optimizers: a
    graph that still refers to the old ones would give gradients of the old shape. Gradients must have been used up.

    Args:
        model: a parallel model.
        layout: a placement on the same devices, of which the first layout counts; or a noise level, for the window
            of the model's own placement that serves it. Calling it before every step switches where a window begins.
        optimizers: that hold state of the experts' parameters.

    Raises:
        PlanError: the layout is of other devices or layers, gradients are pending, or ranks were asked for different
            things or have different optimizer states. Raised on all ranks; nothing was changed.
    """
    asked = "switch the layout of the experts"
    layers = parallel_layers(model)
    first = next(iter(layers.values()))
    group = _resolve_process_group(cast(Any, first.group))
    held = [optimizers] if isinstance(optimizers, Optimizer) else list(optimizers or ())
    problem: MoefxError | None = None
    facts = dict.fromkeys(("the layouts", "the optimizers' states"), bytes(32))
    wanted: list[Roster] = []
    try:
        for name, layer in layers.items():
            layer.need_weights(f"{asked} of {name}")
        wanted = _rosters(model, layers, layout, asked)
        _no_gradients(layers, asked)
        known = [[sorted(s) for s in _states(layer, held)] for layer in layers.values()]
        facts = {"the layouts": text_digest(repr(wanted)), "the optimizers' states": text_digest(repr(known))}
    except MoefxError as error:
        problem = error
    agree(asked, facts, problem, first.slot_bounds.device.type, group)
    changed = False
    for layer, roster in zip(layers.values(), wanted, strict=True):
        if roster != layer.roster:
            changed = True
            if roster.homes != layer.homes:
                _move(layer, roster, held)
            layer.rehome(roster)
    return changed


def _rosters(
    model: nn.Module, layers: dict[str, DividedExperts], layout: Placement | float, asked: str
) -> list[Roster]:
    own: Placement | None = model.__dict__.get(PLACEMENT)
    if isinstance(layout, int | float):
        if own is None:
            raise InputError(asked, found="a model that does not know its placement", do="pass a placement")
        layout = own.layouts[own.layout_at(float(layout))]
    if not isinstance(layout, Placement):
        raise InputError(asked, found=f"a {type(layout).__name__}", do="pass a Placement or a noise level")
    ranks = len(next(iter(layers.values())).homes)
    sizes = [len(row) for row in layout.primary]
    if len(layout.devices) != ranks or sizes != [layer.num_experts for layer in layers.values()]:
        raise PlanError(
            asked,
            found=f"{len(sizes)} layers on {len(layout.devices)} devices, not {len(layers)} layers on {ranks}",
            do="plan it for this model and as many devices",
        )
    return [Roster.of(layout, i) for i in range(len(layers))]


def _no_gradients(layers: dict[str, DividedExperts], asked: str) -> None:
    for prefix, layer in layers.items():
        for name in layer.stacked_names:
            if layer.get_parameter(name).grad is not None:
                found = f"{prefix}.{name} has a gradient"
                raise PlanError(asked, found=found, do="call optimizer.step() and zero_grad(set_to_none=True) first")


def _states(layer: DividedExperts, optimizers: list[Optimizer]) -> list[dict[str, Tensor]]:
    """Return, for each stacked parameter and optimizer, the state tensors that have one row per expert."""
    found = []
    for name in layer.stacked_names:
        parameter = layer.get_parameter(name)
        for optimizer in optimizers:
            state = optimizer.state.get(parameter, {})
            rows = {k: v for k, v in state.items() if isinstance(v, Tensor) and v.shape == parameter.shape and v.ndim}
            found.append(rows)
    return found


@torch.no_grad()
def _move(layer: DividedExperts, roster: Roster, optimizers: list[Optimizer]) -> None:
    for name in layer.stacked_names:
        old = layer.get_parameter(name)
        moved = moved_rows(old.data, layer.roster, roster, layer.rank, layer.group)
        new = nn.Parameter(moved, requires_grad=old.requires_grad)
        path, _, leaf = name.rpartition(".")
        layer.get_submodule(path)._parameters[leaf] = new
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new if p is old else p for p in group["params"]]
            state = optimizer.state.pop(old, None)
            if state is None:
                continue
            optimizer.state[new] = state
            for key, value in list(state.items()):
                if isinstance(value, Tensor) and value.ndim and value.shape == old.shape:
                    state[key] = moved_rows(value, layer.roster, roster, layer.rank, layer.group)
                elif isinstance(value, Tensor) and not value.ndim:
                    state[key] = _largest(value, layer)  # a rank without experts may not have counted its steps


def _largest(value: Tensor, layer: DividedExperts) -> Tensor:
    found = value.to(layer.slot_bounds.device, copy=True)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_resolve_process_group(cast(Any, layer.group)))
    return found.to(value.device)


def moved_rows(local: Tensor, before: Roster, after: Roster, rank: int, group: str) -> Tensor:
    """Return this rank's ``[E_local, ...]`` under ``after`` from each rank's under ``before``. A collective."""
    leaving = [[i for i, e in enumerate(before.homes[rank]) if e in set(home)] for home in after.homes]
    arriving = [[e for e in home if e in set(after.homes[rank])] for home in before.homes]
    chosen = torch.tensor([i for part in leaving for i in part], dtype=torch.int64, device=local.device)
    got = exchange(flat_rows(local)[chosen], [len(p) for p in leaving], [len(p) for p in arriving], group)
    place = {expert: i for i, expert in enumerate(e for part in arriving for e in part)}
    order = torch.tensor([place[e] for e in after.homes[rank]], dtype=torch.int64, device=local.device)
    return got[order].reshape(len(order), *local.shape[1:])
