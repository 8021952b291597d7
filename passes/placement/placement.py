"""A placement: which device holds each expert, as data that is printed, saved, compared and checked.

Legend: L routed layers, E experts of a layer, G devices.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from moefx.errors import PlanError, UnsafeInputError
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.topology import Topology

VERSION = 1
IDs = NDArray[np.int64]


class Placement(BaseModel):
    """Primary device of every expert.

    Args:
        strategy: what made it.
        devices: names, in rank order.
        layers: dotted names of the routed FFNs.
        primary: for each layer, the index of the device of each expert.
        objective: sum over noise levels and layers of the rows of the busiest device (divided by its speed).
        bound: no placement of whole experts on these devices can have a smaller objective.
        balanced: the objective if load could be divided perfectly; ``objective / balanced`` is the slowdown.
        version: of this format.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    strategy: str
    devices: tuple[str, ...]
    layers: tuple[str, ...]
    primary: tuple[tuple[int, ...], ...]
    objective: float
    bound: float
    balanced: float

    @property
    def slowdown(self) -> float:
        """Predicted expert time against perfect balance, at least 1."""
        return self.objective / self.balanced if self.balanced > 0 else 1.0

    def experts_of(self, layer: int, device: int) -> IDs:
        """Return the experts of ``layer`` on ``device`` in ascending order: slot i of the device holds the i-th."""
        return np.flatnonzero(np.asarray(self.primary[layer]) == device)

    def order(self, layer: int) -> IDs:
        """Return the physical order ``[E]``: experts sorted by device, then by number."""
        return np.argsort(self.primary[layer], kind="stable")

    def counts(self, layer: int) -> IDs:
        """Return the number of experts of ``layer`` on each device ``[G]``."""
        return np.bincount(self.primary[layer], minlength=len(self.devices))

    def bytes_per_device(self, dims: ModelDims, budget: Budget | None = None) -> NDArray[np.float64]:
        """Return the bytes of weights on each device ``[G]``, those that every device keeps included."""
        held = sum(self.counts(i) * float(dims.expert_bytes[i]) for i in range(len(self.layers)))
        return (np.asarray(held, dtype=np.float64) + dims.shared_bytes) * (budget or Budget()).copies

    def check(self, dims: ModelDims, topology: Topology | None = None, budget: Budget | None = None) -> None:
        """Refuse a placement that does not fit the model, the devices or their memory.

        Raises:
            PlanError: it is of another model or of other devices, an expert has no device, or a device is too small.
        """
        self._require(self.layers == dims.layers, f"layers {_differ(self.layers, dims.layers)}")
        sizes = tuple(len(row) for row in self.primary)
        self._require(sizes == dims.experts, f"{sizes} experts per layer, the model has {dims.experts}")
        for name, row in zip(self.layers, self.primary, strict=True):
            homeless = [e for e, g in enumerate(row) if not 0 <= g < len(self.devices)]
            self._require(not homeless, f"experts {homeless} of {name} on no device of {len(self.devices)}")
        if topology is not None:
            self._require(self.devices == topology.devices, f"devices {self.devices}, not {topology.devices}")
        self._check_memory(dims, topology, budget or Budget())

    def _check_memory(self, dims: ModelDims, topology: Topology | None, budget: Budget) -> None:
        limits = topology.memory_bytes if topology is not None else np.full(len(self.devices), np.inf)
        if budget.memory_bytes is not None:
            limits = np.minimum(limits, budget.memory_bytes)
        needed = self.bytes_per_device(dims, budget)
        worst = int(np.argmax(needed - limits))
        missing = needed[worst] - limits[worst]
        if missing > 0:
            raise PlanError(
                f"place the experts on {len(self.devices)} devices",
                found=f"{self.devices[worst]} needs {needed[worst]:,.0f} bytes of weights and has {limits[worst]:,.0f}",
                do=f"use more devices, or a memory budget larger by {missing:,.0f} bytes",
            )

    def _require(self, holds: bool, found: str) -> None:
        if not holds:
            raise PlanError(f"use the placement of {self.strategy!r}", found=found, do="plan it again for this model")

    @property
    def digest(self) -> bytes:
        """SHA-256 of what a device must agree on with the others."""
        data = self.model_dump_json(include={"version", "devices", "layers", "primary"})
        return hashlib.sha256(data.encode()).digest()

    def save(self, path: str | Path) -> None:
        """Write JSON; an older file is replaced only by a whole new one."""
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def open(cls, path: str | Path) -> Placement:
        """Read what :meth:`save` wrote.

        Raises:
            UnsafeInputError: the file is missing, damaged or of another version.
        """
        try:
            read = cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            raise UnsafeInputError(f"read the placement {path}", found=str(error), do="plan it again") from error
        if read.version != VERSION:
            raise UnsafeInputError(
                f"read the placement {path}", found=f"version {read.version}", do=f"write it as {VERSION}"
            )
        return read

    def __str__(self) -> str:
        head = f"{self.strategy}: {len(self.layers)} layers on {len(self.devices)} devices"
        lines = [f"{head}, slowdown {self.slowdown:.3f} (at least {self.bound / max(self.balanced, 1e-30):.3f})"]
        for i, name in enumerate(self.layers):
            homes = (f"{device}: {','.join(map(str, self.experts_of(i, g)))}" for g, device in enumerate(self.devices))
            lines.append(f"  {name}  " + "  ".join(homes))
        return "\n".join(lines)


def _differ(found: Sequence[str], wanted: Sequence[str]) -> str:
    missing, extra = sorted(set(wanted) - set(found))[:3], sorted(set(found) - set(wanted))[:3]
    return f"differ from the model's: without {missing}, with {extra}" if missing or extra else "in another order"
