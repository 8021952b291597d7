"""Attention: a backward slice from every attention core, and a forward one to its output projections.

Operands of a site:

- ``q``, ``k``, ``v``, ``core``: the nodes of the core; ``core_kind``: see :mod:`moefx.passes.analysis.cores`.
- ``x``, ``context``: what the queries and the keys of the main stream are projected from.
- ``w_q [H*d, D]``, ``w_k``, ``w_v``, ``w_out [D, H*d]`` and ``b_*``: the weights of the main stream, :class:`Weight`.
- ``pre_out [B, T, H*d]``: the node at the input of the output projection, where gates per head belong.
- ``streams``: one :class:`Stream` per projected token stream (two in joint attention).
- ``layout``: ``separate``, ``fused_qkv``, ``fused_kv``; ``qk_norm``, ``rope``, ``causal``: bool; ``mask``: a node or
  ``None``.

``shapes`` holds ``heads``, ``kv_heads`` and ``head_dim``.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moefx.graph.kinds import MOVES, shape
from moefx.passes.analysis.context import Context
from moefx.passes.analysis.cores import Core, find_cores
from moefx.passes.analysis.ffn import columns, is_projection
from moefx.passes.analysis.operands import Operand, Part, read_operand
from moefx.passes.analysis.site import Match, Miss, Site, Weight
from moefx.passes.analysis.streams import is_whole_operand

_ONWARD = MOVES | {"dropout", "mul", "div", "norm", "pad", "pointwise", "item"}


@dataclass(frozen=True, eq=False)
class Output:
    """One output projection: ``node = pre @ weight.T + bias`` (plus other columns if the projection is shared)."""

    node: Node
    pre: Node
    weight: Weight
    bias: Weight | None
    offset: int


@dataclass(frozen=True, eq=False)
class Stream:
    """One token stream through an attention: its projections, and its output projection where it has one."""

    x: Node
    q: Part | None
    k: Part | None
    v: Part | None
    out: Output | None


def find_attentions(context: Context) -> list[Match | Miss]:
    """Return a match for every attention core whose operands are projections, and a miss for the others."""
    return [_match(context, core) for core in find_cores(context)]


def _match(context: Context, core: Core) -> Match | Miss:
    if core.kind == "mha":
        return Match(_opaque_site(context, core))
    query, key, value = (read_operand(context, n) for n in (core.query, core.key, core.value))
    if not (key.parts and value.parts):
        return Miss.at(core.output, "its keys and values are not projections", progress=1, kind="attention")
    outputs = find_outputs(context, core.output, query.sources)
    streams = _streams(query, key, value, outputs)
    return Match(_site(context, core, (query, key, value), streams, outputs))


# -- output projections ------------------------------------------------------------------------------------------------


def find_outputs(context: Context, core: Node, sources: tuple[Node, ...]) -> list[Output]:
    """Follow the result of a core to the projections that read it, token slices and shared projections included."""
    found: list[Output] = []
    seen, queue = {core}, deque([(core, 0)])
    while queue:
        node, offset = queue.popleft()
        for user in context.flow.readers[node]:
            what = context.flow.ops[user]
            if is_projection(what) and what.inputs[0] is node:
                bias = what.params.get("bias")
                found.append(_output(user, node, columns(what.params["weight"], None), bias, offset))
            elif what.kind == "cat":
                found.extend(_shared(context, user, node, offset))
            elif user not in seen and _goes_on(context, user, node, sources):
                seen.add(user)
                queue.append((user, offset + _shift(context, user)))
    return sorted(found, key=lambda o: (o.offset, context.flow.index[o.node]))


def _output(node: Node, pre: Node, weight: Weight, bias: Any, offset: int) -> Output:
    return Output(
        node, pre, weight, Weight(bias.fqn, slice(*bias.rows) if bias.rows else None) if bias else None, offset
    )


def _goes_on(context: Context, user: Node, node: Node, sources: tuple[Node, ...]) -> bool:
    what = context.flow.ops[user]
    if what.kind in _ONWARD:
        return what.kind in MOVES or node in what.inputs[:1] or is_whole_operand(node, user)
    if what.kind != "add" or not is_whole_operand(node, user):
        return False
    others = [n for n in what.inputs if n is not node]
    return not any(context.flow.depends(source, other) for other in others for source in sources)


def _shift(context: Context, user: Node) -> int:
    """Return by how many tokens a slice moves the start."""
    what = context.flow.ops[user]
    sizes = shape(what.inputs[0]) if what.inputs else None
    if what.kind != "slice" or sizes is None or None in what.attrs["index"]:
        return 0
    items = what.attrs["index"][:-1]
    starts = [item.indices(size)[0] for item, size in zip(items, sizes, strict=False) if isinstance(item, slice)]
    return sum(starts)


def _shared(context: Context, cat: Node, node: Node, offset: int) -> list[Output]:
    """Read an output projection shared with other features, as in parallel attention and feed-forward blocks."""
    what = context.flow.ops[cat]
    if what.attrs["dim"] != len(shape(cat) or ()) - 1:
        return []
    start = 0
    for part in what.inputs:
        if part is node:
            break
        start += (shape(part) or (0,))[-1]
    cols = (start, start + (shape(node) or (0,))[-1])
    found = []
    for user in _readers_of_copies(context, cat):
        projection = context.flow.ops[user]
        if projection.kind == "linear":
            weight = columns(projection.params["weight"], cols)
            found.append(_output(user, node, weight, projection.params.get("bias"), offset))
    return found


def _readers_of_copies(context: Context, node: Node) -> list[Node]:
    found: list[Node] = []
    for user in context.flow.readers[node]:
        found.extend(
            _readers_of_copies(context, user) if context.flow.ops[user].kind in ("identity", "dropout") else [user]
        )
    return found


# -- streams -----------------------------------------------------------------------------------------------------------


def _streams(query: Operand, key: Operand, value: Operand, outputs: list[Output]) -> tuple[Stream, ...]:
    """Pair the parts of the three operands and the outputs by where their tokens start."""
    offsets = list(dict.fromkeys(p.offset for p in query.parts)) or [0]
    made = []
    for i, offset in enumerate(offsets):
        q = next((p for p in query.parts if p.offset == offset), None)
        k, v = (_partner(operand, q, i, len(offsets)) for operand in (key, value))
        out = next(
            (o for o in outputs if o.offset == offset), outputs[0] if len(offsets) == len(outputs) == 1 else None
        )
        made.append(Stream(q.x if q else k.x, q, k, v, out))
    return tuple(made)


def _partner(operand: Operand, q: Part | None, i: int, count: int) -> Part:
    """Return the keys or values that belong to the queries ``q``: of the same tokens if there are any."""
    if len(operand.parts) == count:
        return operand.parts[i]
    return next((p for p in operand.parts if q is not None and p.x is q.x), operand.parts[0])


def _main(context: Context, streams: tuple[Stream, ...]) -> Stream:
    """Return the stream whose output reaches the model's output token by token, else the last one with an output."""
    with_output = [s for s in streams if s.out is not None]
    main = [s for s in with_output if s.out is not None and s.out.node in context.streams.aligned]
    return (main or with_output or list(streams))[-1]


