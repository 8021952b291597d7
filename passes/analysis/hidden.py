"""Values between projections: a pointwise expression over lanes, or the reason why a value is not one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from moefx.graph.kinds import MOVES, POINTWISE, number, param_ref, shape
from moefx.passes.analysis.flow import Flow
from moefx.passes.analysis.lanes import Lane, Lanes, move
from moefx.passes.analysis.pointwise import Arg, Call, Const, Expr, has_activation, substitute

_MOST_LANES = 2
_MOST_CALLS = 64


@dataclass(frozen=True, eq=False)
class Hidden:
    """``expr`` over ``lanes``: every tensor of the expression is features of a projection, element by element."""

    expr: Expr
    lanes: tuple[Lane, ...]
    calls: int = 0


@dataclass(frozen=True, eq=False)
class Blocked:
    """Why a value is no pointwise expression of projections; ``near`` when it almost was."""

    reason: str
    node: Node
    near: bool = False
    calls: int = 0


class Hiddens:
    """The :class:`Hidden` or :class:`Blocked` of every node of a flow, in one pass."""

    def __init__(self, flow: Flow, lanes: Lanes) -> None:
        self.flow, self.lanes = flow, lanes
        self._known: dict[Node, Hidden | Blocked] = {}
        for node in flow.nodes:
            self._known[node] = self._read(node)

    def of(self, node: Node) -> Hidden | Blocked:
        """Return what ``node`` is made of."""
        return self._known[node]

    def _read(self, node: Node) -> Hidden | Blocked:
        lane = self.lanes.of(node)
        if lane is not None:
            return Hidden(Arg(0), (lane,))
        what = self.flow.ops[node]
        if (what.kind in MOVES or what.kind == "dropout") and what.inputs:
            return self._moved(node)
        if what.kind in POINTWISE:
            return self._combined(node)
        inner = [self._known[n] for n in what.inputs if n in self._known]
        near = next((h for h in inner if isinstance(h, Hidden) and has_activation(h.expr)), None)
        return Blocked(f"{what.name} lies between the projections", node, near is not None, near.calls if near else 0)

    def _moved(self, node: Node) -> Hidden | Blocked:
        what = self.flow.ops[node]
        inner = self._known[what.inputs[0]]
        if isinstance(inner, Blocked):
            return inner
        lanes = tuple(moved for lane in inner.lanes if (moved := move(lane, what, node)) is not None)
        if len(lanes) < len(inner.lanes):
            return Blocked(f"{what.name} mixes features with tokens", node, has_activation(inner.expr), inner.calls)
        return Hidden(inner.expr, lanes, inner.calls)

    def _combined(self, node: Node) -> Hidden | Blocked:
        what = self.flow.ops[node]
        args: list[Expr] = []
        lanes: list[Lane] = []
        calls = 1
        for operand in what.attrs["operands"]:
            part = self._operand(operand, node)
            if isinstance(part, Blocked):
                return part
            if isinstance(part, Const):
                args.append(part)
                continue
            args.append(substitute(part.expr, _merge(lanes, part.lanes)))
            calls += part.calls
        problem = self._refuse(node, lanes, calls)
        if problem:
            return Blocked(problem, node, False, calls)
        options = tuple(sorted((k, v) for k, v in what.attrs["options"].items() if v is not None))
        return Hidden(Call(what.name, tuple(args), options), tuple(lanes), calls)

    def _operand(self, operand: Any, node: Node) -> Hidden | Blocked | Const:
        plain = number(operand)
        if not isinstance(plain, Node):
            known = isinstance(plain, int | float | bool | None)
            return Const(plain) if known else Blocked("its pointwise part has an operand that is no tensor", node)
        found = param_ref(plain, self.flow.graph)
        if found is not None:
            value = self.flow.graph.parameter(found.fqn)
            if value.numel() == 1 and not value.requires_grad and not value.is_meta and value.dtype.is_floating_point:
                return Const(float(value))
            return Blocked(f"its pointwise part reads the parameter {found.fqn}", node)
        part = self._known[plain]
        if isinstance(part, Hidden) and shape(plain) != shape(node):
            return Blocked("its pointwise part broadcasts", node, False, part.calls)
        return part

    def _refuse(self, node: Node, lanes: list[Lane], calls: int) -> str:
        if not lanes:
            return "its pointwise part reads no projection"
        if len(lanes) > _MOST_LANES:
            return f"its pointwise part combines more than {_MOST_LANES} projections"
        if calls > _MOST_CALLS:
            return "its pointwise part is too long"
        inputs = {self.flow.uncast(self.flow.ops[lane.base].inputs[0]) for lane in lanes}
        return "its pointwise part combines projections of different inputs" if len(inputs) > 1 else ""


def _merge(lanes: list[Lane], more: tuple[Lane, ...]) -> dict[int, Expr]:
    """Add ``more`` to ``lanes`` where new, and return the renumbering."""
    places: dict[int, Expr] = {}
    for i, lane in enumerate(more):
        at = next((j for j, known in enumerate(lanes) if known.same(lane)), None)
        if at is None:
            lanes.append(lane)
            at = len(lanes) - 1
        places[i] = Arg(at)
    return places
