"""Predict what a placement gives: time per step, bytes per link, memory per device, imbalance over noise levels.

Per layer and level: the busiest device computes (per expert the larger of arithmetic and reading its weights) while it
streams experts that are not resident; before and after, rows travel to their experts and back. Rows start on all
devices alike. What is not priced by the topology takes no time. Rows go home after each layer, or a token travels to
each device once, or stays where its expert is; see :mod:`moefx.passes.placement.wire` for these ways to the byte.

Legend: S noise levels, L layers, E experts of a layer, G devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from moefx.errors import OptionError, PlanError
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.migration import move_bytes, moves
from moefx.passes.placement.objective import computed_shares, loads
from moefx.passes.placement.placement import Placement
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace
from moefx.passes.placement.wire import WAYS

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a placement gives.

    Args:
        compute_s: of the busiest device, summed over layers, ``[S]``.
        exchange_s: dispatch and combine, summed over layers, ``[S]``.
        setup_s: copies made before the run.
        moving_s: changes of layout that do not hide behind the levels before them.
        memory_bytes: of weights per device, ``[G]``.
        link_bytes: per link over the run, migration included.
        imbalance: rows of the busiest device against the mean, summed over layers, ``[S]``.
    """

    compute_s: Array
    exchange_s: Array
    setup_s: float
    moving_s: float
    memory_bytes: Array
    link_bytes: dict[str, float]
    imbalance: Array

    @property
    def step_s(self) -> Array:
        """Time of each step, ``[S]``."""
        return self.compute_s + self.exchange_s

    @property
    def run_s(self) -> float:
        """Time of one run over all levels, with everything."""
        return float(self.step_s.sum()) + self.setup_s + self.moving_s


def predict(
    placement: Placement,
    trace: RoutingTrace,
    topology: Topology,
    dims: ModelDims,
    budget: Budget | None = None,
    *,
    way: str = "home",
) -> Prediction:
    """Return what the placement gives on this trace.

    Args:
        placement: the plan.
        trace: what routers did.
        topology: the devices.
        dims: the model.
        budget: as the plan was made with.
        way: of the rows. ``"home"``: to their expert and back. ``"once"``: a token to each device at most once; exact
            for two experts per token, too few bytes beyond. ``"floating"``: a token stays where its expert is; for one
            expert per token.

    Raises:
        OptionError: another way.
        PlanError: the sizes of rows are unknown, or the trace lacks what the way needs.
    """
    dims.need_rows("predict the time of a placement")
    _check_way(way, trace)
    compute_SL, exchange_SL = (np.zeros((len(trace.sigmas), len(trace.layers))) for _ in range(2))
    sent_GG = np.zeros((len(topology), len(topology)))
    serving_S = np.array([placement.layout_at(sigma) for sigma in trace.sigmas])
    for w, layout in enumerate(placement.layouts):
        for i in range(len(trace.layers)):
            levels = np.flatnonzero(serving_S == w)
            load_SE = trace.layer(i)[levels]
            compute_SL[levels, i] = layer_seconds(layout, i, load_SE, topology, dims).max(axis=1)
            for s, load_E in zip(levels, load_SE, strict=True):
                for bytes_GG in exchanges(layout, i, load_E, dims, trace, way):
                    sent_GG += bytes_GG
                    exchange_SL[s, i] += topology.exchange_seconds(bytes_GG)
    step_S = (compute_SL + exchange_SL).sum(axis=1)
    copied_GG, setup_s, moving_s = _transfers(placement, topology, dims, step_S, serving_S)
    rows_SLG = loads(trace, placement) / topology.speeds
    balanced_S = trace.load.sum(axis=(1, 2)) / topology.speeds.sum()
    return Prediction(
        compute_s=compute_SL.sum(axis=1),
        exchange_s=exchange_SL.sum(axis=1),
        setup_s=setup_s,
        moving_s=moving_s,
        memory_bytes=placement.bytes_per_device(dims, budget),
        link_bytes=dict(zip(topology.link_names, topology.link_bytes(sent_GG + copied_GG).tolist(), strict=True)),
        imbalance=rows_SLG.max(axis=2).sum(axis=1) / np.where(balanced_S > 0, balanced_S, 1.0),
    )


def layer_seconds(layout: Placement, layer: int, load_SE: Array, topology: Topology, dims: ModelDims) -> Array:
    """Return the time of one layer on each device at each level, ``[S, G]``: computing, or streaming if longer."""
    rows_SEG = load_SE[:, :, None] * computed_shares(layout, layer)
    compute_SG = expert_seconds(rows_SEG, layer, topology, dims).sum(axis=1)
    resident_E = layout.resident(layer)
    if resident_E.all():
        return np.asarray(compute_SG)
    stream_G = np.array([_stream_seconds(layout, layer, g, topology, dims) for g in range(len(topology))])
    streamed_SG = ((rows_SEG > 0) & ~resident_E[None, :, None]).sum(axis=1) * stream_G
    return np.asarray(np.maximum(compute_SG, streamed_SG))


