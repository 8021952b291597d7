"""What the routers of a model did, by noise level: the input of every placement strategy.

In diffusion the load of an expert is a function of the noise level and hardly of the sample, so a table made once
serves every later run. It is kept by sigma and not by step index, because samplers with other steps, or with two
evaluations per step, visit other levels.

Legend: S noise levels, L routed layers, E the largest number of experts of a layer (rows past a layer's own are zero).
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moefx.errors import InputError, UnsafeInputError

VERSION = 1
Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Rows per noise level, layer and expert.

    Args:
        sigmas: noise levels ``[S]``, strictly decreasing, as a sampler visits them.
        layers: dotted names of the L routed FFNs.
        experts: number of experts of each layer.
        load: ``[S, L, E]``, rows (token, slot pairs) that each expert received.

    Raises:
        InputError: shapes do not fit, or loads are negative or not finite.
    """

    sigmas: Array
    layers: tuple[str, ...]
    experts: tuple[int, ...]
    load: Array

    def __post_init__(self) -> None:
        object.__setattr__(self, "sigmas", np.asarray(self.sigmas, dtype=np.float64))
        object.__setattr__(self, "load", np.asarray(self.load, dtype=np.float64))
        self._require(self.sigmas.ndim == 1 and len(self.sigmas) > 0, f"sigmas {self.sigmas.shape}")
        self._require(len(self.layers) == len(self.experts) > 0, f"{len(self.layers)} layers")
        self._require(min(self.experts) > 0, f"experts {self.experts}")
        wanted = (len(self.sigmas), len(self.layers), max(self.experts))
        self._require(self.load.shape == wanted, f"load {self.load.shape}, expected {wanted}")
        self._require(bool(np.isfinite(self.sigmas).all() and (np.diff(self.sigmas) < 0).all()), "unordered sigmas")
        bad = np.argwhere(~np.isfinite(self.load) | (self.load < 0))
        if len(bad):
            s, layer, e = bad[0]
            where = f"sigma {self.sigmas[s]:g}, {self.layers[layer]}, expert {e}"
            self._require(False, f"load {self.load[s, layer, e]} at {where}, {len(bad)} such values")

    @staticmethod
    def _require(holds: bool, found: str) -> None:
        if not holds:
            raise InputError("read a routing trace", found=found, do="collect it again with TraceCollector")

    def layer(self, index: int) -> Array:
        """Return the loads of one layer, ``[S, E_l]``."""
        return self.load[:, index, : self.experts[index]]

    def at(self, sigmas: Array | list[float]) -> RoutingTrace:
        """Return the trace another sampler would see: linear in sigma, constant outside the measured range."""
        wanted = np.asarray(sigmas, dtype=np.float64)
        flat = self.load[::-1].reshape(len(self.sigmas), -1)
        columns = [np.interp(wanted, self.sigmas[::-1], column) for column in flat.T]
        load = np.stack(columns, axis=1).reshape(len(wanted), *self.load.shape[1:])
        return RoutingTrace(wanted, self.layers, self.experts, load)

    def save(self, path: str | Path) -> None:
        """Write an ``.npz``; an older file is replaced only by a whole new one."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(
                    file,
                    version=np.int64(VERSION),
                    sigmas=self.sigmas,
                    layers=np.array(self.layers, dtype=np.str_),
                    experts=np.array(self.experts, dtype=np.int64),
                    load=self.load,
                )
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path) -> RoutingTrace:
        """Read what :meth:`save` wrote.

        Raises:
            UnsafeInputError: the file is missing, damaged or of a newer version.
            InputError: its numbers are no trace.
        """
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                version = int(file["version"])
                if version != VERSION:
                    raise UnsafeInputError(
                        f"read the routing trace {path}", found=f"version {version}", do=f"write it as {VERSION}"
                    )
                layers, experts = tuple(map(str, file["layers"])), tuple(map(int, file["experts"]))
                return cls(file["sigmas"], layers, experts, file["load"])
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
            raise UnsafeInputError(
                f"read the routing trace {path}", found=f"{type(error).__name__}: {error}", do="collect it again"
            ) from error
