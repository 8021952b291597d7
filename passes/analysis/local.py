"""Sites of one module captured alone: the residual add may lie outside it, so it is not demanded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.fx import Node

from moefx.passes.analysis import Facts
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.streams import Residual, Streams

if TYPE_CHECKING:
    from moefx.graph import Graph


class _LocalStreams(Streams):
    def residual(self, branch: Node, source: Node) -> Residual | None:
        """Return the residual add, or the branch itself where the add lies outside the captured module."""
        return super().residual(branch, source) or Residual(branch, source)


def weight_names(site: Site) -> tuple[str, ...]:
    """Return the parameters of a site, all token streams of an attention included: they identify it in any graph."""
    streams = site.operands["streams"] if site.kind == "attention" else ()
    # Which stream is the main one, and so whose biases are named, depends on the graph around: leave biases out.
    names = set() if streams else {weight.fqn for weight in site.weights().values()}
    for stream in streams:
        parts = [part for part in (stream.q, stream.k, stream.v, stream.out) if part is not None]
        names |= {part.weight.fqn for part in parts}
    return tuple(sorted(names))


def local_sites(graph: Graph) -> list[Site]:
    """Return the sites of a local graph, in program order.

    Whether they are sites was decided on the whole model; here they only need to be found again.
    """
    facts = Facts(graph)
    facts.context.streams = _LocalStreams(facts.context.flow)
    return facts.sites
