"""What analyses return: sites, the weights they name, and matches or misses with a reason."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.fx import Node

from moefx.graph.origin import origin_of

if TYPE_CHECKING:
    from moefx.graph import Graph

Kind = Literal["ffn", "attention", "block", "model"]
Role = Literal["main", "context", "refiner", "side", "conditioning"]
Index = slice | tuple[int, ...] | None


@dataclass(frozen=True)
class Weight:
    """A parameter, or some rows and columns of it, by dotted name.

    ``rows`` and ``cols`` index the matrix in the orientation ``[out, in]`` (a slice, or a tuple of indices where the
    layout is interleaved); ``transposed`` says that the parameter is stored as ``[in, out]``.
    """

    fqn: str
    rows: Index = None
    cols: Index = None
    transposed: bool = False

    def tensor(self, graph: Graph) -> torch.Tensor:
        """Return the values as ``[out, in]`` (``[out]`` for a bias); a 1×1 convolution loses its kernel dimensions."""
        found = graph.parameter(self.fqn)
        if found.ndim > 2 and all(size == 1 for size in found.shape[2:]):
            found = found.flatten(1)
        if self.transposed:
            found = found.transpose(0, 1)
        if self.rows is not None:
            found = found[_index(self.rows)]
        return found if self.cols is None else found[:, _index(self.cols)]

    @property
    def is_whole(self) -> bool:
        """Whether this is the entire parameter."""
        return self.rows is None and self.cols is None

    def __str__(self) -> str:
        rows, cols = (":" if i is None else _show(i) for i in (self.rows, self.cols))
        part = "" if self.is_whole else f"[{rows}]" if self.cols is None else f"[{rows}, {cols}]"
        return f"{self.fqn}{'.T' if self.transposed else ''}{part}"


def _index(part: slice | tuple[int, ...]) -> slice | list[int]:
    return part if isinstance(part, slice) else list(part)


def _show(part: slice | tuple[int, ...]) -> str:
    return f"{part.start}:{part.stop}" if isinstance(part, slice) else f"<{len(part)} indices>"


@dataclass(frozen=True, eq=False)
class Site:
    """One place of a graph that a rewrite can act on.

    Attributes:
        kind: ``"ffn"``, ``"attention"`` or ``"block"``; passes over the whole model speak of ``"model"``.
        name: unique; the module path, with ``#i`` for the i-th call of that module and ``:ffn`` or ``:attn`` where the
            region is only a part of the module.
        path: the smallest module whose invocation contains the region; ``call_index`` counts its invocations.
        nodes: the region, in program order; ``inputs`` enter it, ``output`` is its result.
        operands: what the region is made of, by name (see the analysis that made the site).
        shapes: sizes in the example run.
        role: which stream the result belongs to.
        why: why it matched, in one sentence.
        region_is_module: the region is all that one module invocation does, so the module can be replaced.
        flavour: the variant found, such as ``"gated"`` or ``"joint"``.
        dead: the result feeds nothing that is returned.
    """

    kind: Kind
    name: str
    path: str
    call_index: int
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    output: Node
    operands: Mapping[str, Any]
    shapes: Mapping[str, Any]
    role: Role
    why: str
    region_is_module: bool
    flavour: str = ""
    gate_first: bool = False
    dead: bool = False

    def weights(self) -> dict[str, Weight]:
        """Return the operands that are weights."""
        return {name: item for name, item in self.operands.items() if isinstance(item, Weight)}

    def escapes(self) -> tuple[Node, ...]:
        """Return the inner nodes whose values are also read outside the region, so that they cannot be removed."""
        inside = set(self.nodes)
        inner = (n for n in self.nodes if n is not self.output)
        return tuple(n for n in inner if n.op != "get_attr" and any(user not in inside for user in n.users))

    def __str__(self) -> str:
        marks = [self.role, *(["dead"] if self.dead else [])]
        return f"{self.kind} {self.flavour} {self.name} ({', '.join(marks)})"


@dataclass(frozen=True, eq=False)
class Match:
    """An attempt that succeeded."""

    site: Site


@dataclass(frozen=True, eq=False)
class Miss:
    """An attempt that failed: the first failing condition, where, and how many nodes had matched before it."""

    reason: str
    node: Node
    module_path: str
    source_line: str
    progress: int
    kind: Kind = "ffn"
    passed: tuple[str, ...] = field(default=())

    @staticmethod
    def at(node: Node, reason: str, *, progress: int, kind: Kind = "ffn", passed: tuple[str, ...] = ()) -> Miss:
        """Return a miss located by the origin of ``node``."""
        origin = origin_of(node)
        return Miss(reason, node, origin.path, origin.source, progress, kind, passed)

    def __str__(self) -> str:
        where = " · ".join(part for part in (self.module_path, self.source_line) if part)
        return f"{self.kind} near miss at {self.node.name} ({where}): {self.reason}"
