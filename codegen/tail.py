"""What follows a combine and is added to it in the same kernel: shared expert, gate per sample, residual.

Found by data flow: a chain of sums and products, each the only reader of the one before, with views between them.
Every other operand has the combine's shape, one row per sample, or one row.

Shapes: T tokens of B samples, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from moefx.codegen.epilogue import trace_pointwise
from moefx.codegen.pointwise import Pointwise
from moefx.codegen.reasons import CannotLower

#: Calls that change the shape alone, that combine values, and that do so in the place of the first.
VIEWS = frozenset({"view", "reshape", "_unsafe_view", "view_as", "reshape_as"})
ARITHMETIC = frozenset({"add", "mul", "sub"})
IN_PLACE = frozenset({"iadd", "imul", "isub", "add_", "mul_", "sub_"})
Value = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Tail:
    """A chain behind a combine, as a program of the combine's sum and of ``operands``."""

    nodes: tuple[fx.Node, ...]
    operands: tuple[fx.Node, ...]
    kinds: tuple[str, ...]
    program: Pointwise
    #: What has the shape of the chain's end, if that is not [T, D].
    like: fx.Node | None


@dataclass
class _Chain:
    """The chain while it grows."""

    nodes: list[fx.Node] = field(default_factory=list)
    operands: dict[fx.Node, str] = field(default_factory=dict)
    is_viewed: bool = False


def tail_of(combine: fx.Node, value: Value) -> Tail | None:
    """Return the longest chain behind ``combine`` that its kernel can compute."""
    chain, best, node = _Chain(), None, combine
    while len(node.users) == 1:
        user = next(iter(node.users))
        try:
            if not _take(chain, node, user, value):
                break
            best = _finish(chain, combine, user, value) or best
        except CannotLower:
            break
        node = user
    return best


def _take(chain: _Chain, node: fx.Node, user: fx.Node, value: Value) -> bool:
    """Add ``user`` to the chain, if it is a view, a sum or a product of ``node`` and what it can be combined with."""
    name = called(user)
    out, before = value(user), value(node)
    if out.dtype != before.dtype or not statically_known_true(out.shape[-1] == before.shape[-1]):
        return False
    if name in VIEWS and user.args[0] is node:
        chain.nodes.append(user)
        chain.is_viewed = True
        return True
    if name in IN_PLACE and user.args[0] is not node:
        return False
    if name not in ARITHMETIC | IN_PLACE or not same(out.shape, before.shape):
        return False
    others = [arg for arg in user.all_input_nodes if arg is not node]
    kinds = [_kind(value(other), out) for other in others]
    if None in kinds:
        return False
    chain.operands |= {other: str(kind) for other, kind in zip(others, kinds, strict=True)}
    chain.nodes.append(user)
    return True


def called(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls, in any spelling, or nothing."""
    if node.op not in ("call_function", "call_method"):
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return packet if isinstance(packet, str) else str(getattr(packet, "__name__", packet))


def same(left: Any, right: Any) -> bool:
    """Whether two shapes are known to be equal."""
    return len(left) == len(right) and all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))


def _kind(operand: torch.Tensor, out: torch.Tensor) -> str | None:
    """Return how an operand is spread over the result: every row of its own, one per sample, or one for all."""
    if operand.dtype != out.dtype or operand.device != out.device or operand.dim() == 0:
        return None
    if same(operand.shape, out.shape):
        return "row"
    width = statically_known_true(operand.shape[-1] == out.shape[-1])
    if not width or any(not statically_known_true(size == 1) for size in operand.shape[1:-1]):
        return None
    if operand.dim() == 1 or statically_known_true(operand.shape[0] == 1):
        return "column"
    leads = operand.dim() == out.dim() and statically_known_true(operand.shape[0] == out.shape[0])
    return "sample" if leads and out.dim() > 2 else None


def _finish(chain: _Chain, combine: fx.Node, end: fx.Node, value: Value) -> Tail | None:
    """Return the chain so far, if it ends in arithmetic and something has its shape."""
    if called(end) in VIEWS or not chain.operands:
        return None
    rows = [
        node for node, kind in chain.operands.items() if kind == "row" and same(value(node).shape, value(end).shape)
    ]
    if chain.is_viewed and not rows:
        return None
    nodes, operands = tuple(chain.nodes), tuple(chain.operands)

    def run(*z: torch.Tensor) -> torch.Tensor:
        env: dict[fx.Node, Any] = {combine: z[0], **dict(zip(operands, z[1:], strict=True))}
        for node in nodes:
            if called(node) in VIEWS:
                env[node] = env[node.args[0]]  # type: ignore[index]
                continue
            args = fx.node.map_arg(node.args, env.__getitem__)
            kwargs = fx.node.map_arg(node.kwargs, env.__getitem__)
            function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
            env[node] = function(*args, **kwargs)
        result: torch.Tensor = env[nodes[-1]]
        return result

    program = trace_pointwise(run, int(value(combine).shape[1]), 1 + len(operands))
    return Tail(nodes, operands, tuple(chain.operands.values()), program, rows[0] if chain.is_viewed else None)
