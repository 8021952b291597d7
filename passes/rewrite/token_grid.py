"""Where the image is among the tokens of an attention: found on the whole model, carried to the edit by the options."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from moefx.graph.kinds import shape
from moefx.passes.analysis import Facts
from moefx.passes.analysis.site import Site

Layout = list[int]  # other tokens before the image, other tokens after it, then the sizes of the image


def token_layouts(facts: Facts, grid: Sequence[int] | None) -> dict[str, Layout]:
    """Return the layout of every self- or joint attention over image tokens, by site.

    The image tokens are those that reach the model's output; their grid is the latent input's over some patch size, or
    ``grid`` (at the model's full resolution) where the latents come as tokens already.
    """
    spaces = [list(grid)] if grid else list(_spaces(facts))
    found: dict[str, Layout] = {}
    for site in facts.sites:
        span = _image_span(facts, site) if site.kind == "attention" and site.flavour in ("self", "joint") else None
        if span is None:
            continue
        start, stop, total = span
        sizes = next((s for space in spaces if (s := _shrunk(space, stop - start))), None)
        if sizes is None and not grid:
            side = math.isqrt(stop - start)
            sizes = [side, side] if not spaces and side * side == stop - start else None
        if sizes is not None:
            found[site.name] = [start, total - stop, *sizes]
    return found


def _spaces(facts: Facts) -> Iterator[list[int]]:
    """Yield the sizes that the latent input may have in space, and in time before it."""
    for node, kind in facts.context.classes.inputs.items():
        sizes = shape(node) or ()
        if kind == "tokens" and len(sizes) == 4:
            yield [sizes[2], sizes[3]]
        elif kind == "tokens" and len(sizes) == 5:
            yield [sizes[2], sizes[3], sizes[4]]
            yield [sizes[1], sizes[3], sizes[4]]  # frames before channels, as in CogVideoX


def _shrunk(space: Sequence[int], count: int) -> list[int] | None:
    """Return ``space`` over a patch size, frames over a smaller one, such that it has ``count`` places."""
    *frames, height, width = space
    for step in range(1, (frames[0] if frames else 1) + 1):
        if frames and frames[0] % step:
            continue
        time = [frames[0] // step] if frames else []
        places = math.prod(time) * height * width
        side = math.isqrt(places // count) if count else 0
        if side and height % side == 0 and width % side == 0 and places == count * side * side:
            return [*time, height // side, width // side]
    return None


def _image_span(facts: Facts, site: Site) -> tuple[int, int, int] | None:
    """Return where the image tokens of an attention's queries begin and end, and how many tokens there are."""
    query, key = shape(site.operands["q"]), shape(site.operands["k"])
    if query is None or key is None or len(query) != 4 or query[-2] != key[-2]:
        return None
    spans = []
    for stream in site.operands["streams"]:
        boxes = facts.context.streams.aligned.get(stream.out.node, []) if stream.out is not None else []
        spans += [(stream.out.offset + box[1][0], stream.out.offset + box[1][1]) for box in boxes if len(box) == 3]
    spans = sorted(set(spans))
    if not spans or any(a[1] < b[0] for a, b in pairwise(spans)):
        return None
    return spans[0][0], max(stop for _, stop in spans), query[-2]
