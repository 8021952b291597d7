"""Ranks whose device is too small for their share: some experts stay there, the others stream in, as in one process.

Which ones stay is the placement's choice where it names tiers (strategy ``pin_and_stream``), else as many of each
layer as fit; see :mod:`moefx.offloading`. For inference.

Legend: E experts of a layer, S slots of this rank: its own experts, then copies.
"""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moefx.errors import InputError, PlanError
from moefx.model.save import parse_size
from moefx.offloading.layout import Layout
from moefx.offloading.offload import stream_experts
from moefx.offloading.pins import Pins, most_used, room_for_pins
from moefx.parallel.divided import DividedExperts
from moefx.parallel.experts import ParallelExperts
from moefx.parallel.roster import Roster
from moefx.passes.placement import Placement, routed_layers
from moefx.passes.placement.placement import RESIDENT, STAGING_SLOTS
from moefx.passes.placement.stacks import stack_of, stacked_parameters
from moefx.routing.experts import Experts
from moefx.routing.weights import FFNWeights


@dataclass(frozen=True)
class Tiers:
    """What stays on this rank's device.

    Args:
        pins: slots of each layer of stacked FFNs that stay.
        staging: halves of experts that have room to be loaded ahead.
        folder: of the files of the others; None for a temporary one, or host memory on accelerators.
    """

    pins: Pins
    staging: int
    folder: str | os.PathLike[str] | None


def plan_tiers(
    model: nn.Module,
    placement: Placement,
    rank: int,
    asked: str,
    *,
    budget: int | str | None,
    staging: int,
    folder: str | os.PathLike[str] | None,
) -> Tiers | None:
    """Return what stays on this rank, or None if neither a budget nor the placement asks; before anything is divided.

    Raises:
        OptionError: the budget is no size.
        InputError: there is no such folder.
        PlanError: not even what always stays fits: by how much, and which budget would do; or the layout changes.
    """
    if budget is None and not placement.tiers:
        return None
    if placement.windows:
        raise PlanError(asked, found="a plan with windows, and experts that are streamed", do="plan without windows")
    if folder is not None and not Path(folder).is_dir():
        raise InputError(asked, found=f"no folder {str(folder)!r}", do="make it first")
    counts, sizes, uses, shared = [], [], [], sum(p.nbytes for p in (*model.parameters(), *model.buffers()))
    for i, layer in enumerate(routed_layers(model).values()):
        experts, roster = stack_of(layer).experts, Roster.of(placement, i)
        mine = (*roster.homes[rank], *roster.copies[rank])
        stacked = sum(p.nbytes for p in stacked_parameters(experts).values())
        shared -= stacked
        if type(experts) is not Experts:
            shared += stacked * len(mine) // experts.num_experts  # these are never streamed
            continue
        counts.append(len(mine))
        sizes.append(Layout.of(experts).nbytes)
        uses.append(_resident(placement, i, mine))
    if budget is None:
        pins = tuple(tuple(int(s) for s in np.flatnonzero(stays_S)) for stays_S in uses)
        return Tiers(pins, 2 * STAGING_SLOTS, folder)
    limit = parse_size(budget)
    if shared + sum(n * size for n, size in zip(counts, sizes, strict=True)) <= limit:
        return Tiers(tuple(tuple(range(n)) for n in counts), staging, folder)
    slot = max(sizes)  # a half is never larger
    return Tiers(most_used(uses, sizes, room_for_pins(asked, limit, shared, slot, staging)), staging, folder)


def _resident(placement: Placement, layer: int, experts: tuple[int, ...]) -> np.ndarray:
    """Return one for each slot that the placement lets stay; where it names no tiers, all are alike."""
    if not placement.tiers:
        return np.ones(len(experts))
    return np.array([float(placement.tiers[layer][e] == RESIDENT) for e in experts])


@torch.no_grad()
def install_tiers(model: nn.Module, layers: list[DividedExperts], tiers: Tiers) -> None:
    """Let the experts of this rank that do not stay go. A collective where there are copies: they are sent once."""
    streamed = [layer for layer in layers if isinstance(layer, ParallelExperts)]
    local = [_local(layer) for layer in streamed]
    some = [(layer, experts) for layer, experts in zip(streamed, local, strict=True) if experts.num_experts]
    pins = tuple(p for p, experts in zip(tiers.pins, local, strict=True) if experts.num_experts)
    engines: list[Any] = []
    if some:
        device = some[0][1].w_in.device
        engines = list(stream_experts([experts for _, experts in some], pins, tiers.staging, device, tiers.folder))
        weakref.finalize(model, engines[0].stream.close)
    for layer, experts in zip(streamed, local, strict=True):
        engine = engines.pop(0) if experts.num_experts else _Nothing(experts.w_out.shape[1])
        for parameter in (*stacked_parameters(layer).values(), *experts.parameters(recurse=False)):
            parameter.data = parameter.data.new_empty(0)
        layer.engine, layer._copied = (engine,), None


def _local(layer: ParallelExperts) -> Experts:
    """Return the slots of this rank as experts of their own, sharing storage."""
    weights = {name: w.detach() for name, w in layer._all_slots().items()}
    return Experts(FFNWeights(**weights), layer.act).eval()


class _Nothing:
    """What a rank without experts makes of the rows it gets: none."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __call__(self, rows_AD: Tensor, slots_AK: Tensor, gates_AK: Tensor) -> Tensor:
        """Return ``[A, D_o]``."""
        return rows_AD.new_zeros((len(rows_AD), self.width))
