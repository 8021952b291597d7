"""Put the kernels of what was found into a graph, in the place of its nodes."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterable

import torch
from torch import fx

from moefx.codegen.choice_lowering import ChoiceLowering
from moefx.codegen.findings import Found, Lowering, Refusal
from moefx.codegen.router_lowering import GroupLowering, RouterLowering
from moefx.codegen.token_lowering import TokenLowering


def replace(graph: fx.GraphModule, found: Iterable[Found], training: bool = False) -> int:
    """Replace what was found by calls of its kernels, in place, and return how many regions were; refusals stay.

    With ``training`` a region also saves what its gradient reads.
    """
    # The operators are defined only where kernels are wanted.
    import moefx.codegen.attention
    import moefx.codegen.backward
    import moefx.codegen.choice
    import moefx.codegen.routing
    import moefx.codegen.tokens  # noqa: F401

    kept = [item for item in found if not isinstance(item, Refusal)]
    placements: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for group in kept:
        placements |= group.replace(graph) if isinstance(group, GroupLowering) else {}
    routers = [item for item in kept if isinstance(item, RouterLowering)]
    regions = [item for item in kept if not isinstance(item, GroupLowering | RouterLowering)]
    for lowering in regions:
        if isinstance(lowering, Lowering):
            _replace_region(graph, _placed(lowering, placements), training)
        elif isinstance(lowering, ChoiceLowering):
            lowering.replace(graph, training)
        elif isinstance(lowering, TokenLowering):
            lowering.replace(graph)
        else:
            lowering.output.target = torch.ops.moefx.head_attention_kernels.default
    for router in routers:  # last: their results are what regions read
        router.replace(graph, training)
    graph.graph.lint()
    graph.recompile()
    return len(regions)


def _replace_region(graph: fx.GraphModule, lowering: Lowering, training: bool) -> None:
    """Put a call of a region's kernels in the place of its nodes."""
    from moefx.codegen.runtime import register

    target = torch.ops.moefx.region_train.default if training else torch.ops.moefx.region.default
    with graph.graph.inserting_before(lowering.output):
        call = graph.graph.call_function(target, (list(lowering.inputs), register(lowering.region)))
        if training:
            call = graph.graph.call_function(operator.getitem, (call, 0))
        if lowering.like is not None:
            call = graph.graph.call_method("view_as", (call, lowering.like))
    call.meta = dict(lowering.output.meta)
    lowering.output.replace_all_uses_with(call)
    for node in reversed(lowering.nodes):
        graph.graph.erase_node(node)


def _placed(lowering: Lowering, placements: dict[fx.Node, tuple[fx.Node, fx.Node]]) -> Lowering:
    """Return a region that reads the positions and row tiles which its grouping made, if kernels group."""
    found = placements.get(lowering.inputs[1])
    if found is None:
        return lowering
    at = 3 if lowering.region.reads_order else 2
    inputs = (*lowering.inputs[:at], *found, *lowering.inputs[at:])
    return dataclasses.replace(lowering, region=dataclasses.replace(lowering.region, placed=True), inputs=inputs)
