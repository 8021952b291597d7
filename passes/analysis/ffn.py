"""Feed-forward networks: projection → pointwise function → projection, added to an ancestor of the input.

Found by data flow alone, so it does not matter whether the network is a module, inline code, one branch of a fused
projection, or written with ATen operators.

Operands of a site, with ``D`` the model width and ``F`` the hidden width:

- ``x``: the input node; ``residual``: the add, ``stream``: the value added to.
- ``w_in [F, D]``, ``w_out [D, F]``, optional ``b_in [F]``, ``b_out [D]``: :class:`Weight`.
- gated: ``w_gate [F, D]``, ``b_gate``; the hidden layer is ``act(x @ w_gate.T) * (x @ w_in.T)``.
- ``act``: :class:`Activation`. ``dropout``: rates of active dropouts inside.
- conv flavour: also ``act_in`` and the depthwise ``w_depth [F, 1, k, k]``, ``b_depth`` (and ``w_depth_gate``,
  ``b_depth_gate``) between the pointwise convolutions; channels are dimension ``shapes["axis"]``.
- cut out of a shared output projection: ``rest``, pairs of an input node and its columns of that projection, so that
  ``output = ffn(x) + sum(part @ columns.T) + b_out``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.fx import Node

from moefx.graph.kinds import Op, ParamRef, shape
from moefx.passes.analysis.context import Context
from moefx.passes.analysis.hidden import Blocked, Hidden
from moefx.passes.analysis.lanes import Lane, Rows
from moefx.passes.analysis.pointwise import (
    Activation,
    Arg,
    Call,
    Const,
    Expr,
    arguments,
    is_nonlinear,
    substitute,
)
from moefx.passes.analysis.site import Match, Miss, Site, Weight


def find_ffns(context: Context) -> list[Match | Miss]:
    """Return a match or a near miss for every place where two projections have a nonlinear function between them."""
    found: list[Match | Miss] = []
    blamed: set[Node] = set()
    for node in context.flow.nodes:
        what = context.flow.ops[node]
        if not is_projection(what):
            continue
        for candidate in _candidates(context, node):
            if isinstance(candidate, Candidate):
                found.append(_check(context, candidate))
            elif candidate.near and candidate.node not in blamed:
                blamed.add(candidate.node)
                found.append(Miss.at(candidate.node, candidate.reason, progress=candidate.calls + 1))
    return found


def is_projection(what: Op) -> bool:
    """Whether an operation is a linear map of features alone."""
    return what.kind == "linear" or (what.kind == "conv" and bool(what.attrs["pointwise"]))


@dataclass(frozen=True, eq=False)
class Candidate:
    """Two projections with a nonlinear pointwise function between them, before the semantic checks."""

    down: Node
    hidden: Hidden
    cols: tuple[int, int] | None
    rest: tuple[tuple[Node, tuple[int, int]], ...] = ()
    inner: Hidden | None = None
    depth: Node | None = None
    x: Node = field(init=False)

    def bases(self) -> list[Node]:
        """Return the input projections."""
        lanes = (self.inner or self.hidden).lanes
        return list(dict.fromkeys(lane.base for lane in lanes))


def _candidates(context: Context, down: Node) -> Iterator[Candidate | Blocked]:
    """Yield what the input of ``down`` is made of, part by part if it is a concatenation of features."""
    what = context.flow.ops[down]
    source = what.inputs[0]
    axis = what.attrs["axis"]
    parts = _feature_parts(context, source, axis)
    for i, (part, cols) in enumerate(parts):
        hidden = context.hiddens.of(part)
        if isinstance(hidden, Blocked):
            yield hidden
            continue
        found = _structure(context, down, part, hidden, cols if len(parts) > 1 else None)
        if isinstance(found, Candidate) and len(parts) > 1:
            rest = tuple(other for j, other in enumerate(parts) if j != i)
            yield Candidate(down, found.hidden, found.cols, rest, found.inner, found.depth)
        elif found is not None:
            yield found


def _feature_parts(context: Context, source: Node, axis: int) -> list[tuple[Node, tuple[int, int]]]:
    """Split a concatenation along the features into its parts and their columns."""
    width = (shape(source) or (0,))[axis]
    node = context.flow.uncast(source)
    what = context.flow.ops[node]
    if what.kind != "cat" or what.attrs["dim"] != axis:
        return [(source, (0, width))]
    parts, start = [], 0
    for part in what.inputs:
        size = (shape(part) or (0,))[axis]
        parts.append((part, (start, start + size)))
        start += size
    return parts


def _structure(
    context: Context, down: Node, part: Node, hidden: Hidden, cols: tuple[int, int] | None
) -> Candidate | Blocked | None:
    """Check that the hidden value is a nonlinear function of projections, feature by feature."""
    axis = context.flow.ops[down].attrs["axis"]
    width = (shape(part) or (0,))[axis]
    lanes = tuple(_tight(lane, axis, width) for lane in hidden.lanes)
    if any(lane is None for lane in lanes):
        near = is_nonlinear(hidden.expr)
        return Blocked("its hidden features are not the features of the second projection", down, near, hidden.calls)
    hidden = Hidden(hidden.expr, tuple(lane for lane in lanes if lane is not None), hidden.calls)
    bases = {lane.base for lane in hidden.lanes}
    ops = [context.flow.ops[base] for base in bases]
    if all(is_projection(o) for o in ops):
        return Candidate(down, hidden, cols) if is_nonlinear(hidden.expr) else None
    if len(bases) == 1 and ops[0].kind == "conv" and ops[0].attrs["depthwise"]:
        return _depthwise(context, down, hidden, cols, bases.pop())
    return None


def _tight(lane: Lane, axis: int, width: int) -> Lane | None:
    """Drop feature dimensions of size one; the rest must be exactly the feature axis of the next projection."""
    if lane.rows.size != width or axis not in lane.dims:
        return None
    return Lane(lane.base, lane.rows.reshape(-1), (axis,)) if lane.rows.shape[lane.dims.index(axis)] == width else None


def _depthwise(
    context: Context, down: Node, hidden: Hidden, cols: tuple[int, int] | None, depth: Node
) -> Candidate | Blocked | None:
    what = context.flow.ops[depth]
    inner = context.hiddens.of(what.inputs[0])
    if isinstance(inner, Blocked):
        return inner
    lanes = [_tight(lane, what.attrs["axis"], what.attrs["out_features"]) for lane in inner.lanes]
    if len(lanes) != 1 or lanes[0] is None or not is_projection(context.flow.ops[lanes[0].base]):
        return None
    if not (is_nonlinear(hidden.expr) or is_nonlinear(inner.expr)):
        return None
    return Candidate(down, hidden, cols, (), Hidden(inner.expr, (lanes[0],), inner.calls), depth)


# -- semantic checks ---------------------------------------------------------------------------------------------------


def _check(context: Context, found: Candidate) -> Match | Miss:
    """Apply the semantic conditions in order; the first that fails is the miss."""
    flow, down = context.flow, found.down
    x = flow.ops[found.bases()[0]].inputs[0]
    region = _region(context, found, x)
    progress = len([n for n in region if flow.ops[n].kind not in ("param", "size")])
    stale = next((n for n in region if n in flow.stale), None)
    if stale is not None:
        return Miss.at(stale, "a value between the projections is overwritten in place", progress=progress)
    if len(shape(down) or ()) <= 2 and "tokens" not in context.classes.of(x):
        return Miss.at(down, "acts on one vector per sample (rank 2), not on tokens", progress=progress)
    residual = context.streams.residual(down, x)
    if residual is None:
        return Miss.at(down, "its output is not added to an ancestor of its input (no residual)", progress=progress)
    operands = _operands(context, found, x)
    if operands is None:
        return Miss.at(down, "its gate and value cannot be told apart", progress=progress)
    operands |= {"residual": residual.add, "stream": residual.stream}
    return Match(_site(context, found, x, region, operands))


def _region(context: Context, found: Candidate, x: Node) -> tuple[Node, ...]:
    """Return every node between ``x`` and the output, parameters included, sizes excluded."""
    flow = context.flow
    stop = {x, *(part for part, _ in found.rest)}
    seen, stack = {found.down}, [found.down]
    bases = set(found.bases())
    while stack:
        node = stack.pop()
        for source in node.all_input_nodes:
            inner = node not in bases or flow.ops[source].kind == "param"
            if source in seen or source in stop or flow.ops[source].kind == "size" or not inner:
                continue
            seen.add(source)
            stack.append(source)
    if found.rest:
        seen = {n for n in seen if flow.ops[n].kind == "param" or any(flow.depends(n, b) for b in bases)}
    return tuple(sorted(seen, key=flow.index.__getitem__))


def _site(context: Context, found: Candidate, x: Node, region: tuple[Node, ...], operands: dict[str, Any]) -> Site:
    flow, down = context.flow, found.down
    place = context.modules.place(region, (x,), down)
    gated = "w_gate" in operands
    conv = flow.ops[down].kind == "conv" or found.depth is not None
    residual = operands["residual"]
    sizes, width = shape(x) or (), len(found.hidden.lanes[0].rows)
    rates = tuple(flow.ops[n].attrs["p"] for n in region if flow.ops[n].kind == "dropout")
    first = _gate_first(operands)
    why = (
        f"{'gated ' if gated else ''}{operands['act']} between {operands['w_in'].fqn} and {operands['w_out'].fqn}, "
        f"added to the stream at {residual.name}"
    )
    return Site(
        kind="ffn",
        name=context.name(place, "ffn"),
        path=place.path,
        call_index=place.call_index,
        nodes=region,
        inputs=(x, *(part for part, _ in found.rest)),
        output=down,
        operands={"x": x, **operands, **({"dropout": rates} if rates else {})},
        shapes={
            "x": sizes,
            "D": sizes[flow.ops[found.bases()[0]].attrs["axis"]],
            "F": width,
            "D_out": (shape(down) or (0,))[flow.ops[down].attrs["axis"]],
            "axis": flow.ops[down].attrs["axis"],
        },
        role=context.role(down, residual),
        why=why,
        region_is_module=place.is_module and not found.rest,
        flavour="conv" if conv else "gated" if gated else "plain",
        gate_first=first,
        dead=not flow.is_live(down),
    )


def _gate_first(operands: dict[str, Any]) -> bool:
    """Whether the gate comes before the value inside one fused projection."""
    up, gate = operands["w_in"], operands.get("w_gate")
    if gate is None or gate.fqn != up.fqn:
        return False
    return _first_row(gate) < _first_row(up)


def _first_row(weight: Weight) -> int:
    return weight.rows.start if isinstance(weight.rows, slice) else weight.rows[0] if weight.rows else 0


# -- operands ----------------------------------------------------------------------------------------------------------


def _operands(context: Context, found: Candidate, x: Node) -> dict[str, Any] | None:
    """Name the weights and the activation."""
    split = split_gate(found.hidden.expr, len(found.hidden.lanes))
    if split is None:
        return None
    act, up, gate = split
    operands: dict[str, Any] = {"act": act}
    lanes = {"in": found.hidden.lanes[up]} | ({"gate": found.hidden.lanes[gate]} if gate is not None else {})
    for name, lane in lanes.items():
        if found.depth is not None and found.inner is not None:
            suffix = "" if name == "in" else "_gate"
            operands |= _weights(context, found.depth, lane.rows, f"w_depth{suffix}", f"b_depth{suffix}")
            first = found.inner.lanes[0]
            operands |= _weights(context, first.base, first.rows[lane.rows], f"w_{name}", f"b_{name}")
            operands["act_in"] = Activation(found.inner.expr)
        else:
            operands |= _weights(context, lane.base, lane.rows, f"w_{name}", f"b_{name}")
    what = context.flow.ops[found.down]
    operands["w_out"] = columns(what.params["weight"], found.cols)
    if "bias" in what.params:
        operands["b_out"] = Weight(what.params["bias"].fqn, _range(what.params["bias"].rows))
    if found.rest:
        operands["rest"] = tuple((part, columns(what.params["weight"], cols)) for part, cols in found.rest)
    return operands


def split_gate(expr: Expr, count: int) -> tuple[Activation, int, int | None] | None:
    """Return the activation, and which hidden tensor is the value and which the gate.

    The gate is the one that goes through the nonlinearity, wherever it lies in a fused projection.
    """
    if count == 1:
        return Activation(expr), 0, None
    if count != 2:
        return None
    factors = list(_factors(expr))
    plain = [f for f in factors if isinstance(f, Arg)]
    for up in (f.i for f in reversed(plain)):
        rest = list(factors)
        rest.remove(Arg(up))
        if all(arguments(f) <= {1 - up} for f in rest) and any(arguments(f) for f in rest):
            product = rest[0]
            for factor in rest[1:]:
                product = Call("mul", (product, factor))
            return Activation(substitute(product, {1 - up: Arg(0)})), up, 1 - up
    gate = 0 if _curved(expr, 0) >= _curved(expr, 1) else 1
    return Activation(substitute(expr, {gate: Arg(0), 1 - gate: Arg(1)}), 2), 1 - gate, gate


def _factors(expr: Expr) -> Iterator[Expr]:
    if (
        isinstance(expr, Call)
        and expr.name == "mul"
        and len(expr.args) == 2
        and not expr.options
        and len(arguments(expr)) > 1
    ):
        for arg in expr.args:
            yield from _factors(arg)
    else:
        yield expr


def _curved(expr: Expr, i: int) -> int:
    """Count the nonlinear operations on one hidden tensor alone."""
    if isinstance(expr, Arg | Const):
        return 0
    alone = arguments(expr) == {i}
    return int(alone and is_nonlinear(expr)) + sum(_curved(a, i) for a in expr.args)


def _weights(context: Context, base: Node, rows: Rows, weight: str, bias: str) -> dict[str, Weight]:
    what = context.flow.ops[base]
    found = {weight: row_weight(what.params["weight"], rows, what.attrs["out_features"])}
    if "bias" in what.params:
        found[bias] = row_weight(what.params["bias"], rows, what.attrs["out_features"])
    return found


def row_weight(param: ParamRef, rows: Rows, size: int) -> Weight:
    """Return the weight of some output features, as a slice where they are contiguous."""
    start = param.rows[0] if param.rows is not None and not param.transposed else 0
    whole = param.rows is None and len(rows) == size and np.array_equal(rows, np.arange(size))
    return Weight(param.fqn, None if whole else _compact(rows + start), None, param.transposed)


def _compact(rows: Rows) -> slice | tuple[int, ...]:
    first = int(rows[0])
    if np.array_equal(rows, np.arange(first, first + len(rows))):
        return slice(first, first + len(rows))
    return tuple(int(r) for r in rows)


def _range(rows: tuple[int, int] | None) -> slice | None:
    return None if rows is None else slice(*rows)


def columns(param: ParamRef, cols: tuple[int, int] | None) -> Weight:
    """Return the weight of some input features."""
    if param.transposed and param.rows is not None:
        start = param.rows[0]
        low, high = cols or (0, param.rows[1] - start)
        return Weight(param.fqn, None, slice(start + low, start + high), True)
    return Weight(param.fqn, _range(param.rows), None if cols is None else slice(*cols), param.transposed)
