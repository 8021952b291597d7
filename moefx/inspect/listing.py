"""A graph as a Python listing: source line, call, type, rule. Made to be read and diffed, never to be executed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.fx import Node

from moefx.graph import Graph
from moefx.graph.origin import Origin, origin_of, source_text
from moefx.inspect.text import WIDTH, clean, fit, literal, type_of, wrap

_INFIX: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.eq: "==", operator.ne: "!=",
    operator.lt: "<", operator.le: "<=", operator.gt: ">", operator.ge: ">=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
_PREFIX: dict[Any, str] = {operator.neg: "-", operator.invert: "~"}
_INDENT = "    "


def listing(graph: Graph) -> str:
    """Return ``graph`` as Python, grouped by module invocation."""
    nodes = [n for n in graph.fx.nodes if n.op not in ("placeholder", "output")]
    parameters = [n for n in graph.fx.nodes if n.op == "placeholder"]
    guards = {guard.node: guard for guard in graph.guards}
    lines = [f"# {clean(type(graph.root).__name__)}: {len(nodes)} operations, {len(guards)} guards; a listing to read"]
    lines += [fit(f"# note: {clean(note)}") for note in graph.notes]
    lines.append("def forward(")
    lines.append(f"{_INDENT}self,")
    lines += [f"{_INDENT}{clean(n.name)},  # {type_of(n.meta.get('val'))}" for n in parameters]
    lines.append("):")
    lines += _body(nodes, {node: guard.expected for node, guard in guards.items()})
    returned = [n for n in graph.fx.nodes if n.op == "output"]
    value = returned[-1].args[0] if returned else None
    lines += wrap(f"{_INDENT}return {argument(value)}", _INDENT * 2, cut=False)
    return "\n".join(lines) + "\n"


def _body(nodes: list[Node], guards: dict[Node, Any]) -> Iterator[str]:
    place, source = "", ""
    for node in nodes:
        origin = origin_of(node)
        name = origin.path if origin.call_index == 0 else f"{origin.path}#{origin.call_index}"
        if name != place:
            place, source = name, ""
            title = fit(f"{_INDENT}# {clean(place) or 'the model itself'} ", WIDTH - 4)
            yield ""
            yield f"{title} {'-' * (WIDTH - 1 - len(title))}"
        if origin.source != source:
            source = origin.source
            yield fit(f"{_INDENT}# {_source(origin)}")
        yield from statement(node)
        if node in guards:
            yield from _code(f"assert {clean(node.name)} == {argument(guards[node])}", "guard")


def _source(origin: Origin) -> str:
    text = clean(source_text(origin.source))
    where = clean(origin.source) or "no source line"
    return f"{where}: {text}" if text else where


def statement(node: Node) -> list[str]:
    """Return one node as ``name = call  # f32[2, 64]``, with the rules that made it, on one or more lines."""
    origin = origin_of(node)
    notes = [type_of(node.meta["val"]) if "val" in node.meta else "", *(f"rule {clean(r)}" for r in origin.rules)]
    if "context" in node.meta:
        notes.append(_context(node.meta["context"]))
    return _code(f"{clean(node.name)} = {call_text(node)}", "; ".join(n for n in notes if n))


def _code(code: str, comment: str) -> list[str]:
    line = f"{_INDENT}{code}  # {comment}" if comment else f"{_INDENT}{code}"
    if len(line) <= WIDTH:
        return [line]
    name, mark, value = code.partition(" = ")
    if len(_INDENT + code) <= WIDTH or not mark:
        return [fit(f"{_INDENT}# {comment}"), f"{_INDENT}{code}"]
    broken = wrap(f"{_INDENT * 2}{value}", _INDENT * 3, cut=False)
    return [f"{_INDENT}{name} = (", *broken, fit(f"{_INDENT})  # {comment}")]


def _context(context: Any) -> str:
    grad, autocasts = context
    words = [] if grad else ["no_grad"]
    words += [f"autocast {device} {literal(dtype) if enabled else 'off'}" for device, dtype, enabled in autocasts]
    return ", ".join(words)


def call_text(node: Node) -> str:
    """Return the expression that a node computes."""
    if node.op == "get_attr":
        return attribute(str(node.target))
    if node.op == "call_module":
        return f"{attribute(str(node.target))}({_arguments(node.args, node.kwargs)})"
    if node.op == "call_method":
        return f"{argument(node.args[0])}.{clean(node.target)}({_arguments(node.args[1:], node.kwargs)})"
    return _function(node)


def _function(node: Node) -> str:
    target, args = node.target, node.args
    if not node.kwargs and len(args) == 2:
        if target in _INFIX:
            return f"{_operand(args[0])} {_INFIX[target]} {_operand(args[1])}"
        if target is operator.getitem:
            return f"{argument(args[0])}[{_index(args[1])}]"
        if target is getattr and isinstance(args[1], str) and args[1].isidentifier():
            return f"{argument(args[0])}.{args[1]}"
    if target in _PREFIX and len(args) == 1:
        return f"{_PREFIX[target]}{_operand(args[0])}"
    assert callable(target)
    return f"{function_name(target)}({_arguments(args, node.kwargs)})"


def function_name(target: Callable[..., Any]) -> str:
    """Return a function as one would call it, without addresses."""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return f"torch.ops.{clean(target)}"
    name = str(getattr(target, "__name__", type(target).__name__))
    module = str(getattr(target, "__module__", None) or "")
    if getattr(torch.nn.functional, name, None) is target:
        return f"F.{name}"
    for owner, prefix in ((torch, "torch"), (torch.Tensor, "torch.Tensor"), (torch._C._nn, "F")):
        if getattr(owner, name, None) is target:
            return f"{prefix}.{name}"
    if module in ("", "builtins", "__main__"):
        return clean(name)
    return clean(f"{module.removeprefix('_')}.{getattr(target, '__qualname__', name)}")


def attribute(path: str) -> str:
    """Return a dotted path as an expression: ``self.blocks[0].mlp``; parts that are no identifiers are quoted."""
    text = "self"
    for part in path.split("."):
        plain = part.isidentifier() and part.isascii()
        text += f".{part}" if plain else f"[{part}]" if part.isdigit() and part.isascii() else f"[{literal(part)}]"
    return text


def argument(value: Any) -> str:
    """Return an argument as Python."""
    if isinstance(value, Node):
        return clean(value.name)
    if isinstance(value, slice):
        return f"slice({', '.join(argument(v) for v in (value.start, value.stop, value.step))})"
    if isinstance(value, tuple) and type(value) is not torch.Size:
        inside = ", ".join(argument(v) for v in value)
        return f"({inside},)" if len(value) == 1 else f"({inside})"
    if isinstance(value, list | torch.Size):
        return f"[{', '.join(argument(v) for v in value)}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{literal(k)}: {argument(v)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.Tensor):
        return f"<tensor {type_of(value)}>"
    return literal(value)


def _operand(value: Any) -> str:
    text = argument(value)
    return f"({text})" if text.startswith("-") else text


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    named = [f"{clean(k)}={argument(v)}" for k, v in kwargs.items()]
    return ", ".join([*(argument(a) for a in args), *named])


def _index(index: Any) -> str:
    parts = index if isinstance(index, tuple) else (index,)
    return ", ".join(_slice(p) if isinstance(p, slice) else "..." if p is ... else argument(p) for p in parts) or "()"


def _slice(part: slice) -> str:
    ends = [argument(p) if p is not None else "" for p in (part.start, part.stop)]
    return ":".join(ends) + (f":{argument(part.step)}" if part.step is not None else "")