def _flavour(core: Core, query: Operand, key: Operand) -> str:
    if core.kind == "linear":
        return "linear"
    if not set(query.sources) & set(key.sources):
        return "cross"
    return "joint" if len(query.sources) > 1 or len(key.sources) > 1 else "self"


def _layout(stream: Stream) -> str:
    fqns = [part.weight.fqn if part else "" for part in (stream.q, stream.k, stream.v)]
    if len(set(fqns)) == 1:
        return "fused_qkv"
    return "fused_kv" if fqns[1] == fqns[2] else "separate"


# -- sites -------------------------------------------------------------------------------------------------------------


def _site(
    context: Context,
    core: Core,
    operands: tuple[Operand, Operand, Operand],
    streams: tuple[Stream, ...],
    outputs: list[Output],
) -> Site:
    query, key, _ = operands
    main = _main(context, streams)
    ends = [o.node for o in outputs] or [core.output]
    output = main.out.node if main.out else core.output
    region = _region(context, operands, ends)
    entries = _entries(context, region)
    place = context.modules.place(region, entries, output)
    flavour = _flavour(core, query, key)
    residual = context.streams.residual(output, main.x)
    named = _operands(core, query, key, streams, main)
    named |= {"residual": residual.add if residual else None, "stream": residual.stream if residual else None}
    sizes = _head_sizes(core, query, key)
    return Site(
        kind="attention",
        name=context.name(place, "attn"),
        path=place.path,
        call_index=place.call_index,
        nodes=region,
        inputs=entries,
        output=output,
        operands=named,
        shapes={"x": shape(main.x), **sizes},
        role=context.role(output, residual.add if residual else output),
        why=f"{core.kind} core at {core.output.name}, {flavour}, {sizes['heads']} heads of {sizes['head_dim']}",
        region_is_module=place.is_module,
        flavour=flavour,
        dead=not context.flow.is_live(core.output),
    )


def _operands(core: Core, query: Operand, key: Operand, streams: tuple[Stream, ...], main: Stream) -> dict[str, Any]:
    return {
        "x": main.x,
        "context": main.k.x if main.k else main.x,
        **_named(main),
        "q": core.query,
        "k": core.key,
        "v": core.value,
        "core": core.output,
        "core_kind": core.kind,
        "pre_out": main.out.pre if main.out else None,
        "streams": streams,
        "layout": _layout(main),
        "qk_norm": query.normed and key.normed,
        "rope": query.rotary and key.rotary,
        "mask": core.mask,
        "causal": core.causal,
    }


