"""A placement: where the weights of each expert are, as data that is printed, saved, compared and checked.

One *layout* says who holds what: a primary device per expert, further copies, and the memory tier of the weights. A
placement is the layout a run starts with and, optionally, layouts that take over at lower noise levels.

Legend: L routed layers, E experts of a layer, G devices.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moefx.errors import UnsafeInputError
from moefx.passes.placement.check import check_layouts, check_memory
from moefx.passes.placement.dims import Budget, ModelDims
from moefx.passes.placement.topology import Topology

VERSION = 2
RESIDENT = "device"
# Experts streamed from a slower tier pass through this many buffers of the device.
STAGING_SLOTS = 2
IDs = NDArray[np.int64]


class Replica(BaseModel):
    """A copy of an expert on a device that is not its primary.

    Args:
        layer: index of the layer.
        expert: its number.
        device: index of the device.
        share: fraction of the expert's rows that this copy computes; the primary computes what the copies leave.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    layer: int = Field(ge=0)
    expert: int = Field(ge=0)
    device: int = Field(ge=0)
    share: float = Field(ge=0, le=1, allow_inf_nan=False)


class Layout(BaseModel):
    """Who holds what at one time.

    Args:
        primary: for each layer, the index of the device of each expert.
        replicas: further copies, by layer, expert and device.
        tiers: for each layer, the memory tier of each expert's weights on the devices that hold it: ``"device"`` for
            resident, else the name of a tier of the topology, from which they are streamed. Empty: all are resident.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    primary: tuple[tuple[int, ...], ...]
    replicas: tuple[Replica, ...] = ()
    tiers: tuple[tuple[str, ...], ...] = ()


class Window(Layout):
    """A layout that takes over during a run.

    Args:
        sigma: it serves the noise levels from here down to the next window's.
    """

    sigma: float = Field(allow_inf_nan=False)


class Goal(BaseModel):
    """What a strategy minimised where that is not ``Placement.objective``.

    Args:
        name: of the quantity.
        value: reached.
        bound: no placement of this strategy's kind can have a smaller value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    value: float
    bound: float


