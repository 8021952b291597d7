"""Time and space experts in the place of an FFN: the timestep picks one copy, the words of the prompt add others.

Source: RAPHAEL, arXiv 2305.18295. The space experts start as copies of the dense FFN whose output projection is zero.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import nn
from torch.fx import Node

from moefx.passes.analysis.site import Site
from moefx.passes.rewrite.base import Context, Costs, register_pass
from moefx.passes.rewrite.cut import mixes_tokens
from moefx.passes.rewrite.dense import dense_weights, ffn_counts, ffn_sizes, hidden_function
from moefx.passes.rewrite.upcycle import Upcycle, UpcycleOptions
from moefx.routing.experts import Experts
from moefx.routing.initialise import copies, zero_output
from moefx.routing.moe import RoutedFFN
from moefx.routing.scorers import MLPScorer
from moefx.routing.space import EdgeHead, SpaceExperts, SpaceTimeFFN

WORDS = ("words", "queries", "keys")


class SpaceOptions(UpcycleOptions):
    """Options of :class:`SpaceTimeExperts`."""

    space_experts: int = Field(6, ge=0, le=65536, description="experts that the words choose among; 0: none")
    alpha: float = Field(0.2, ge=0, le=1, description="share of its maximum that a word's attention map must reach")
    space_noise: float = Field(1.0, ge=0, description="deviation of the noise on the words' choice while training")
    space_output: bool = Field(False, description="let the space experts start as full copies; else they add nothing")
    edge: float = Field(0.0, ge=0, description="coefficient of the edge loss, for which the caller gives edge maps")


@register_pass
class SpaceTimeExperts(Upcycle):
    """Replace an FFN by routed copies of itself, and experts that words choose and attention maps place."""

    name = "space-experts"
    summary = "FFN -> routed copies + experts that words choose and attention maps place; exact at the start"
    Options: ClassVar[type[UpcycleOptions]] = SpaceOptions
    options: SpaceOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """What the time router reads, and the words with the attention to them."""
        return (*super().taps, *(WORDS if self.options.space_experts else ()))

    def misfit(self, site: Site) -> str:
        """Return why this FFN cannot have space experts."""
        if not self.options.space_experts:
            return super().misfit(site)
        if site.role != "main":
            return f"its stream is the {site.role}'s, not the image's"
        if not site.region_is_module or mixes_tokens(site) or int(site.shapes["axis"]) != len(site.shapes["x"]) - 1:
            return "space experts replace a feed-forward network that is a module of its own, with features last"
        dim, _, out, _ = ffn_sizes(site)
        if len(site.shapes["x"]) != 3 or dim != out:
            return "space experts map [batch, tokens, width] to itself"
        return super().misfit(site)

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and multiply-adds per token; a token meets every space expert that a word sends there.

        Words are taken to be as wide as tokens.
        """
        o = self.options
        base = super().costs(site, 0 if o.space_experts else tap_width)
        if not o.space_experts:
            return base
        dim = ffn_sizes(site)[0]
        parameters, compute = ffn_counts(site)
        head = sum(p.numel() for p in EdgeHead().parameters()) if o.edge else 0
        bias = dim if "b_out" in site.operands else 0
        router = dim * dim + dim + (dim + 1) * o.space_experts
        more = o.space_experts * (parameters - bias) + o.space_output * bias + head + router
        return Costs(
            base.parameters_before,
            base.parameters_after + more,
            base.active_before,
            base.active_after + o.space_experts * compute,
        )

    def build(self, context: Context) -> nn.Module:
        """Return both mixtures in one module."""
        o = self.options
        time = super().build(context)
        if not o.space_experts:
            return time
        assert isinstance(time, RoutedFFN)
        dense = dense_weights(context.site, context.graph)
        stacked = copies(dense, o.space_experts)
        weights = stacked if o.space_output else zero_output(stacked)
        width = int(context.taps["words"].meta["val"].shape[-1])
        draws = context.generator("space")
        router = MLPScorer(width, o.space_experts, hidden=width, std=o.router_std, generator=draws)
        space = SpaceExperts(
            router, Experts(weights, hidden_function(context.site)), alpha=o.alpha, noise=o.space_noise
        )
        if o.edge:
            space.record.coefficients["edge"] = o.edge
        head = EdgeHead(generator=draws) if o.edge else None
        first = words_first(context.taps["keys"], context.taps["words"])
        routed = SpaceTimeFFN(time, space, head, words_first=first).to(dense.w_in.device)
        return routed.train(context.graph.root.training)


def words_first(keys: Node, words: Node) -> bool:
    """Return whether the words' keys come before the image's, where both were concatenated on the way to ``keys``."""
    from_words = _descendants(words)
    seen, stack = {keys}, [keys]
    while stack:
        node = stack.pop()
        parts = node.args[0] if node.target is torch.cat else ()
        mixed = (
            [part in from_words for part in parts if isinstance(part, Node)] if isinstance(parts, tuple | list) else []
        )
        if any(mixed) and not all(mixed):
            return mixed[0]
        stack += [source for source in node.all_input_nodes if source not in seen and source in from_words]
        seen.update(stack)
    return False


def _descendants(node: Node) -> set[Node]:
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return seen
