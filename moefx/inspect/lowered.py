"""The stages ``lowered`` and ``kernels`` of a dump: which routed regions have kernels, which have none and why."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from moefx.codegen import Lowering, Refusal, RegionSpec, Target, lowerings, runtime
from moefx.codegen.attention import HeadLowering
from moefx.codegen.schedule import load_class
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


def regions_of(graph: Graph) -> tuple[list[RegionUse], list[Refusal]]:
    """Return the distinct regions of a graph in execution order, and what was refused."""
    uses: dict[tuple[str, int, int], RegionUse] = {}
    refused: list[Refusal] = []
    for item in lowerings(graph):
        if isinstance(item, Refusal):
            refused.append(item)
            continue
        if not isinstance(item, Lowering):
            continue
        rows, experts = _load(item)
        key = (item.region.key, rows, experts)
        before = uses.get(key, RegionUse(item.region, (), rows, experts, item.notes))
        uses[key] = dataclasses.replace(before, sites=(*before.sites, item.name))
    return list(uses.values()), refused


def heads_of(graph: Graph) -> list[HeadLowering]:
    """Return the attentions of routed heads of a graph in execution order."""
    return [item for item in lowerings(graph) if isinstance(item, HeadLowering)]


def some_regions_of(graph: Graph) -> list[RegionUse]:
    """Return the regions of a graph.

    Raises:
        NothingMatched: there are none.
    """
    uses, refused = regions_of(graph)
    if not uses:
        reasons = "; ".join(dict.fromkeys(item.reason for item in refused))
        raise NothingMatched(
            f"emit kernels for {type(graph.root).__name__}",
            found=reasons or "no routed region in its graph",
            do="name a --recipe that routes it",
        )
    return uses


def _load(item: Lowering) -> tuple[int, int]:
    """Return how many rows over how many experts the example inputs bring."""
    values: list[Any] = [node.meta.get("val", node.meta.get("example_value")) for node in item.inputs[:3]]
    rows = values[2].shape[0] if item.region.reads_order else values[0].shape[0]
    return int(rows), int(values[1].shape[0]) - 1


def lowered_text(graph: Graph, device: Target) -> str:
    """Return the regions as text: sites, kernels with their schedules, why a region ends, and what was refused."""
    uses, refused = regions_of(graph)
    lines = [f"{type(graph.root).__name__}: {len(uses)} kinds of routed region, {len(refused)} not lowered"]
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
    for head in heads_of(graph):
        lines += ["", f"attention of routed heads at {head.name}", *(f"  {spec.name}" for spec in head.specs)]
    for item in refused:
        lines += ["", f"not lowered: {item.name}", f"  because {item.reason}"]
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
        "heads": [{"site": item.name, "kernels": [spec.name for spec in item.specs]} for item in heads_of(graph)],
        "refused": [{"site": item.name, "reason": item.reason} for item in refused],
    }


def sources_of(graph: Graph, device: Target) -> dict[str, str]:
    """Return the emitted modules of all regions by name, each once."""
    heads = heads_of(graph)
    found = {s.name: s.emit(s.schedule(device, 1024, 128)) for head in heads for s in head.specs}
    for use in regions_of(graph)[0] if heads else some_regions_of(graph):
        found |= runtime.sources(use.region, device, use.rows, use.experts)
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
