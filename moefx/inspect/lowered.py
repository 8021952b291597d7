"""The stages ``lowered`` and ``kernels`` of a dump: which routed regions have kernels, which have none and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moefx.codegen import Lowering, Refusal, RegionSpec, Target, lowerings, runtime
from moefx.codegen.choice_lowering import ChoiceLowering
from moefx.codegen.emit import emit
from moefx.codegen.schedule import load_class
from moefx.codegen.spec import Kernel
from moefx.codegen.targets import target
from moefx.errors import NothingMatched
from moefx.graph import Graph
from moefx.inspect import schema
from moefx.inspect.text import clean

DEFAULT_TARGET = "sm_90"


@dataclass(frozen=True)
class RegionUse:
    """A region and the sites that it computes, with the load that the example inputs bring."""

    region: RegionSpec
    sites: tuple[str, ...]
    rows: int
    experts: int
    notes: tuple[str, ...] = ()

    @property
    def load(self) -> int:
        """Rows per expert, rounded up to a power of two."""
        return load_class(self.rows, self.experts)

    def with_dtype(self, dtype: str | None) -> RegionUse:
        """Return the same region computed in another dtype; ``None`` keeps the model's."""
        if dtype is None:
            return self
        linears = tuple(dataclasses.replace(one, dtype=dtype) for one in self.region.linears)
        combine = self.region.combine and dataclasses.replace(self.region.combine, dtype=dtype)
        return dataclasses.replace(self, region=dataclasses.replace(self.region, linears=linears, combine=combine))

    def with_load(self, load: int | None) -> RegionUse:
        """Return the same region under ``load`` rows per expert; ``None`` keeps that of the example inputs."""
        return self if load is None else dataclasses.replace(self, rows=load * self.experts)


@dataclass(frozen=True)
class KernelUse:
    """What is no region of products, such as a router or an attention of routed heads, and the sites that it serves."""

    what: str
    kernels: tuple[Kernel, ...]
    #: Those of the forward pass in training, and of the backward pass.
    training: tuple[Kernel, ...]
    sites: tuple[str, ...]
    target_rows: int = 128

    def sources(self, device: Target) -> dict[str, str]:
        """Return the emitted modules by name."""
        return {one.name: emit(one, one.schedule(device, 1024, self.target_rows)) for one in self.kernels}


def regions_of(graph: Graph) -> tuple[list[RegionUse], list[Refusal]]:
    """Return the distinct regions of a graph in execution order, and what was refused."""
    uses: dict[tuple[str, int, int], RegionUse] = {}
    refused: list[Refusal] = []
    for item in lowerings(graph):
        if isinstance(item, Refusal):
            refused.append(item)
        elif isinstance(item, Lowering | ChoiceLowering):
            rows, experts = (item.rows, item.experts) if isinstance(item, ChoiceLowering) else _load(item)
            key = (item.region.key, rows, experts)
            before = uses.get(key, RegionUse(item.region, (), rows, experts, item.notes))
            uses[key] = dataclasses.replace(before, sites=(*before.sites, item.name))
    return list(uses.values()), refused


def others_of(graph: Graph) -> list[KernelUse]:
    """Return the distinct routers, groupings, attentions of routed heads and moves of tokens in execution order."""
    uses: dict[tuple[str, ...], KernelUse] = {}
    for item in lowerings(graph):
        if isinstance(item, Refusal | Lowering):
            continue
        fresh = KernelUse(item.what, item.kernels, item.training_kernels, ())
        key = (fresh.what, *(one.name for one in fresh.kernels))
        before = uses.get(key, fresh)
        uses[key] = dataclasses.replace(before, sites=(*before.sites, item.name))
    return list(uses.values())


def kernels_of(graph: Graph) -> tuple[list[RegionUse], list[KernelUse]]:
    """Return what of a graph has kernels.

    Raises:
        NothingMatched: nothing has.
    """
    (uses, refused), others = regions_of(graph), others_of(graph)
    if not uses and not others:
        reasons = "; ".join(dict.fromkeys(item.reason for item in refused))
        raise NothingMatched(
            f"emit kernels for {type(graph.root).__name__}",
            found=reasons or "no routed region in its graph",
            do="name a --recipe that routes it",
        )
    return uses, others