def expert_seconds(rows_SEG: Array, layer: int, topology: Topology, dims: ModelDims) -> Array:
    """Return the time of each expert on each device: the larger of its arithmetic and of reading its weights once."""
    arithmetic = rows_SEG * dims.row_flops[layer] / topology.flops_per_s
    return np.maximum(arithmetic, (rows_SEG > 0) * dims.expert_bytes[layer] / topology.memory_bytes_per_s)


def _stream_seconds(layout: Placement, layer: int, device: int, topology: Topology, dims: ModelDims) -> float:
    """Return the time to stream one expert of a layer to a device, from the slowest tier the layer uses."""
    links = topology.tiers(device)
    used = [links[tier] for tier in set(layout.tiers[layer]) if tier in links]
    return max((t["alpha_s"] + dims.expert_bytes[layer] * t["beta_s_per_byte"] for t in used), default=0.0)


def dispatch_bytes(layout: Placement, layer: int, load_E: Array, dims: ModelDims) -> Array:
    """Return the bytes from each device to each other when rows go to their experts, ``[G, G]``."""
    devices, shares_EG = len(layout.devices), layout.shares(layer)
    away_EG = 1 - layout.holders(layer) if layout.local_first else np.ones_like(shares_EG)
    bytes_GG = (away_EG * load_E[:, None] / devices).T @ shares_EG * dims.row_bytes[layer]
    np.fill_diagonal(bytes_GG, 0)
    return np.asarray(bytes_GG)


def exchanges(
    layout: Placement, layer: int, load_E: Array, dims: ModelDims, trace: RoutingTrace, way: str
) -> list[Array]:
    """Return the bytes ``[G, G]`` of each exchange of rows of one layer at one level."""
    out_GG = dispatch_bytes(layout, layer, load_E, dims)
    back = dims.back_bytes(layer) / dims.row_bytes[layer]
    if way == "home":
        return [out_GG, out_GG.T * back]
    if way == "once":
        out_GG = out_GG * _sent_once(layout, layer, trace)[None, :]
        return [out_GG, out_GG.T * back]
    if layer:
        holders_EG, before_EG = layout.shares(layer), layout.shares(layer - 1)
        affinity = trace.need("affinity", "predict floating tokens")[layer - 1]
        flow_EE = affinity[: len(before_EG), : len(holders_EG)]
        share = load_E.sum() / max(flow_EE.sum(), 1.0)
        out_GG = before_EG.T @ flow_EE @ holders_EG * share * dims.row_bytes[layer]
        np.fill_diagonal(out_GG, 0)
    if layer < len(trace.layers) - 1:
        return [out_GG]
    return [out_GG, dispatch_bytes(layout, layer, load_E, dims).T * back]


def _sent_once(layout: Placement, layer: int, trace: RoutingTrace) -> Array:
    """Return, for each device, tokens sent to it against their rows for its experts, ``[G]``."""
    pairs_EE = trace.need("coactivation", "predict tokens that are sent once")[layer]
    load_E = trace.layer(layer).sum(axis=0)
    shares_EG = layout.shares(layer)
    count = len(shares_EG)
    both_G = np.einsum("eg,ef,fg->g", shares_EG, pairs_EE[:count, :count], shares_EG) / 2
    rows_G = load_E @ shares_EG
    return np.asarray(np.clip(1 - both_G / np.maximum(rows_G, 1e-30), 0, 1))


def _check_way(way: str, trace: RoutingTrace) -> None:
    if way not in WAYS:
        raise OptionError("predict the time of a placement", found=f"way = {way!r}", do=f"use one of {', '.join(WAYS)}")
    if way == "floating" and trace.need("coactivation", "predict floating tokens").any():
        found = "a trace with several experts per token"
        raise PlanError("predict floating tokens", found=found, do="count with wire_bytes, from the choices themselves")


def _transfers(
    placement: Placement, topology: Topology, dims: ModelDims, step_S: Array, serving_S: NDArray[np.int64]
) -> tuple[Array, float, float]:
    """Return the bytes of all moves of weights, the time before the run, and the time during it that does not hide."""
    layouts, size = placement.layouts, len(topology)
    first = placement.model_copy(update={"replicas": (), "windows": ()})
    copied_GG = move_bytes(moves(first, layouts[0]), dims, size)
    setup_s, moving_s = topology.exchange_seconds(copied_GG), 0.0
    for w, (before, after) in enumerate(pairwise(layouts)):
        bytes_GG = move_bytes(moves(before, after), dims, size)
        moving_s += max(0.0, topology.exchange_seconds(bytes_GG) - float(step_S[serving_S == w].sum()))
        copied_GG = copied_GG + bytes_GG
    return copied_GG, setup_s, moving_s
