"""What makes a placement impossible: another model, other devices, copies that collide, too little memory.

Legend: E experts of a layer, G devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from moefx.errors import PlanError
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.topology import Topology

if TYPE_CHECKING:
    from moefx.passes.placement.placement import Placement

_ROUNDING = 1e-9


def check_layouts(placement: Placement, dims: ModelDims, topology: Topology | None) -> None:
    """Refuse a placement whose layouts do not fit the model or the devices.

    Raises:
        PlanError: the first thing that is wrong.
    """
    layers = f"layers {_differ(placement.layers, dims.layers)}"
    _require(placement, placement.layers == dims.layers, layers)
    if topology is not None:
        other = f"devices {placement.devices}, not {topology.devices}"
        _require(placement, placement.devices == topology.devices, other)
    sigmas = [window.sigma for window in placement.windows]
    _require(placement, bool(np.all(np.diff(sigmas) < 0)), f"windows at {sigmas}, which must fall")
    for layout in placement.layouts:
        _check_layout(layout, dims)
        known = {"device"} | (topology.tier_names if topology is not None else {t for row in layout.tiers for t in row})
        unknown = sorted({tier for row in layout.tiers for tier in row} - known)
        _require(placement, not unknown, f"memory tiers {unknown}, the devices have {sorted(known)}")


def _check_layout(layout: Placement, dims: ModelDims) -> None:
    sizes, devices = tuple(len(row) for row in layout.primary), len(layout.devices)
    _require(layout, sizes == dims.experts, f"{sizes} experts per layer, the model has {dims.experts}")
    for name, row in zip(layout.layers, layout.primary, strict=True):
        homeless = [e for e, g in enumerate(row) if not 0 <= g < devices]
        _require(layout, not homeless, f"experts {homeless} of {name} on no device of {devices}")
    tiers = tuple(len(row) for row in layout.tiers)
    _require(layout, tiers in ((), dims.experts), f"tiers of {tiers} experts per layer, the model has {dims.experts}")
    _check_replicas(layout, dims)


def _check_replicas(layout: Placement, dims: ModelDims) -> None:
    taken = {(i, e, g) for i, row in enumerate(layout.primary) for e, g in enumerate(row)}
    given: dict[tuple[int, int], float] = {}
    for r in layout.replicas:
        found = f"a copy of expert {r.expert} of layer {r.layer} on device {r.device}"
        inside = r.layer < len(dims.experts) and r.expert < dims.experts[r.layer] and r.device < len(layout.devices)
        _require(layout, inside, f"{found}, which there is not")
        _require(layout, (r.layer, r.expert, r.device) not in taken, f"{found} twice")
        taken.add((r.layer, r.expert, r.device))
        given[r.layer, r.expert] = given.get((r.layer, r.expert), 0.0) + r.share
        total = given[r.layer, r.expert]
        _require(layout, total <= 1 + _ROUNDING, f"{found}: the copies' shares sum to {total:g}")


def check_memory(
    devices: Sequence[str], needed_G: NDArray[np.float64], topology: Topology | None, budget: Budget
) -> None:
    """Refuse more weights than a device can hold.

    Raises:
        PlanError: it says by how much, and which budget would do.
    """
    limits_G = topology.memory_bytes if topology is not None else np.full(len(devices), np.inf)
    if budget.memory_bytes is not None:
        limits_G = np.minimum(limits_G, budget.memory_bytes)
    worst = int(np.argmax(needed_G - limits_G))
    missing = needed_G[worst] - limits_G[worst]
    if missing > 0:
        raise PlanError(
            f"place the experts on {len(devices)} devices",
            found=f"{devices[worst]} needs {needed_G[worst]:,.0f} bytes of weights and has {limits_G[worst]:,.0f}",
            do=f"use more devices, or a memory budget larger by {missing:,.0f} bytes ({needed_G.max():,.0f} in all)",
        )


def _require(placement: Placement, holds: bool, found: str) -> None:
    if not holds:
        raise PlanError(f"use the placement of {placement.strategy!r}", found=found, do="plan it again for this model")


def _differ(found: Sequence[str], wanted: Sequence[str]) -> str:
    missing, extra = sorted(set(wanted) - set(found))[:3], sorted(set(found) - set(wanted))[:3]
    return f"differ from the model's: without {missing}, with {extra}" if missing or extra else "in another order"
