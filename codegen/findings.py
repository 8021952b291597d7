"""What a graph is found to hold: regions with their kernels, and what has none with the reason; and both as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from torch import fx

from moefx.codegen.choice_lowering import ChoiceLowering
from moefx.codegen.router_lowering import GroupLowering, RouterLowering
from moefx.codegen.spec import RegionSpec
from moefx.codegen.token_lowering import TokenLowering

if TYPE_CHECKING:
    from moefx.codegen.attention import HeadLowering

#: What a graph is found to hold.
Found: TypeAlias = "Lowering | ChoiceLowering | HeadLowering | TokenLowering | RouterLowering | GroupLowering | Refusal"


@dataclass(frozen=True)
class Lowering:
    """A region and the kernels that replace it."""

    name: str
    region: RegionSpec
    nodes: tuple[fx.Node, ...]
    #: What the region reads, in the order of :func:`moefx.codegen.runtime.region_op`.
    inputs: tuple[fx.Node, ...]
    output: fx.Node
    #: Why the region is not larger, if there was more to fuse.
    notes: tuple[str, ...] = ()
    #: What has the shape of ``output``, where that is not the region's.
    like: fx.Node | None = None


@dataclass(frozen=True)
class Refusal:
    """A routed operator that no kernel computes; the dialect op stays."""

    name: str
    node: fx.Node
    reason: str
    #: What it would have been.
    kind: str = "region"


def anchor_of(item: Found) -> fx.Node:
    """Return the node whose place in the graph is that of a finding."""
    if isinstance(item, Refusal):
        return item.node
    return item.nodes[0] if isinstance(item, Lowering) else item.output


def describe(found: Iterable[Found]) -> str:
    """Return the regions as text: one line each, and one per kernel or reason below it."""
    lines: list[str] = []
    for item in found:
        if isinstance(item, Refusal):
            lines += [f"{item.name}: {item.kind} not lowered", f"  because {item.reason}"]
        elif isinstance(item, Lowering | ChoiceLowering):
            lines.append(f"{item.name}: region {item.region.key}")
            others = item.kernels if isinstance(item, ChoiceLowering) else ()
            lines += [f"  {kernel.name}" for kernel in (*item.region.kernels, *others)]
            lines += [f"  ends there because {note}" for note in item.notes]
        else:
            lines += [f"{item.name}: {item.what}", *(f"  {kernel.name}" for kernel in item.kernels)]
    return "\n".join(lines)
