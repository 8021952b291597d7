"""What each value depends on: the timestep, a label or other vector, text, the tokens themselves, or nothing.

Inputs are classed by what the model does with them, not by what they are called, except that among several inputs that
go through a sinusoid the one named like a timestep is the timestep.
"""

from __future__ import annotations

import re
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from moefx.graph.kinds import MOVES, POINTWISE, shape, value
from moefx.passes.analysis.flow import Flow
from moefx.passes.analysis.streams import Streams, is_whole_operand

if TYPE_CHECKING:
    pass

TIMESTEP, LABEL, TEXT, TOKENS, POSITION, MASK = "timestep", "label", "text", "tokens", "position", "mask"
_ALONG = MOVES | POINTWISE | {"gather", "outer", "cat", "stack", "reduce", "pad", "repeat", "dropout"}
_TIME_NAME = re.compile(r"(^|_)(t|timesteps?|time|sigmas?|noise_levels?|tau)(_r|_ratio)?$")


class Classes:
    """Dependency classes of all nodes of a flow."""

    def __init__(self, flow: Flow, streams: Streams) -> None:
        self.flow, self.streams = flow, streams

    @cached_property
    def inputs(self) -> dict[Node, str]:
        """The class of every tensor input of the model."""
        ends = {node: self._ends(node) for node in self.flow.placeholders}
        free = [n for n in ends if n not in self.streams.aligned]
        waves = [n for n in free if "sinusoid" in ends[n]]
        named = [n for n in free if _TIME_NAME.search(n.name)]
        times = [n for n in waves if n in named] or named or [n for n in waves if self._per_sample(n)][:1]
        batch = {(shape(n) or (0,))[0] for n in times if shape(n)}
        found = {n: TIMESTEP if n in times else self._class(n, ends[n], batch) for n in ends}
        if TOKENS not in found.values():
            # No input reaches the output token by token (a classifier): the largest ones are the tokens.
            found = {node: TOKENS if kind == TEXT else kind for node, kind in found.items()}
        return found

    def of(self, node: Node) -> frozenset[str]:
        """Return the classes of inputs that ``node`` depends on; empty for a constant."""
        bits = self.flow.ancestors[self.flow.index[node]]
        return frozenset(kind for source, kind in self.inputs.items() if bits >> self.flow.index[source] & 1)

    def _per_sample(self, node: Node) -> bool:
        sizes = shape(node)
        return sizes is not None and (len(sizes) <= 1 or all(size == 1 for size in sizes[1:]))

    def _class(self, node: Node, ends: frozenset[str], batch: set[int]) -> str:
        sizes = shape(node)
        if node in self.streams.aligned:
            return TOKENS
        if sizes is None or len(sizes) >= 3:
            return TEXT if "projection" in ends else POSITION if "sinusoid" in ends or "product" in ends else MASK
        if "projection" in ends:
            unbatched = len(sizes) == 2 and len(batch) == 1 and sizes[0] not in batch
            return TEXT if unbatched else LABEL
        example = value(node)
        if "sinusoid" in ends:
            return POSITION
        real = isinstance(example, torch.Tensor) and example.dtype.is_floating_point
        return POSITION if "product" in ends and real else MASK

    def _ends(self, start: Node) -> frozenset[str]:
        """Walk on through pointwise operations and movement, and say what is met: what the model does with an input."""
        found: set[str] = set()
        seen, queue = {start}, deque([start])
        while queue:
            node = queue.popleft()
            for user in self.flow.readers[node]:
                what = self.flow.ops[user]
                if what.kind in ("linear", "conv", "embedding", "norm"):
                    found.add("projection")
                elif what.name in ("sin", "cos", "polar"):
                    found.add("sinusoid")
                if self._modulates(node, user, start):
                    found.add("product" if what.kind == "mul" else "mask")
                elif what.kind in _ALONG and user not in seen:
                    seen.add(user)
                    queue.append(user)
        return frozenset(found)

    def _modulates(self, node: Node, user: Node, start: Node) -> bool:
        """Whether ``node`` only scales, shifts or selects another value of the model, instead of being carried on."""
        what = self.flow.ops[user]
        if what.name in ("where", "masked_fill"):
            return node is what.attrs["operands"][0 if what.name == "where" else 1]
        if what.kind not in ("mul", "add", "sub", "div") or is_whole_operand(node, user):
            return False
        mine = self.flow.index[start]
        return any(self._other_inputs(other, mine) for other in what.inputs if other is not node)

    def _other_inputs(self, node: Node, mine: int) -> bool:
        bits = self.flow.ancestors[self.flow.index[node]]
        return any(bits >> i & 1 for i in (self.flow.index[p] for p in self.flow.placeholders) if i != mine)