def _named(main: Stream) -> dict[str, Weight]:
    found: dict[str, Weight] = {}
    for letter, part in (("q", main.q), ("k", main.k), ("v", main.v)):
        if part is not None:
            found |= {f"w_{letter}": part.weight} | ({f"b_{letter}": part.bias} if part.bias else {})
    if main.out is not None:
        found |= {"w_out": main.out.weight} | ({"b_out": main.out.bias} if main.out.bias else {})
    return found


def _head_sizes(core: Core, query: Operand, key: Operand) -> dict[str, int]:
    """Count heads from the width of the projections and of the core."""
    own, kept = (_width(operand) for operand in (query if query.parts else key, key))
    return {"heads": max(own // core.head_dim, 1), "kv_heads": max(kept // core.head_dim, 1), "head_dim": core.head_dim}


def _width(operand: Operand) -> int:
    """Return the number of features of one token."""
    return sum(p.width for p in operand.parts if p.offset == operand.parts[0].offset)


def _region(context: Context, operands: tuple[Operand, ...], ends: list[Node]) -> tuple[Node, ...]:
    """Return the projections, and everything that depends on them up to the output projections."""
    flow = context.flow
    bases = {part.node for operand in operands for part in operand.parts}
    mask = sum(1 << flow.index[b] for b in bases)
    seen, stack = set(ends), list(ends)
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            inside = flow.ops[source].kind == "param" or bool(flow.ancestors[flow.index[source]] & mask)
            if (
                source in seen
                or flow.ops[source].kind == "size"
                or not inside
                or (node in bases and flow.ops[source].kind != "param")
            ):
                continue
            seen.add(source)
            stack.append(source)
    return tuple(sorted(seen, key=flow.index.__getitem__))


def _entries(context: Context, region: tuple[Node, ...]) -> tuple[Node, ...]:
    inside = set(region)
    outer = (s for n in region for s in context.flow.ops[n].inputs if s not in inside)
    return tuple(dict.fromkeys(outer))


def _opaque_site(context: Context, core: Core) -> Site:
    """Name the weights of an ``nn.MultiheadAttention``; its core cannot be reached, so there is no ``pre_out``."""
    node = core.output if context.flow.ops[core.output].kind == "mha" else core.output.all_input_nodes[0]
    heads = context.flow.ops[node].attrs["heads"]
    residual = context.streams.residual(core.output, core.query)
    named = _opaque_operands(context, core, node)
    named |= {"residual": residual.add if residual else None, "stream": residual.stream if residual else None}
    same = context.flow.uncast(core.query) is context.flow.uncast(core.key)
    index = int(node.meta.get("moefx_call_index", 0))
    return Site(
        kind="attention",
        name=str(node.target) if index == 0 else f"{node.target}#{index}",
        path=str(node.target),
        call_index=index,
        nodes=tuple(dict.fromkeys((node, core.output))),
        inputs=tuple(dict.fromkeys((core.query, core.key, core.value))),
        output=core.output,
        operands=named,
        shapes={"x": shape(core.query), "heads": heads, "kv_heads": heads, "head_dim": core.head_dim},
        role=context.role(core.output, residual.add if residual else core.output),
        why=f"nn.MultiheadAttention with {heads} heads of {core.head_dim}",
        region_is_module=True,
        flavour="self" if same else "cross",
        dead=not context.flow.is_live(core.output),
    )


def _opaque_operands(context: Context, core: Core, node: Node) -> dict[str, Any]:
    params, width = context.flow.ops[node].params, context.flow.ops[node].attrs["width"]
    named: dict[str, Any] = {"x": core.query, "context": core.key, "q": core.query, "k": core.key, "v": core.value}
    named |= {"core": core.output, "core_kind": "mha", "pre_out": None, "streams": (), "mask": core.mask}
    named |= {"qk_norm": False, "rope": False, "causal": False}
    fused = params.get("in_proj_weight")
    named["layout"] = "fused_qkv" if fused else "separate"
    for i, letter in enumerate("qkv"):
        rows = slice(i * width, (i + 1) * width)
        named[f"w_{letter}"] = Weight(fused.fqn, rows) if fused else Weight(params[f"{letter}_proj_weight"].fqn)
        if "in_proj_bias" in params:
            named[f"b_{letter}"] = Weight(params["in_proj_bias"].fqn, rows)
    named["w_out"] = Weight(params["out_weight"].fqn)
    return named | ({"b_out": Weight(params["out_bias"].fqn)} if "out_bias" in params else {})
