"""Residual blocks: invocations that add to a stream of tokens and pass it on in the same shape.

A block is the smallest module invocation that contains at least two residual sub-layers (an attention and a
feed-forward network, say), or one that repeats. Where the model has no modules, a period in the sequence of sub-layers
takes their place.

Operands of a site: ``streams``, pairs of the node that enters and the node that leaves; ``stream`` the entering node of
the main pair; ``sites``, the names of the sub-layers inside; ``repeats``, how many blocks have the same structure, and
``position`` among them; ``layer``, its place among the ``layers`` blocks on the way to the output, in program order;
``dead_outputs``, leaving streams that feed nothing that is returned.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

from torch.fx import Node

from moefx.graph.kinds import MOVES, shape
from moefx.graph.origin import ModuleCall
from moefx.passes.analysis.context import Context
from moefx.passes.analysis.flow import Flow
from moefx.passes.analysis.site import Match, Site
from moefx.passes.analysis.streams import Box

_ALONG_STREAM = MOVES | {"dropout", "add", "sub", "cat"}
_CLAMPS = frozenset({"clamp", "nan_to_num"})
_WORK = frozenset({"linear", "conv", "sdpa", "matmul", "mha"})


def find_blocks(context: Context, sites: list[Site]) -> list[Match]:
    """Return the blocks of a graph, given its sub-layers."""
    layers = [s for s in sites if isinstance(s.operands.get("residual"), Node)]
    mapping = [c for c in context.graph.calls if c.path and _works(context, c) and streams_of(context, c)]
    alike = _alike(context.flow, mapping)
    calls = _chosen(context, mapping, layers, alike)
    if not calls:
        return _numbered(_periodic(context, layers))
    found = []
    for call in calls:
        group = {id(c) for c in alike[id(call)]}
        same = [c for c in calls if id(c) in group]
        inner = [s for s in layers if _within(s, set(call.nodes))]
        found.append(Match(_call_site(context, call, inner, len(same), [id(c) for c in same].index(id(call)))))
    return _numbered(found)


def _numbered(found: list[Match]) -> list[Match]:
    """Number the blocks on the way to the output through all groups of alike ones; others within their group."""
    main = [m.site for m in found if m.site.role == "main" and not m.site.dead]
    place = {id(site): (i, len(main)) for i, site in enumerate(main)}
    numbered = []
    for site in (m.site for m in found):
        layer, layers = place.get(id(site), (site.operands["position"], site.operands["repeats"]))
        numbered.append(Match(replace(site, operands={**site.operands, "layer": layer, "layers": layers})))
    return numbered


def _works(context: Context, call: ModuleCall) -> bool:
    return any(context.flow.ops[n].kind in _WORK for n in call.nodes)


def _alike(flow: Flow, calls: list[ModuleCall]) -> dict[int, list[ModuleCall]]:
    """Return, per invocation, all invocations of the same type and structure."""
    groups: dict[Hashable, list[ModuleCall]] = {}
    for call in calls:
        groups.setdefault((call.type_name, structure(flow, call.nodes)), []).append(call)
    return {id(call): same for same in groups.values() for call in same}


def structure(flow: Flow, nodes: tuple[Node, ...]) -> Hashable:
    """Return what two isomorphic regions have in common: their operations in order, and how these are connected."""
    place: dict[Node, int] = {}
    made: list[Hashable] = []
    for node in nodes:
        what = flow.ops[node]
        if what.kind not in ("size", "param"):
            made.append((_spelling(flow, node), *(place.get(source, -1) for source in what.inputs)))
            place[node] = len(place)
    return hash(tuple(made))


def _spelling(flow: Flow, node: Node) -> str:
    """Return the name of an operation; of a module whose inside is not seen, its type instead of its path."""
    what = flow.ops[node]
    if what.kind != "module":
        return what.name
    return type(flow.graph.root.get_submodule(str(node.target))).__name__


# -- by module invocation ----------------------------------------------------------------------------------------------


def _chosen(
    context: Context, mapping: list[ModuleCall], layers: list[Site], alike: dict[int, list[ModuleCall]]
) -> list[ModuleCall]:
    """Return those of the invocations that are blocks, in program order."""
    nodes = {id(c): set(c.nodes) for c in mapping}
    count = {id(c): sum(_within(s, nodes[id(c)]) for s in layers) + _routed(context, c) for c in mapping}
    chosen: list[ModuleCall] = []
    taken: set[Node] = set()
    for call in sorted(mapping, key=lambda c: len(c.nodes)):
        if count[id(call)] >= 2 and not taken & nodes[id(call)]:
            chosen.append(call)
            taken |= nodes[id(call)]
    for call in sorted(mapping, key=lambda c: len(c.nodes)):
        if count[id(call)] < 2 and len(alike[id(call)]) > 1 and not taken & nodes[id(call)]:
            chosen.append(call)
            taken |= nodes[id(call)]
    return sorted(chosen, key=lambda c: context.flow.index[c.nodes[0]])


def _routed(context: Context, call: ModuleCall) -> int:
    """Count the sub-layers that an earlier rewrite replaced: modules that map tokens to tokens, and no sites now."""
    inside = [n for n in call.nodes if context.flow.ops[n].kind == "module" and context.flow.ops[n].inputs]
    return sum(shape(n) == shape(context.flow.ops[n].inputs[0]) and len(shape(n) or ()) == 3 for n in inside)


def _within(site: Site, nodes: set[Node]) -> bool:
    """Whether a sub-layer and the add of its result lie inside ``nodes``."""
    return site.output in nodes and site.operands["residual"] in nodes


def streams_of(context: Context, call: ModuleCall) -> tuple[tuple[Node, Node], ...]:
    """Return the streams that an invocation passes on: pairs of the node that enters and the node that leaves."""
    flow, inside = context.flow, set(call.nodes)
    leaving = [n for n in call.nodes if flow.ops[n].kind != "size" and _leaves(flow, n, inside)]
    found = []
    for exit_ in leaving:
        entry = _entry(context, exit_, inside)
        if entry is not None:
            found.append((entry, exit_))
    return tuple(found)


def _leaves(flow: Flow, node: Node, inside: set[Node]) -> bool:
    sizes = shape(node)
    if sizes is None or len(sizes) < 2 or flow.ops[node].kind == "param":
        return False
    readers = flow.readers[node]
    return not readers or any(user not in inside for user in readers)


def _entry(context: Context, exit_: Node, inside: set[Node]) -> Node | None:
    """Follow the residual adds back from ``exit_`` to the value that entered as the same stream."""
    sizes = shape(exit_) or ()
    added = False
    stack: list[tuple[Node, Box]] = [(exit_, tuple((0, size) for size in sizes))]
    seen: set[tuple[Node, Box]] = set()
    while stack:
        node, box = stack.pop()
        if node not in inside:
            if added and shape(node) == sizes:
                return node
            continue
        what = context.flow.ops[node]
        if (node, box) in seen or (what.kind not in _ALONG_STREAM and what.name not in _CLAMPS):
            continue
        seen.add((node, box))
        added |= what.kind == "add"
        stack.extend((source, part) for source, part in context.streams.back(node, box) if part is not None)
    return None


def _call_site(context: Context, call: ModuleCall, inner: list[Site], repeats: int, position: int) -> Site:
    flow = context.flow
    inside = set(call.nodes)
    streams = streams_of(context, call)
    aligned = [pair for pair in streams if pair[1] in context.streams.aligned]
    main = (aligned or list(streams))[-1]
    entries = tuple(dict.fromkeys(s for n in call.nodes for s in flow.ops[n].inputs if s not in inside))
    name = call.name
    return _site(context, name, call.path, call.index, call.nodes, entries, streams, main, inner, (repeats, position))


def _site(
    context: Context,
    name: str,
    path: str,
    index: int,
    nodes: tuple[Node, ...],
    entries: tuple[Node, ...],
    streams: tuple[tuple[Node, Node], ...],
    main: tuple[Node, Node],
    inner: list[Site],
    repeats: tuple[int, int],
) -> Site:
    dead = tuple(exit_ for _, exit_ in streams if not context.flow.is_live(exit_))
    operands: dict[str, Any] = {
        "stream": main[0],
        "residual": main[1],
        "streams": streams,
        "sites": tuple(s.name for s in inner),
        "repeats": repeats[0],
        "position": repeats[1],
        "dead_outputs": dead,
    }
    return Site(
        kind="block",
        name=name,
        path=path,
        call_index=index,
        nodes=nodes,
        inputs=entries,
        output=main[1],
        operands=operands,
        shapes={"x": shape(main[0])},
        role=context.role(main[1], main[1]),
        why=f"{len(streams)} stream(s) in and out in one shape, {len(inner)} sub-layers, one of {repeats[0]} alike",
        region_is_module=bool(path),
        flavour="joint" if len(streams) > 1 else "single" if inner else "conv",
        dead=len(dead) == len(streams),
    )


# -- without modules ---------------------------------------------------------------------------------------------------


def _periodic(context: Context, layers: list[Site]) -> list[Match]:
    """Return the periods of a sequence of sub-layers on the main stream."""
    main = sorted((s for s in layers if s.role == "main"), key=lambda s: context.flow.index[s.operands["residual"]])
    kinds = [(s.kind, s.flavour) for s in main]
    period = next((p for p in range(1, len(kinds) // 2 + 1) if kinds == kinds[:p] * (len(kinds) // p)), 0)
    if not period:
        return []
    groups = [main[i : i + period] for i in range(0, len(main), period)]
    return [Match(_period_site(context, group, len(groups), i)) for i, group in enumerate(groups)]


def _period_site(context: Context, group: list[Site], repeats: int, position: int) -> Site:
    flow = context.flow
    entry, exit_ = group[0].operands["stream"], group[-1].operands["residual"]
    bits = flow.ancestors[flow.index[exit_]] & ~flow.ancestors[flow.index[entry]]
    first = flow.index[entry]
    nodes = tuple(n for n in flow.nodes[first + 1 : flow.index[exit_] + 1] if bits >> flow.index[n] & 1)
    inside = set(nodes)
    entries = tuple(dict.fromkeys(s for n in nodes for s in flow.ops[n].inputs if s not in inside))
    name = f":block.{position}"
    return _site(context, name, "", 0, nodes, entries, ((entry, exit_),), (entry, exit_), group, (repeats, position))