class Placement(Layout):
    """Where the experts of a model live, over a whole run.

    Args:
        strategy: what made it.
        devices: names, in rank order.
        layers: dotted names of the routed FFNs.
        windows: layouts that replace the first one, by falling noise level.
        local_first: a row goes to a copy on its own device where there is one; else the shares decide.
        objective: sum over noise levels and layers of the rows of the busiest device (divided by its speed).
        bound: no placement with as many copies on these devices can have a smaller objective.
        balanced: the objective if load could be divided perfectly; ``objective / balanced`` is the slowdown.
        goal: what the strategy minimised, if not the objective.
        version: of this format.
    """

    version: int = VERSION
    strategy: str
    devices: tuple[str, ...]
    layers: tuple[str, ...]
    windows: tuple[Window, ...] = ()
    local_first: bool = False
    objective: float
    bound: float
    balanced: float
    goal: Goal | None = None

    @property
    def slowdown(self) -> float:
        """Predicted expert time against perfect balance, at least 1."""
        return self.objective / self.balanced if self.balanced > 0 else 1.0

    @property
    def layouts(self) -> tuple[Placement, ...]:
        """The layouts in the order of use, each as a placement without windows; one if there are no windows."""
        first = self.model_copy(update={"windows": ()})
        fields = tuple(Layout.model_fields)
        return first, *(first.model_copy(update={f: getattr(w, f) for f in fields}) for w in self.windows)

    def layout_at(self, sigma: float) -> int:
        """Return the index in :attr:`layouts` of the one that serves noise level ``sigma``."""
        return sum(sigma <= window.sigma for window in self.windows)

    def experts_of(self, layer: int, device: int) -> IDs:
        """Return the experts whose primary is ``device``, ascending: slot i of the device holds the i-th."""
        return np.flatnonzero(np.asarray(self.primary[layer]) == device)

    def copies_of(self, layer: int, device: int) -> IDs:
        """Return all experts of ``layer`` that ``device`` holds, copies included, ascending."""
        return np.flatnonzero(self.holders(layer)[:, device])

    def holders(self, layer: int) -> NDArray[np.bool_]:
        """Return which device holds which expert of ``layer``, ``[E, G]``."""
        held = np.zeros((len(self.primary[layer]), len(self.devices)), dtype=np.bool_)
        held[np.arange(len(held)), self.primary[layer]] = True
        for replica in self._replicas(layer):
            held[replica.expert, replica.device] = True
        return held

    def shares(self, layer: int) -> NDArray[np.float64]:
        """Return the fraction of each expert's rows that each device computes, ``[E, G]``; rows sum to one."""
        shares = np.zeros((len(self.primary[layer]), len(self.devices)))
        for replica in self._replicas(layer):
            shares[replica.expert, replica.device] = replica.share
        left = np.clip(1 - shares.sum(axis=1), 0, None)
        shares[np.arange(len(shares)), self.primary[layer]] += left
        return shares

    def resident(self, layer: int) -> NDArray[np.bool_]:
        """Return which experts of ``layer`` are resident in device memory ``[E]``; the others are streamed."""
        if not self.tiers:
            return np.ones(len(self.primary[layer]), dtype=np.bool_)
        return np.array([tier == RESIDENT for tier in self.tiers[layer]], dtype=np.bool_)

    def _replicas(self, layer: int) -> list[Replica]:
        return [replica for replica in self.replicas if replica.layer == layer]

    def order(self, layer: int) -> IDs:
        """Return the physical order ``[E]``: experts sorted by primary device, then by number."""
        return np.argsort(self.primary[layer], kind="stable")

    def counts(self, layer: int) -> IDs:
        """Return the number of experts of ``layer`` whose primary is each device ``[G]``."""
        return np.bincount(self.primary[layer], minlength=len(self.devices))

    def bytes_per_device(self, dims: ModelDims, budget: Budget | None = None) -> NDArray[np.float64]:
        """Return the most bytes of weights each device ever holds ``[G]``, those that every device keeps included.

        While one layout is in use the experts of the next arrive, so two successive layouts count together. Streamed
        experts count as two buffers of the largest.
        """
        layouts = self.layouts
        pairs = itertools.pairwise(layouts) if len(layouts) > 1 else [(self, self)]
        most = np.max([self._held_bytes(before, after, dims) for before, after in pairs], axis=0)
        return np.asarray(most + dims.shared_bytes, dtype=np.float64) * (budget or Budget()).copies

    @staticmethod
    def _held_bytes(before: Placement, after: Placement, dims: ModelDims) -> NDArray[np.float64]:
        held, staged = np.zeros(len(before.devices)), np.zeros(len(before.devices))
        for i, size in enumerate(dims.expert_bytes):
            parts = [(layout.holders(i), layout.resident(i)[:, None]) for layout in (before, after)]
            held += np.logical_or.reduce([held_EG & resident for held_EG, resident in parts]).sum(axis=0) * float(size)
            streams = np.logical_or.reduce([held_EG & ~resident for held_EG, resident in parts]).any(axis=0)
            staged = np.maximum(staged, np.where(streams, float(size) * STAGING_SLOTS, 0.0))
        return held + staged

    def check(self, dims: ModelDims, topology: Topology | None = None, budget: Budget | None = None) -> None:
        """Refuse a placement that does not fit the model, the devices or their memory.

        Raises:
            PlanError: it is of another model or of other devices, an expert has no device, two copies of an expert
                share a device, or a device is too small.
        """
        check_layouts(self, dims, topology)
        check_memory(self.devices, self.bytes_per_device(dims, budget), topology, budget or Budget())

    @property
    def digest(self) -> bytes:
        """SHA-256 of what a device must agree on with the others."""
        agreed = {"version", "devices", "layers", "windows", "local_first", *Layout.model_fields}
        return hashlib.sha256(self.model_dump_json(include=agreed).encode()).digest()

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
        """Read what :meth:`save` wrote, of this version or an older one.

        Raises:
            UnsafeInputError: the file is missing, damaged or of a newer version.
        """
        try:
            read = cls.model_validate_json(Path(path).read_bytes())
        except (OSError, ValidationError) as error:
            raise UnsafeInputError(f"read the placement {path}", found=str(error), do="plan it again") from error
        if not 1 <= read.version <= VERSION:
            raise UnsafeInputError(
                f"read the placement {path}", found=f"version {read.version}", do=f"write it as {VERSION}"
            )
        return read.model_copy(update={"version": VERSION})

    def __str__(self) -> str:
        head = f"{self.strategy}: {len(self.layers)} layers on {len(self.devices)} devices"
        lines = [f"{head}, slowdown {self.slowdown:.3f} (at least {self.bound / max(self.balanced, 1e-30):.3f})"]
        for window, layout in zip((None, *self.windows), self.layouts, strict=True):
            lines += [f" from sigma {window.sigma:g}:"] if window is not None else []
            for i, name in enumerate(self.layers):
                homes = (f"{device}: {_listed(layout, i, g)}" for g, device in enumerate(self.devices))
                lines.append(f"  {name}  " + "  ".join(homes))
        return "\n".join(lines)


def _listed(layout: Placement, layer: int, device: int) -> str:
    """Return the experts of a device as text: ``+`` marks a copy, ``~`` one that is streamed."""
    primary, resident = np.asarray(layout.primary[layer]), layout.resident(layer)
    marks = (
        (e, "" if primary[e] == device else "+", "" if resident[e] else "~") for e in layout.copies_of(layer, device)
    )
    return ",".join(f"{copy}{e}{streamed}" for e, copy, streamed in marks)
