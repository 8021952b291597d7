"""Readers of projections: every spelling of a product with a parameter is one ``linear`` or ``conv``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from moefx.graph._kind_base import Op, ParamRef, data, number, param_ref, params_of, reads, shape
from moefx.graph._kind_spelling import Spelling

if TYPE_CHECKING:
    from moefx.graph import Graph


def _linear(node: Node, x: Any, weight: ParamRef | None, bias: ParamRef | None, graph: Graph) -> Op:
    out = shape(node)
    if weight is None or out is None or not isinstance(x, Node):
        return Op("matmul", "linear", data(node, graph))
    params = {"weight": weight} | ({"bias": bias} if bias is not None else {})
    return Op("linear", "linear", (x,), params, {"axis": len(out) - 1, "out_features": out[-1]})


@reads("linear")
def _read_linear(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    if call.module is not None:
        params = params_of(node, graph, ("weight", "bias"))
        return _linear(node, call.arg(0, "input"), params["weight"], params.get("bias"), graph)
    if call.name == "addmm":
        bias, x, weight = (call.arg(i, n) for i, n in enumerate(("input", "mat1", "mat2")))
        found = param_ref(weight, graph)
        scaled = call.kwargs.get("alpha", 1) != 1 or call.kwargs.get("beta", 1) != 1
        turned = None if found is None or scaled else ParamRef(found.fqn, found.rows, not found.transposed)
        return _linear(node, x, turned, param_ref(bias, graph), graph)
    x, weight, bias = (call.arg(i, n) for i, n in enumerate(("input", "weight", "bias")))
    found_bias = param_ref(bias, graph)
    found = param_ref(weight, graph) if bias is None or found_bias is not None else None
    return _linear(node, x, found, found_bias, graph)


@reads("matmul")
def _read_matmul(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    if call.name == "einsum":
        return _read_einsum(node, call, graph)
    if call.name in ("matmul", "mm"):
        left, right = call.arg(0, "input"), call.arg(1, "other", call.kwargs.get("mat2"))
        weight = param_ref(right, graph)
        sizes = shape(right) if isinstance(right, Node) else None
        if weight is not None and sizes is not None and len(sizes) == 2 and param_ref(left, graph) is None:
            return _linear(node, left, ParamRef(weight.fqn, weight.rows, not weight.transposed), None, graph)
        return Op("matmul", "matmul", tuple(n for n in (left, right) if isinstance(n, Node)))
    if call.name == "baddbmm":
        bias = [] if number(call.kwargs.get("beta", 1)) == 0 else [call.args[0]]
        return Op("matmul", "baddbmm", (*call.args[1:3], *bias))
    return Op("matmul", call.name, data(node, graph))


def _read_einsum(node: Node, call: Spelling, graph: Graph) -> Op:
    rest = call.args[1] if len(call.args) == 2 and isinstance(call.args[1], list | tuple) else call.args[1:]
    equation = str(call.args[0]).replace(" ", "")
    operands = tuple(n for n in rest if isinstance(n, Node))
    if len(operands) == 1 and "->" in equation and "..." not in equation:
        before, after = equation.split("->")
        if sorted(before) == sorted(after) and len(set(before)) == len(before):
            return Op("permute", "einsum", operands, attrs={"dims": tuple(before.index(c) for c in after)})
    plain = Op("matmul", "einsum", operands, attrs={"equation": equation})
    if len(operands) != 2 or "->" not in equation or "," not in equation:
        return plain
    terms, result = equation.split("->")
    left, right = terms.split(",")
    weight = param_ref(operands[1], graph)
    if weight is None or len(right) != 2 or left[:-1] != result[:-1] or param_ref(operands[0], graph) is not None:
        return plain
    if right == left[-1] + result[-1]:
        return _linear(node, operands[0], ParamRef(weight.fqn, weight.rows, not weight.transposed), None, graph)
    return _linear(node, operands[0], weight, None, graph) if right == result[-1] + left[-1] else plain


@reads("conv")
def _read_conv(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    x = call.arg(0, "input")
    if call.module is not None:
        params = params_of(node, graph, ("weight", "bias"))
    else:
        found = {"weight": param_ref(call.arg(1, "weight"), graph), "bias": param_ref(call.arg(2, "bias"), graph)}
        params = {k: v for k, v in found.items() if v is not None}
    out, sizes = shape(node), shape(x) if isinstance(x, Node) else None
    if "weight" not in params or out is None or sizes is None:
        return Op("conv", call.name, data(node, graph), params, {"pointwise": False, "depthwise": False, "axis": 1})
    kernel = tuple(graph.parameter(params["weight"].fqn).shape)
    axis = len(out) - (len(kernel) - 1)
    groups = sizes[axis] // kernel[1]
    unit = all(size == 1 for size in kernel[2:]) and sizes[axis + 1 :] == out[axis + 1 :]
    kept = sizes[axis + 1 :] == out[axis + 1 :]
    attrs = {
        "axis": axis,
        "out_features": out[axis],
        "pointwise": unit and groups == 1,
        "depthwise": groups == sizes[axis] == out[axis] and kept,
        "kernel": kernel[2:],
        "groups": groups,
    }
    return Op("conv", call.name, (x,), params, attrs)
