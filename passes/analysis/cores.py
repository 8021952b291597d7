"""Attention cores: the place where queries meet keys, in every spelling.

``sdpa`` is one fused node; ``softmax`` is ``softmax(q @ k.T) @ v`` written out; ``scores`` the same with another
function than softmax; ``linear`` is ``(v @ k.T) @ q`` without scores; ``mha`` an opaque ``nn.MultiheadAttention``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

from moefx.graph.kinds import MOVES, carries_data, shape
from moefx.passes.analysis.context import Context
from moefx.passes.analysis.hidden import Hidden
from moefx.passes.analysis.operands import read_operand

_QUIET = MOVES | {"dropout", "add", "sub", "mul", "div", "act", "pointwise", "pad"}


@dataclass(frozen=True, eq=False)
class Core:
    """One attention core: what it is called, its operands, where its result appears."""

    kind: str
    query: Node
    key: Node
    value: Node
    output: Node
    head_dim: int
    mask: Node | None = None
    causal: bool = False


def find_cores(context: Context) -> list[Core]:
    """Return every attention core, in program order."""
    used: set[Node] = set()
    found: list[Core] = []
    for node in context.flow.nodes:
        kind = context.flow.ops[node].kind
        if kind == "sdpa":
            found.append(_fused(context, node))
        elif kind == "mha":
            found.extend(_opaque(context, node))
        elif kind == "softmax":
            found.extend(_written(context, node, used))
    for node in context.flow.nodes:
        if context.flow.ops[node].kind == "matmul" and node not in used:
            found.extend(_unnormalised(context, node, used))
    return sorted(found, key=lambda core: context.flow.index[core.output])


def _result(context: Context, node: Node) -> Node:
    """Return the first result of a node with several."""
    if shape(node) is not None:
        return node
    items = [u for u in node.users if context.flow.ops[u].name == "item" and u.args[1] == 0]
    return items[0] if items else node


def _fused(context: Context, node: Node) -> Core:
    what = context.flow.ops[node]
    query, key, value = what.inputs[:3]
    return Core(
        "sdpa", query, key, value, _result(context, node), _last(query), what.attrs["mask"], what.attrs["is_causal"]
    )


def _opaque(context: Context, node: Node) -> Iterator[Core]:
    what = context.flow.ops[node]
    if "heads" in what.attrs:
        query, key, value = what.inputs[:3]
        mask = what.attrs["mask"]
        items = [u for u in node.users if context.flow.ops[u].name == "item" and u.args[1] == 0]
        head_dim = what.attrs["width"] // what.attrs["heads"]
        result = items[0] if items else node
        yield Core("mha", query, key, value, result, head_dim, mask if isinstance(mask, Node) else None)


def _last(node: Node) -> int:
    return (shape(node) or (1,))[-1]


def contracted(context: Context, product: Node) -> int:
    """Return the size of the dimension that a product sums over."""
    what = context.flow.ops[product]
    if what.name != "einsum":
        return _last(what.inputs[0])
    terms, _, result = what.attrs["equation"].partition("->")
    left, _, right = terms.partition(",")
    summed = [letter for letter in left if letter in right and letter not in result]
    offset = len(shape(what.inputs[0]) or ()) - len(left)
    return (shape(what.inputs[0]) or (1,))[left.index(summed[0]) + offset] if summed and "." not in left else 1


def _written(context: Context, softmax: Node, used: set[Node]) -> Iterator[Core]:
    """Match ``softmax(q @ k.T + mask) @ v``."""
    scores, mask = _scores(context, softmax)
    if scores is None:
        return
    query, key = context.flow.ops[scores].inputs[:2]
    for product, weights in _products(context, softmax):
        values = [n for n in context.flow.ops[product].inputs[:2] if n is not weights]
        if values and product not in used:
            used.update({scores, product})
            yield Core("softmax", query, key, values[0], product, contracted(context, scores), mask)


def _scores(context: Context, softmax: Node) -> tuple[Node | None, Node | None]:
    """Go back from a softmax to the product of queries and keys; return it and the mask added to it."""
    node, mask = context.flow.ops[softmax].inputs[0], None
    for _ in range(12):
        what = context.flow.ops[node]
        if what.kind == "matmul":
            bias = what.inputs[2] if len(what.inputs) > 2 else mask
            return (node, bias) if len(what.inputs) >= 2 else (None, None)
        if what.kind not in _QUIET or not what.inputs:
            return None, None
        products = [n for n in what.inputs if _leads_to_product(context, n)]
        if not products:
            return None, None
        others = [n for n in what.inputs if n is not products[0] and carries_data(n)]
        mask = others[0] if others and what.name in ("add", "where", "masked_fill", "sub") else mask
        node = products[0]
    return None, None


def _leads_to_product(context: Context, node: Node) -> bool:
    for _ in range(12):
        what = context.flow.ops[node]
        if what.kind == "matmul":
            return True
        if what.kind not in _QUIET or not what.inputs:
            return False
        node = what.inputs[0]
    return False


def _products(context: Context, node: Node) -> Iterator[tuple[Node, Node]]:
    """Yield the products that consume ``node`` through reshapes and pointwise operations, with the operand used."""
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        for user in context.flow.readers[current]:
            kind = context.flow.ops[user].kind
            if kind == "matmul":
                yield user, current
            elif kind in _QUIET and user not in seen:
                seen.add(user)
                stack.append(user)


def _unnormalised(context: Context, first: Node, used: set[Node]) -> Iterator[Core]:
    """Match two chained products without softmax, all of whose three operands are projections."""
    inputs = context.flow.ops[first].inputs
    if len(inputs) != 2 or any(len(shape(n) or ()) < 3 for n in inputs):
        return
    for second, state in _products(context, first):
        operands = context.flow.ops[second].inputs
        other = [n for n in operands[:2] if n is not state]
        if second in used or not other or not _are_three_projections(context, (*inputs, other[0])):
            continue
        used.update({first, second})
        if _contracts_features(context, first):
            yield Core("scores", inputs[0], inputs[1], other[0], second, contracted(context, first))
        else:
            turned = _turns(context, state, first)
            keys_last = (state is operands[0]) != turned
            key, value = (inputs[1], inputs[0]) if keys_last else inputs
            yield Core("linear", other[0], key, value, second, contracted(context, second))


def _are_three_projections(context: Context, nodes: tuple[Node, ...]) -> bool:
    """Whether three values come from three different projections, or from different rows of one."""
    found = {tuple(str(p.weight) for p in read_operand(context, n).parts) for n in nodes}
    return len(found) == 3 and () not in found


def _contracts_features(context: Context, product: Node) -> bool:
    """Whether a product sums over features (scores) rather than over tokens (a state)."""
    left, right = context.flow.ops[product].inputs[:2]
    for node, dim in ((left, -1), (right, -2)):
        hidden = context.hiddens.of(node)
        rank = len(shape(node) or ())
        if isinstance(hidden, Hidden) and rank >= 2 and context.flow.ops[product].name != "einsum":
            return (dim % rank) in hidden.lanes[0].dims
    return (shape(product) or (0,))[-1] != (shape(left) or (1,))[-2]


def _turns(context: Context, node: Node, product: Node) -> bool:
    """Whether the last two dimensions of ``product`` are exchanged on the way to ``node``."""
    turned = False
    while node is not product and context.flow.ops[node].inputs:
        what = context.flow.ops[node]
        if what.kind == "permute":
            turned ^= what.attrs["dims"][-1] == len(what.attrs["dims"]) - 2
        node = what.inputs[0]
    return turned
