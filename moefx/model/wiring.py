"""Passing values on in a module's own forward: what `moefx.model.carry` planned, as edges of its graph."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node

from moefx.errors import PlanError
from moefx.graph import Graph
from moefx.graph.splice import Splice
from moefx.model.carry import asked_for, inside, passes
from moefx.model.forward import received
from moefx.model.local import JSON, decode, device_of
from moefx.model.plan import CarriedPlan, Plan

_RULE = "carry"


class Wiring:
    """The values that a plan passes between modules.

    Attributes:
        inputs: how each module that hands values on is called.
        common: per state, what the layers that share it, or one that begins with it, have in common.
    """

    def __init__(self, plan: Plan) -> None:
        self.carried = asked_for(plan.carried, plan.sites)
        on_the_way = [c for c in plan.carriers if any(v.source == c.path or passes(v, c.path) for v in self.carried)]
        self.inputs: dict[str, JSON] = {carrier.path: carrier.inputs for carrier in on_the_way}
        self.common: defaultdict[str, dict[str, Any]] = defaultdict(dict)
        for value in self.carried:
            if value.like:
                self.common[value.name] = self.common[value.like]

    def enter(self, graph: Graph, path: str) -> dict[str, Node | None]:
        """Return the values that the forward of ``path`` has when it begins, or computes, as nodes of its graph.

        A state begins as None in the module around all of its layers.
        """
        splice, found = Splice(graph, _RULE), dict[str, Node | None]()
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        for value in self.carried:
            if passes(value, path):
                # A state may be None.
                example = decode(value.value, mode, device_of(graph.root)) if value.node else None
                found[value.name] = splice.argument(value.name, val=example)
            elif value.source == path:
                found[value.name] = next((n for n in graph.fx.nodes if n.name == value.node), None)
                if value.node and found[value.name] is None:
                    raise PlanError(
                        f"pass a value on in {path!r}", found=f"no value {value.node!r}", do="plan the model again"
                    )
        return found

    def connect(self, graph: Graph, path: str, values: dict[str, Node | None], layers: dict[str, str]) -> None:
        """Give every child what it needs, take states from it, and return those that came from outside.

        Args:
            graph: of the module at ``path``.
            path: of the module.
            values: what `enter` returned.
            layers: the state that a child which is a routed layer takes as its last argument, by the child's name.

        Raises:
            PlanError: a child that needs a value is not called.
        """
        reached: set[tuple[str, str]] = set()
        values = dict(values)
        begin = {v.name: v for v in self.carried if v.begins and v.source == path}
        for node in [n for n in graph.fx.nodes if n.op == "call_module"]:
            child = f"{path}.{node.target}".lstrip(".")
            through = [v for v in self.carried if v.name in values and passes(v, child)]
            asked = [v.name for v in through] + [layers[name] for name in (str(node.target),) if name in layers]
            for value in [begin.pop(name) for name in asked if name in begin]:
                values[value.name] = _begun(graph, value, values)
            reached |= {(v.name, b) for v in through for b in v.blocks if b == child or inside(b, child)}
            if str(node.target) in layers:
                state = layers[str(node.target)]
                node.args = (*node.args, values[state])
                values[state] = _unpack(graph, node, operator.getitem, [(0,), (1,)])[0]
            elif through:
                known = {v.name: values[v.name] for v in through if values[v.name] is not None}
                node.kwargs = node.kwargs | known
                states = [v for v in through if not v.node]
                reads = [(i, child) for i in range(-1, len(states))]
                made = _unpack(graph, node, received, reads) if states else []
                values |= {v.name: item for v, item in zip(states, made, strict=True)}
        self._check(path, values, reached)
        output = graph.output_node
        (leaves,) = output.args
        assert isinstance(leaves, list | tuple)
        output.args = ([*leaves, *(values[v.name] for v in self.carried if not v.node and passes(v, path))],)

    def _check(self, path: str, values: dict[str, Node | None], reached: set[tuple[str, str]]) -> None:
        wanted = {(v.name, b) for v in self.carried if v.name in values for b in v.blocks if inside(b, path)}
        for name, block in sorted(wanted - reached):
            raise PlanError(
                f"pass {name} on to {block!r}",
                found=f"the forward of {path or 'the model'} does not call what holds it: another pass wrote it out",
                do="leave this site out of one of them with skip=",
            )


def _begun(graph: Graph, value: CarriedPlan, values: Mapping[str, Node | None]) -> Node | None:
    """Return a state that begins as others, in the order of their tokens; None if one of them is not there."""
    parts = [values.get(name) for name in value.begins]
    nodes = [part for part in parts if part is not None]
    if len(nodes) < len(parts):
        return None
    order = {node: i for i, node in enumerate(graph.fx.nodes)}
    last = max(nodes, key=order.__getitem__)
    at = nodes.index(last)
    return Splice(graph, _RULE).after(last, join_states, (at, *nodes[:at], *nodes[at + 1 :]))


def join_states(last: Tensor, at: int, *others: Tensor) -> Tensor:
    """Return states ``[B, T_i, W]`` as one ``[B, Σ T_i, W]``; ``last`` is number ``at`` of them."""
    return torch.cat((*others[:at], last, *others[at:]), dim=1)


def _unpack(graph: Graph, node: Node, read: Callable[..., Any], reads: list[tuple[Any, ...]]) -> list[Node]:
    """Let users of ``node`` use the first of ``reads``, and return the further ones."""
    splice = Splice(graph, _RULE)
    further = [splice.after(node, read, arguments) for arguments in reads[1:]]
    plain = splice.after(node, read, reads[0], val=node.meta["val"])
    node.replace_all_uses_with(plain, delete_user_cb=lambda user: user is not plain and user not in further)
    return further
