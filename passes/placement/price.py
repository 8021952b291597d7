"""The predicted time of one layer under a trial layout: what greedy strategies ask many times."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.draft import Homes, as_rows
from moefx.passes.placement.migration import move_bytes, moves
from moefx.passes.placement.placement import Placement, Replica
from moefx.passes.placement.predict import dispatch_bytes, layer_seconds
from moefx.passes.placement.topology import Topology
from moefx.passes.placement.trace import RoutingTrace

IDs = NDArray[np.int64]


class Pricer:
    """Prices of trial layouts on one problem."""

    def __init__(self, trace: RoutingTrace, topology: Topology, dims: ModelDims, budget: Budget) -> None:
        self.trace, self.topology, self.dims, self.budget = trace, topology, dims, budget
        limits_G = topology.memory_bytes
        self.limits_G = limits_G if budget.memory_bytes is None else np.minimum(limits_G, budget.memory_bytes)

    def layer(self, i: int, home_E: IDs, replicas: Sequence[Replica], levels: slice = slice(None)) -> float:
        """Return the time of layer i over the given levels, and of making its copies once."""
        trial = self._only(i, home_E, replicas)
        load_SE = self.trace.layer(i)[levels]
        seconds = float(layer_seconds(trial, i, load_SE, self.topology, self.dims).max(axis=1).sum())
        for load_E in load_SE:
            bytes_GG = dispatch_bytes(trial, i, load_E, self.dims)
            seconds += self.topology.exchange_seconds(bytes_GG) + self.topology.exchange_seconds(bytes_GG.T)
        copied = moves(trial.model_copy(update={"replicas": ()}), trial)
        return seconds + self.topology.exchange_seconds(move_bytes(copied, self.dims, len(self.topology)))

    def fits(self, homes: Homes, replicas: Sequence[Replica]) -> bool:
        """Tell whether the weights fit in memory."""
        trial = self._trial(as_rows(homes), replicas)
        return bool((trial.bytes_per_device(self.dims, self.budget) <= self.limits_G).all())

    def _only(self, i: int, home_E: IDs, replicas: Sequence[Replica]) -> Placement:
        """Return a placement in which only layer i means anything."""
        rows: list[tuple[int, ...]] = [(0,) * count for count in self.dims.experts]
        rows[i] = tuple(int(g) for g in home_E)
        return self._trial(tuple(rows), replicas)

    def _trial(self, rows: tuple[tuple[int, ...], ...], replicas: Sequence[Replica]) -> Placement:
        return Placement(
            strategy="trial", devices=self.topology.devices, layers=self.dims.layers, primary=rows,
            replicas=tuple(replicas), local_first=True, objective=0.0, bound=0.0, balanced=0.0,
        )  # fmt: skip
