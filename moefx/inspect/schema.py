"""The JSON form of a dump: a stable schema, described in docs/dump-schema.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from moefx import __version__
from moefx.graph import Graph
from moefx.graph.origin import origin_of
from moefx.inspect.listing import call_text
from moefx.inspect.regions import Region
from moefx.inspect.text import dtype_name, literal, type_of
from moefx.passes.analysis import analyse
from moefx.passes.analysis.site import Miss, Site, Weight

SCHEMA = 1
JSON = dict[str, Any]


def to_text(document: Mapping[str, Any]) -> str:
    """Return a document as JSON text; the same bytes for the same document."""
    return json.dumps(document, indent=1, ensure_ascii=True, allow_nan=False) + "\n"


def document(graph: Graph, stage: str, **parts: Any) -> JSON:
    """Return the head that every dump shares, followed by ``parts``."""
    return head(stage) | {
        "model": model(graph),
        "inputs": [_value(n) for n in graph.fx.nodes if n.op == "placeholder"],
        "guards": [{"condition": guard.describe(), "source": guard.source} for guard in graph.guards],
        **parts,
    }


def head(stage: str) -> JSON:
    """Return the identification of a dump."""
    return {"format": "moefx.dump", "schema_version": SCHEMA, "moefx_version": __version__, "stage": stage}


def model(graph: Graph) -> JSON:
    """Return what is said of the whole model."""
    parameters = list(graph.root.parameters())
    return {
        "class": type(graph.root).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "dtypes": sorted({dtype_name(p.dtype) for p in parameters}),
        "operations": sum(n.op not in ("placeholder", "output") for n in graph.fx.nodes),
    }


def region(found: Region) -> JSON:
    """Return a region and what is inside it."""
    return {
        "kind": found.kind,
        "path": found.path,
        "call": found.index,
        "class": found.type_name or None,
        "detail": found.detail,
        "output": list(found.output),
        "parameters": found.parameters,
        "site": found.site.name if found.site else None,
        "marks": list(found.marks),
        "children": [region(child) for child in found.children],
    }


def sites(graph: Graph) -> list[JSON]:
    """Return all sites of ``graph``."""
    return [site(found) for found in analyse(graph).sites]


def misses(graph: Graph) -> list[JSON]:
    """Return all near misses of ``graph``."""
    return [miss(found) for found in analyse(graph).misses]


def site(found: Site) -> JSON:
    """Return one site."""
    return {
        "name": found.name,
        "kind": found.kind,
        "flavour": found.flavour,
        "role": found.role,
        "dead": found.dead,
        "path": found.path,
        "call": found.call_index,
        "is_module": found.region_is_module,
        "why": found.why,
        "shapes": {key: _plain(value) for key, value in found.shapes.items()},
        "operands": {key: _plain(value) for key, value in found.operands.items() if _named(value)},
        "inputs": [n.name for n in found.inputs],
        "output": found.output.name,
        "nodes": len(found.nodes),
        "source": origin_of(found.output).source,
    }


def miss(found: Miss) -> JSON:
    """Return one near miss."""
    return {
        "kind": found.kind,
        "path": found.module_path,
        "node": found.node.name,
        "reason": found.reason,
        "passed": list(found.passed),
        "matched_nodes": found.progress,
        "source": found.source_line,
    }


def node(found: Node) -> JSON:
    """Return one node of a graph."""
    origin = origin_of(found)
    return {
        "name": found.name,
        "op": found.op,
        "code": call_text(found) if found.op not in ("placeholder", "output") else None,
        "inputs": [n.name for n in found.all_input_nodes],
        "type": type_of(found.meta["val"]) if "val" in found.meta else None,
        "path": origin.path,
        "call": origin.call_index,
        "source": origin.source,
        "rules": list(origin.rules),
    }


def _value(found: Node) -> JSON:
    value = found.meta.get("val")
    shape = [int(size) for size in value.shape] if isinstance(value, torch.Tensor) else None
    return {"name": found.name, "type": type_of(value), "shape": shape}


def _named(value: Any) -> bool:
    return value is None or isinstance(value, Node | Weight | bool | int | float | str) or _is_plain_list(value)


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(v, bool | int | float | str) for v in value)


def _plain(value: Any) -> Any:
    if isinstance(value, Weight):
        return {
            "parameter": value.fqn,
            "rows": _part(value.rows),
            "cols": _part(value.cols),
            "transposed": value.transposed,
        }
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else literal(value)


def _part(part: slice | tuple[int, ...] | None) -> Any:
    if isinstance(part, slice):
        return {"start": part.start, "stop": part.stop}
    return None if part is None else {"indices": [int(i) for i in part]}
