"""What the routers of a model did, by noise level: the input of every placement strategy.

In diffusion the load of an expert is a function of the noise level and hardly of the sample, so a table made once
serves every later run. It is kept by sigma and not by step index, because samplers with other steps, or with two
evaluations per step, visit other levels. Everything is a count: traces of several runs are merged by adding them, and a
trace has the same size however many samples it saw.

Legend: S noise levels, L routed layers, E the largest number of experts of a layer (rows past a layer's own are zero),
P bins of token positions, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moefx.errors import InputError, PlanError

Array = NDArray[np.float64]
OPTIONAL = ("affinity", "coactivation", "persistence", "overlap", "position")


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Rows per noise level, layer and expert, and optionally how choices hang together.

    Args:
        sigmas: noise levels ``[S]``, strictly decreasing, as a sampler visits them.
        layers: dotted names of the L routed FFNs.
        experts: number of experts of each layer.
        load: ``[S, L, E]``, rows (token, slot pairs) that each expert received.
        affinity: ``[L-1, E, E]``, rows that flow from each expert of a layer to each of the next one, over all levels:
            a token with K experts there and K' here is K·K' flows of weight 1/K', so that a row sums to its load.
        coactivation: ``[L, E, E]``, tokens that chose both experts, symmetric with a zero diagonal.
        persistence: ``[S, L, 2]``, slots whose expert the same token had at the level before, and slots compared.
        overlap: ``[S, L, 2]``, slots whose expert the other guidance branch of the token has too, and slots compared.
        position: ``[L, P, E]``, rows by bin of the token's position in its sample.

    Raises:
        InputError: shapes do not fit, or a count is negative or not finite.
    """

    sigmas: Array
    layers: tuple[str, ...]
    experts: tuple[int, ...]
    load: Array
    affinity: Array | None = None
    coactivation: Array | None = None
    persistence: Array | None = None
    overlap: Array | None = None
    position: Array | None = None

    def __post_init__(self) -> None:
        for name in ("sigmas", "load", *OPTIONAL):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        self._require(self.sigmas.ndim == 1 and len(self.sigmas) > 0, f"sigmas {self.sigmas.shape}")
        self._require(len(self.layers) == len(self.experts) > 0, f"{len(self.layers)} layers")
        self._require(min(self.experts) > 0, f"experts {self.experts}")
        self._require(bool(np.isfinite(self.sigmas).all() and (np.diff(self.sigmas) < 0).all()), "unordered sigmas")
        for name, wanted in self._shapes().items():
            self._check_counts(name, getattr(self, name), wanted)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        levels, layers, experts = len(self.sigmas), len(self.layers), max(self.experts)
        bins = self.position.shape[1] if self.position is not None and self.position.ndim == 3 else 1
        return {
            "load": (levels, layers, experts),
            "affinity": (layers - 1, experts, experts),
            "coactivation": (layers, experts, experts),
            "persistence": (levels, layers, 2),
            "overlap": (levels, layers, 2),
            "position": (layers, bins, experts),
        }

    def _check_counts(self, name: str, counts: Array | None, wanted: tuple[int, ...]) -> None:
        if counts is None:
            return
        self._require(counts.shape == wanted, f"{name} {counts.shape}, expected {wanted}")
        bad = np.argwhere(~np.isfinite(counts) | (counts < 0))
        if not len(bad):
            return
        value, at = counts[tuple(bad[0])], bad[0].tolist()
        where = f"{at}"
        if name == "load":
            where = f"sigma {self.sigmas[at[0]]:g}, {self.layers[at[1]]}, expert {at[2]}"
        self._require(False, f"{name} {value} at {where}, {len(bad)} such values")

    @staticmethod
    def _require(holds: bool, found: str) -> None:
        if not holds:
            raise InputError("read a routing trace", found=found, do="collect it again with TraceCollector")

    def layer(self, index: int) -> Array:
        """Return the loads of one layer, ``[S, E_l]``."""
        return self.load[:, index, : self.experts[index]]

    def need(self, name: str, asked: str) -> Array:
        """Return one of the optional counts.

        Raises:
            PlanError: the trace has none.
        """
        counts: Array | None = getattr(self, name)
        if counts is None:
            raise PlanError(asked, found=f"a trace without {name}", do="collect it with this version's TraceCollector")
        return counts

    def at(self, sigmas: Array | list[float]) -> RoutingTrace:
        """Return the trace another sampler would see: linear in sigma, constant outside the measured range.

        Persistence depends on the distance between levels and is left out; counts over all levels stay.
        """
        wanted = np.asarray(sigmas, dtype=np.float64)

        def between(counts: Array) -> Array:
            flat = counts[::-1].reshape(len(self.sigmas), -1)
            columns = [np.interp(wanted, self.sigmas[::-1], column) for column in flat.T]
            return np.stack(columns, axis=1).reshape(len(wanted), *counts.shape[1:])

        overlap = None if self.overlap is None else between(self.overlap)
        return replace(self, sigmas=wanted, load=between(self.load), overlap=overlap, persistence=None)

    def merge(self, other: RoutingTrace) -> RoutingTrace:
        """Return the trace of both runs: counts add up; a level or a kind of count that one lacks is the other's.

        Raises:
            InputError: the traces are of different models, or of positions in different bins.
        """
        if (self.layers, self.experts) != (other.layers, other.experts):
            found = f"{len(self.layers)} and {len(other.layers)} layers, or other names or numbers of experts"
            raise InputError("merge two routing traces", found=found, do="merge traces of one model")
        if self.position is not None and other.position is not None and self.position.shape != other.position.shape:
            found = f"positions in {self.position.shape[1]} and {other.position.shape[1]} bins"
            raise InputError("merge two routing traces", found=found, do="collect both at one size of the samples")
        sigmas = np.union1d(self.sigmas, other.sigmas)[::-1]

        def by_level(trace: RoutingTrace, counts: Array) -> Array:
            spread = np.zeros((len(sigmas), *counts.shape[1:]))
            spread[np.searchsorted(-sigmas, -trace.sigmas)] = counts
            return spread

        def total(name: str, spread: Callable[[RoutingTrace, Array], Array]) -> Array | None:
            known = [spread(t, getattr(t, name)) for t in (self, other) if getattr(t, name) is not None]
            return np.sum(known, axis=0) if known else None

        def over_levels(trace: RoutingTrace, counts: Array) -> Array:
            return counts

        added: dict[str, Any] = {name: total(name, by_level) for name in ("load", "persistence", "overlap")}
        added |= {name: total(name, over_levels) for name in ("affinity", "coactivation", "position")}
        return replace(self, sigmas=sigmas, **added)

    def pruned(self, successors: int) -> RoutingTrace:
        """Return the trace with only the ``successors`` largest counts of each expert's affinity and co-activation.

        It bounds the size of a file for very many experts; what is dropped is missing from the sums.
        """
        if successors < 1:
            raise InputError("prune a routing trace", found=f"successors = {successors}", do="keep at least one")

        def largest(counts: Array | None) -> Array | None:
            if counts is None or counts.shape[-1] <= successors:
                return counts
            limit = np.partition(counts, -successors, axis=-1)[..., -successors, None]
            return np.where(counts >= limit, counts, 0.0)

        return replace(self, affinity=largest(self.affinity), coactivation=largest(self.coactivation))

    def save(self, path: str | Path) -> None:
        """Write an ``.npz``; an older file is replaced only by a whole new one."""
        from moefx.passes.placement.trace_file import write

        write(self, Path(path))

    @classmethod
    def open(cls, path: str | Path) -> RoutingTrace:
        """Read what :meth:`save` wrote, of this version or an older one.

        Raises:
            UnsafeInputError: the file is missing, damaged or of a newer version.
            InputError: its numbers are no trace.
        """
        from moefx.passes.placement.trace_file import read

        return read(Path(path))