def _load(item: Lowering) -> tuple[int, int]:
    """Return how many rows over how many experts the example inputs bring."""
    values: list[Any] = [node.meta.get("val", node.meta.get("example_value")) for node in item.inputs[:3]]
    rows = values[2].shape[0] if item.region.reads_order else values[0].shape[0]
    return int(rows), int(values[1].shape[0]) - 1


def lowered_text(graph: Graph, device: Target) -> str:
    """Return the regions as text: sites, kernels with their schedules, why a region ends, and what was refused."""
    uses, refused = regions_of(graph)
    missed = sum(item.kind == "region" for item in refused)
    lines = [f"{type(graph.root).__name__}: {len(uses)} kinds of routed region, {missed} not lowered"]
    for use in uses:
        lines += ["", f"region {use.region.key} at {_sites(use.sites)}"]
        lines.append(
            f"  {use.rows} rows over {use.experts} experts in the example inputs, class of {use.load} per expert"
        )
        schedules = runtime.schedules(use.region, device, use.rows, use.experts)
        described = [schedule.describe() for schedule in schedules] + [""] * len(use.region.kernels)
        for kernel, how in zip(use.region.kernels, described, strict=False):
            lines.append(f"  {kernel.name}{f': {device.name}, {how}' if how else ''}")
        lines += [f"  ends there because {note}" for note in use.notes]
    for other in others_of(graph):
        lines += ["", f"{other.what} at {_sites(other.sites)}", *(f"  {one.name}" for one in other.kernels)]
    for item in refused:
        lines += ["", f"{item.kind} not lowered: {item.name}", f"  because {item.reason}"]
    if len(lines) == 1:
        lines += ["", "nothing to lower: no operator of the dialect stands in its graph, and no router keeps a record"]
    return "\n".join(clean(line) for line in lines) + "\n"


def lowered_json(graph: Graph, device: Target) -> dict[str, Any]:
    """Return the same as data."""
    uses, refused = regions_of(graph)
    return {
        "target": device.name,
        "regions": [
            {
                "key": use.region.key,
                "sites": list(use.sites),
                "rows": use.rows,
                "experts": use.experts,
                "load": use.load,
                "kernels": [kernel.name for kernel in use.region.kernels],
                "schedules": [
                    dataclasses.asdict(one) for one in runtime.schedules(use.region, device, use.rows, use.experts)
                ],
                "notes": list(use.notes),
            }
            for use in uses
        ],
        "others": [
            {"what": use.what, "sites": list(use.sites), "kernels": [one.name for one in use.kernels]}
            for use in others_of(graph)
        ],
        "refused": [{"site": item.name, "what": item.kind, "reason": item.reason} for item in refused],
    }


def sources_of(graph: Graph, device: Target) -> dict[str, str]:
    """Return the emitted modules of all regions by name, each once."""
    uses, others = kernels_of(graph)
    found: dict[str, str] = {}
    for use in uses:
        found |= runtime.sources(use.region, device, use.rows, use.experts)
    for other in others:
        found |= other.sources(device)
    return found


def kernels_text(graph: Graph, device: Target) -> str:
    """Return the emitted modules one after another, each under its name."""
    parts = [f"# {'-' * 100}\n# {name}\n\n{source}" for name, source in sources_of(graph, device).items()]
    return "\n".join(parts)


def kernels_json(graph: Graph, device: Target) -> dict[str, Any]:
    """Return the same as data."""
    return {"target": device.name, "sources": sources_of(graph, device)}


def write(graph: Graph, stage: str, format: str, device: str | None) -> str:
    """Return stage ``lowered`` or ``kernels`` in a format, for the named target."""
    chosen = target(device or DEFAULT_TARGET)
    if format == "json":
        parts = lowered_json(graph, chosen) if stage == "lowered" else kernels_json(graph, chosen)
        return schema.to_text(schema.document(graph, stage, **parts))
    return lowered_text(graph, chosen) if stage == "lowered" else kernels_text(graph, chosen)


def _sites(names: tuple[str, ...]) -> str:
    if len(names) <= 3:
        return ", ".join(names)
    return f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)} sites)"
