"""Which heads and tokens of a graph can be told apart, and the values that their statistics are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.fx import Node

from moefx.graph import Graph
from moefx.passes.analysis import Facts, Site
from moefx.passes.calibration.parts import LEVELS, PartStatistics
from moefx.passes.rewrite.attention import count_heads, output_streams, refuse_heads

Groups = Callable[[Tensor], Tensor]


class PartSites:
    """The attentions and blocks of a graph whose parts are measured.

    Attributes:
        needs: nodes whose values `add` reads.
        ends: nodes whose gradients it reads, where there is a loss.
    """

    def __init__(self, facts: Facts) -> None:
        self.graph: Graph = facts.graph
        self.attentions = [s for s in facts.sites if s.kind == "attention" and not refuse_heads(s)]
        self.blocks = [s for s in facts.sites if s.kind == "block" and _has_tokens(s)]
        streams = [stream.out for site in self.attentions for stream in output_streams(site)]
        outputs = [out for out in streams if out is not None]
        steps = [_step(site) for site in self.blocks]
        self.needs: list[Node] = [*(out.pre for out in outputs), *(node for step in steps for node in step)]
        self.ends: list[Node] = [*(out.node for out in outputs), *(after for _, after in steps)]

    def add(
        self,
        found: dict[str, PartStatistics],
        groups: int,
        group_of: Groups,
        values: Mapping[Node, Any],
        gradients: Mapping[Node, Tensor],
    ) -> None:
        """Add one forward pass to the statistics, by site name.

        Args:
            found: statistics so far; changed.
            groups: G.
            group_of: maps ``[B, T, D]`` to the group of each of its tokens ``[B·T]``.
            values: of the nodes in ``needs``.
            gradients: of those in ``ends``, as far as a loss reaches them.
        """
        for site in self.attentions:
            made = found.get(site.name) or PartStatistics.empty(site.name, "heads", groups, count_heads(site))
            for stream in output_streams(site):
                assert stream.out is not None
                pre, gradient = values[stream.out.pre], gradients.get(stream.out.node)
                flat = None if gradient is None else gradient.reshape(-1, gradient.shape[-1])
                weight = stream.out.weight.tensor(self.graph)
                made = made.add_heads(pre.reshape(-1, pre.shape[-1]), weight, group_of(pre), flat)
            found[site.name] = made
        for site in self.blocks:
            made = found.get(site.name) or PartStatistics.empty(site.name, "tokens", groups, LEVELS)
            before, after = _step(site)
            update = values[after].detach() - values[before].detach()
            found[site.name] = made.add_tokens(update, group_of(update[:, :1]), gradients.get(after))


def _has_tokens(site: Site) -> bool:
    return not site.dead and len(site.shapes["x"]) == 3


def _step(site: Site) -> tuple[Node, Node]:
    """Return the main stream where it enters a block, and where it leaves it."""
    stream = site.operands["stream"]
    pair: tuple[Node, Node] = next(pair for pair in site.operands["streams"] if pair[0] is stream)
    return pair
