"""How many rows may go to each device at once, by noise level: exchanges of a size that is known before the run.

In diffusion the load is a function of the noise level and hardly of the sample, so a table made from a trace is nearly
always enough; what is too much goes in a second exchange, which all devices make or none.

Legend: S noise levels, L layers, E experts of a layer, G devices, B ranges of noise levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moefx.errors import OptionError
from moefx.passes.placement import Placement, RoutingTrace
from moefx.passes.placement.objective import computed_shares

Array = NDArray[np.float64]
IDs = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class CapacityTable:
    """Rows that each rank may send to each device in one exchange.

    Args:
        sigmas: the highest noise level of each range ``[B]``, falling.
        rows: ``[B, L, G]``.
    """

    sigmas: tuple[float, ...]
    rows: IDs

    def range_at(self, sigma: float) -> int:
        """Return the range of a noise level: the last one that begins at or above it."""
        return max(sum(sigma <= top for top in self.sigmas) - 1, 0)

    def sent_rows(self, sigma: float) -> int:
        """Return the rows that one rank sends in one step, in all layers, empty places included."""
        return int(self.rows[self.range_at(sigma)].sum())


def capacity_table(
    trace: RoutingTrace, placement: Placement, rows: Sequence[int], *, ranges: int = 4, margin: float = 1.25
) -> CapacityTable:
    """Return the table for batches of so many rows on each rank.

    Args:
        trace: rows per expert and noise level.
        placement: where the experts live.
        rows: (token, slot) pairs of each layer on one rank.
        ranges: B; levels are divided evenly.
        margin: room for what one batch has more than the trace's average, as a factor.

    Raises:
        OptionError: there are no ranges, or the margin is below one.
    """
    if ranges < 1 or margin < 1:
        raise OptionError("make a capacity table", found=f"{ranges} ranges, margin {margin}", do="use at least one")
    levels = np.array_split(np.arange(len(trace.sigmas)), min(ranges, len(trace.sigmas)))
    share_SLG = _shares(trace, placement)
    most = np.stack([share_SLG[part].max(axis=0) for part in levels])
    allowed = np.minimum(np.ceil(margin * most * np.asarray(rows)[:, None]), np.asarray(rows)[:, None])
    return CapacityTable(tuple(float(trace.sigmas[part[0]]) for part in levels), allowed.astype(np.int64))


def changed_table(trace: RoutingTrace, placement: Placement, rows: Sequence[int], *, margin: float = 1.5) -> IDs:
    """Return the rows that may go to each device because their choice changed since the step before, ``[L, G]``.

    Args:
        trace: with persistence.
        placement: where the experts live.
        rows: pairs of each layer on one rank.
        margin: as a factor.
    """
    kept = trace.need("persistence", "make a table of changes")
    compared = np.maximum(kept[:, :, 1], 1.0)
    changed_L = (1 - kept[:, :, 0] / compared)[kept[:, :, 1].sum(axis=1) > 0].max(axis=0)
    wanted = margin * _shares(trace, placement).max(axis=0) * (changed_L * np.asarray(rows))[:, None]
    return np.asarray(np.ceil(wanted), dtype=np.int64)


def _shares(trace: RoutingTrace, placement: Placement) -> Array:
    """Return the fraction of a layer's rows that each device computes, ``[S, L, G]``."""
    found = np.zeros((len(trace.sigmas), len(trace.layers), len(placement.devices)))
    for s, sigma in enumerate(trace.sigmas):
        layout = placement.layouts[placement.layout_at(float(sigma))]
        for i in range(len(trace.layers)):
            load_E = trace.layer(i)[s]
            found[s, i] = load_E @ computed_shares(layout, i) / max(float(load_E.sum()), 1.0)
    return found
