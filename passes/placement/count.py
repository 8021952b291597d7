"""Count choices that are at hand as arrays: the same tables as :class:`TraceCollector` makes while a model runs.

Legend: S noise levels, B samples, N tokens of a sample, L layers, K experts per token, E experts, P bins of positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefx.errors import InputError
from moefx.passes.placement.trace import Array, RoutingTrace

IDs = NDArray[np.integer[Any]]
# Positions are kept in this many bins, so that the size of an image does not set the size of a trace.
POSITION_BINS = 64


def trace_of_choices(
    choices_SBNLK: IDs,
    *,
    sigmas: Sequence[float] | Array | None = None,
    layers: Sequence[str] | None = None,
    experts: int | Sequence[int] | None = None,
    branches: int = 1,
) -> RoutingTrace:
    """Return the trace of choices ``[S, B, N, L, K]``.

    Args:
        choices_SBNLK: expert numbers; at each level the same samples and tokens.
        sigmas: of the levels, falling; evenly spaced by default.
        layers: names, ``layers.0`` and so on by default.
        experts: of each layer; one more than the largest number by default.
        branches: 2 if the second half of the samples is the first under the other guidance condition.

    Raises:
        InputError: the shape does not fit, or an expert number is outside its layer.
    """
    if choices_SBNLK.ndim != 5 or branches not in (1, 2) or choices_SBNLK.shape[1] % branches:
        found = f"choices {choices_SBNLK.shape} and {branches} branches"
        raise InputError("count choices", found=found, do="pass [S, B, N, L, K] with B a multiple of the branches")
    levels, samples, tokens, depth, _ = choices_SBNLK.shape
    experts = int(choices_SBNLK.max()) + 1 if experts is None else experts
    widths = (experts,) * depth if isinstance(experts, int) else tuple(experts)
    for i, width in enumerate(widths):
        if choices_SBNLK[..., i, :].min() < 0 or choices_SBNLK[..., i, :].max() >= width:
            raise InputError("count choices", found=f"numbers outside [0, {width}) in layer {i}", do="check experts")
    flat_STLK = choices_SBNLK.reshape(levels, samples * tokens, depth, -1)
    branch_S2TLK = choices_SBNLK.reshape(levels, branches, -1, depth, flat_STLK.shape[-1])
    most = max(widths)
    return RoutingTrace(
        sigmas=np.linspace(1, 0, levels, endpoint=False) if sigmas is None else np.asarray(sigmas),
        layers=tuple(layers or (f"layers.{i}" for i in range(depth))),
        experts=widths,
        load=_loads(flat_STLK, most),
        affinity=_flows(flat_STLK, most),
        coactivation=_pairs(flat_STLK, most),
        persistence=_shared(flat_STLK[1:], flat_STLK[:-1], first=True),
        overlap=_shared(branch_S2TLK[:, 0], branch_S2TLK[:, 1]) if branches == 2 else None,
        position=_positions(choices_SBNLK, most),
    )


def _loads(flat_STLK: IDs, experts: int) -> Array:
    levels, _, depth, _ = flat_STLK.shape
    rows = [[np.bincount(flat_STLK[s, :, i].ravel(), minlength=experts) for i in range(depth)] for s in range(levels)]
    return np.array(rows, dtype=np.float64)


def _flows(flat_STLK: IDs, experts: int) -> Array:
    depth, k = flat_STLK.shape[2:]
    flows = np.zeros((depth - 1, experts, experts))
    for i in range(depth - 1):
        before, after = (flat_STLK[:, :, j].reshape(-1, k).astype(np.int64) for j in (i, i + 1))
        cell = before[:, :, None] * experts + after[:, None, :]
        flows[i] = np.bincount(cell.ravel(), minlength=experts**2).reshape(experts, experts) / k
    return flows


def _pairs(flat_STLK: IDs, experts: int) -> Array:
    depth, k = flat_STLK.shape[2:]
    pairs = np.zeros((depth, experts, experts))
    for i in range(depth):
        chosen = flat_STLK[:, :, i].reshape(-1, k).astype(np.int64)
        cell = chosen[:, :, None] * experts + chosen[:, None, :]
        pairs[i] = np.bincount(cell.ravel(), minlength=experts**2).reshape(experts, experts)
        np.fill_diagonal(pairs[i], 0)
    return pairs


def _shared(now_STLK: IDs, other_STLK: IDs, *, first: bool = False) -> Array:
    """Return slots of ``now`` whose expert is among ``other``'s, and slots compared, ``[S, L, 2]``.

    ``first``: a level without a predecessor stands before the others.
    """
    same = (now_STLK[..., :, None] == other_STLK[..., None, :]).any(axis=-1).sum(axis=(1, 3))
    compared = np.full_like(same, now_STLK.shape[1] * now_STLK.shape[3])
    shared = np.stack([same, compared], axis=-1).astype(np.float64)
    return np.concatenate([np.zeros((1, *shared.shape[1:])), shared]) if first else shared


def _positions(choices_SBNLK: IDs, experts: int) -> Array:
    tokens, depth = choices_SBNLK.shape[2:4]
    bin_N = np.arange(tokens) * POSITION_BINS // tokens
    table = np.zeros((depth, POSITION_BINS, experts))
    for i in range(depth):
        cell = bin_N[None, None, :, None] * experts + choices_SBNLK[:, :, :, i].astype(np.int64)
        table[i] = np.bincount(cell.ravel(), minlength=POSITION_BINS * experts).reshape(POSITION_BINS, experts)
    return table
