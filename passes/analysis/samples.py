"""Which values have one row per sample: told by running their part of the graph on a larger batch, in shapes alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from moefx.errors import InputError
from moefx.passes.analysis.cost import propagated
from moefx.passes.analysis.flow import Flow


def rows_per_sample(flow: Flow, nodes: Iterable[Node], samples: int) -> set[Node] | None:
    """Return those of ``nodes`` whose first axis counts the samples; None if one grows with them otherwise.

    Args:
        flow: of the graph.
        nodes: values of it.
        samples: of the example run.
    """
    wanted = [node for node in nodes if isinstance(node.meta.get("val"), torch.Tensor)]
    try:
        grown: dict[Node, Any] = propagated(flow, samples, samples + 1, wanted)
    except InputError:
        return None
    found: set[Node] = set()
    for node in wanted:
        before, after = tuple(node.meta["val"].shape), tuple(grown[node].shape)
        if before == after:
            continue
        if before[0] != samples or after != (samples + 1, *before[1:]):
            return None
        found.add(node)
    return found
