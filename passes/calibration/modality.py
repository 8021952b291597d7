"""Which tokens of a joint sequence are text: single-stream blocks run text and image tokens through one network."""

from __future__ import annotations

import torch
from torch.fx import Node

from moefx.graph.kinds import shape
from moefx.passes.analysis import Facts, Site
from moefx.passes.analysis.conditioning import TEXT

JOINT = ("main", "text")


def text_tokens(facts: Facts, site: Site) -> tuple[int, int] | None:
    """Return (first, last + 1) of the text tokens among those that enter ``site``; None where there is no mixture.

    Found by the concatenation that made the sequence: the part that is as long as a text input and does not lead to the
    model's output token by token.
    """
    flow, x = facts.context.flow, site.operands["x"]
    sizes = shape(x) or ()
    if len(sizes) != 3 or site.shapes["axis"] != 2 or site.role != "main":
        return None
    lengths = {(shape(n) or (0, 0))[1] for n, kind in facts.context.classes.inputs.items() if kind == TEXT}
    for node in reversed(flow.nodes[: flow.index[x]]):
        if flow.ops[node].kind == "cat" and (shape(node) or ())[:2] == sizes[:2] and flow.depends(x, node):
            return _part(facts, flow.ops[node].inputs, lengths, int(sizes[1]))
    return None


def _part(facts: Facts, parts: tuple[Node, ...], lengths: set[int], tokens: int) -> tuple[int, int] | None:
    counts = [(shape(p) or (0, 0))[1] if len(shape(p) or ()) == 3 else 0 for p in parts]
    if sum(counts) != tokens:
        return None  # joined along another axis
    first = 0
    for part, count in zip(parts, counts, strict=True):
        if count in lengths and part not in facts.context.streams.aligned:
            return first, first + count
        first += count
    return None


def modality(span: tuple[int, int] | None, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
    """Return 0 for main and 1 for text tokens ``[rows · tokens]``."""
    mask = torch.zeros(tokens, dtype=torch.int64, device=device)
    if span is not None:
        mask[span[0] : span[1]] = 1
    return mask.repeat(rows)
