"""Readers of pointwise operations, attention cores and everything without structure of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.fx import Node

from moefx.graph import _kind_tables as tables
from moefx.graph._kind_base import Op, ParamRef, data, number, op, param_ref, params_of, reads, shape
from moefx.graph._kind_spelling import Spelling

if TYPE_CHECKING:
    from moefx.graph import Graph


@reads("")
def _read_plain(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    options = {k: v for k, v in call.kwargs.items() if not isinstance(v, Node)}
    options["in_place"] = call.in_place
    if kind == "softmax":
        options["dim"] = call.arg(1, "dim", -1)
    return Op(kind, call.name, data(node, graph), params_of(node, graph, ("weight", "bias")), options)


@reads("size")
def _read_size(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    return Op(kind, call.name)


@reads("reshape", "expand")
def _read_first(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    first = call.arg(0, "input", call.kwargs.get("self"))
    data = (first,) if isinstance(first, Node) else ()
    return Op(kind, call.name, data, attrs={"in_place": call.in_place})


@reads("identity")
def _read_identity(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    found = _read_first(node, call, kind, graph)
    if call.name == "_assert_tensor_metadata":
        return Op("size", call.name)
    if call.name in ("int", "long", "bool"):
        return Op("pointwise", call.name, found.inputs, attrs={"operands": found.inputs, "options": {}})
    return found


@reads("dropout")
def _read_dropout(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    rate = number(call.arg(1, "p", 0.5))
    training = call.arg(2, "training", call.kwargs.get("train", True))
    active = bool(rate) and bool(training)
    first = call.arg(0, "input")
    return Op("dropout" if active else "identity", "dropout", (first,), attrs={"p": rate if active else 0.0})


@reads("act", "add", "sub", "mul", "div", "pointwise")
def _read_pointwise(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    """Keep the operands in order, scalars and parameters included, because ``sub`` and ``pow`` are not symmetric."""
    operands = [number(a) for a in call.args]
    keywords = {"input", "self", "other", "exponent", "min", "max"}
    options = {k: number(v) for k, v in call.kwargs.items() if k not in keywords and k != "out"}
    if call.name.startswith("clamp"):
        low, high = call.arg(1, "min"), call.arg(2, "max")
        operands = [operands[0], *((low, high) if call.name == "clamp" else (call.arg(1, call.name[6:]),))]
    else:
        operands += [number(call.kwargs[k]) for k in ("input", "self", "other", "exponent") if k in call.kwargs]
    name, operands = _canonical(call.name, operands, options)
    fused = _biased_linear(node, operands, options, graph) if kind == "add" else None
    if fused is not None:
        return fused
    options = {k: v for k, v in options.items() if not _is_default(name, k, v)}
    operands = operands[:1] if call.name in ("relu", "silu", "mish", "relu6", "selu", "hardswish") else operands
    _name_options(name, operands, options)
    return Op(
        kind,
        name,
        data(node, graph),
        attrs={"operands": tuple(operands), "options": options, "in_place": call.in_place},
    )


def _canonical(name: str, operands: list[Any], options: dict[str, Any]) -> tuple[str, list[Any]]:
    """Write reversed subtractions forwards, and the number last in sums and products, as ``aten`` does."""
    if name == "rsub" and options.get("alpha", 1) == 1 and len(operands) == 2:
        return "sub", operands[::-1]
    if name in ("add", "mul") and len(operands) == 2 and not isinstance(operands[0], Node):
        return name, operands[::-1]
    return name, operands


def _is_default(name: str, option: str, chosen: Any) -> bool:
    return option == "inplace" or chosen is None or tables.DEFAULTS.get(name, {}).get(option, tables) == chosen


def _name_options(name: str, operands: list[Any], options: dict[str, Any]) -> None:
    """Turn trailing positional options into named ones, so that modules, functions and ATen calls compare equal."""
    defaults = tables.DEFAULTS.get(name, {})
    if name in tables.POSITIONAL:
        for option, chosen in zip(defaults, operands[1:], strict=False):
            if chosen != defaults[option]:
                options[option] = chosen
        del operands[1:]


def _biased_linear(node: Node, operands: list[Any], options: dict[str, Any], graph: Graph) -> Op | None:
    """Read ``x @ w + b`` as one linear."""
    if len(operands) != 2 or options.get("alpha", 1) != 1:
        return None
    for product, other in (operands, operands[::-1]):
        bias = param_ref(other, graph)
        if bias is None or not isinstance(product, Node) or product.op == "call_module":
            continue
        what, sizes = op(product, graph), shape(other)
        if what.kind != "linear" or "bias" in what.params or sizes is None or len(product.users) != 1:
            continue
        if sizes == (what.attrs["out_features"],):
            return Op("linear", "linear", what.inputs, {**what.params, "bias": bias}, what.attrs)
    return None


@reads("cat", "stack")
def _read_cat(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    tensors = call.arg(0, "tensors", call.kwargs.get("sequences"))
    if call.name == "pad_sequence":
        batch_first = number(call.arg(1, "batch_first", False))
        return Op(kind, call.name, tuple(tensors), attrs={"dim": 0 if batch_first else 1})
    out = shape(node)
    dim = {"hstack": 1, "vstack": 0}.get(call.name, number(call.arg(1, "dim", 0)))
    rank = len(out) if out is not None else 1
    return Op(kind, call.name, tuple(tensors), attrs={"dim": dim % rank})


@reads("sdpa")
def _read_sdpa(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    query, key, values = (call.arg(i, n) for i, n in enumerate(("query", "key", "value")))
    mask = call.arg(3, "attn_mask")
    attrs = {
        "mask": mask if isinstance(mask, Node) else None,
        "is_causal": bool(call.arg(5, "is_causal", False)),
        "scale": call.kwargs.get("scale"),
        "enable_gqa": bool(call.kwargs.get("enable_gqa", False)),
    }
    data = (query, key, values, *((mask,) if isinstance(mask, Node) and param_ref(mask, graph) is None else ()))
    return Op(kind, call.name, data, attrs=attrs)


@reads("mha")
def _read_mha(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    if call.module is None:
        return Op(kind, call.name, data(node, graph))
    module: Any = call.module
    names = ("in_proj_weight", "in_proj_bias", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    params = params_of(node, graph, names)
    params["out_weight"] = ParamRef(f"{node.target}.out_proj.weight")
    if module.out_proj.bias is not None:
        params["out_bias"] = ParamRef(f"{node.target}.out_proj.bias")
    operands = tuple(call.arg(i, n) for i, n in enumerate(("query", "key", "value")))
    mask = call.kwargs.get("attn_mask")
    attrs = {"heads": module.num_heads, "width": module.embed_dim, "mask": mask, "batch_first": module.batch_first}
    return Op(kind, "mha", operands, params, attrs)


@reads("factory")
def _read_factory(node: Node, call: Spelling, kind: str, graph: Graph) -> Op:
    return Op(kind, call.name)
