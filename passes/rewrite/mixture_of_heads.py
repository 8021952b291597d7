"""Mixture of heads: a gate for every attention head, in front of the output projection.

Sources: MoH, arXiv 2410.11842, with the scale factors of the released code, and its continue-tuning variant (heads
chosen by the length of their queries); DyDiT, arXiv 2410.03456 (heads switched by the timestep). Each has a start at
which every gate is exactly 1 and the attention is the dense one.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import nn
from torch.fx import Node

from moefx.graph.splice import Splice
from moefx.passes.analysis.attention import Stream
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.attention import (
    attention_macs,
    count_heads,
    first_node,
    gate_core,
    gates_fit_core,
    gates_of,
    multiply_heads,
    output_streams,
    reader,
    refuse_heads,
    refuse_queries,
    split_heads,
    tokens_of,
)
from moefx.passes.rewrite.base import Context, Contract, Costs, Edit, SitePass, register_pass
from moefx.passes.rewrite.ratios import Ratio, steps
from moefx.passes.rewrite.thresholds import TIMESTEP_WIDTH, ThresholdOptions, threshold_gate
from moefx.routing.heads import HeadGate, QueryGate

CHILD = "head_gate"


class MixtureOfHeadsOptions(ThresholdOptions):
    """Options of :class:`MixtureOfHeads`."""

    router_input: Literal["token", "query", "timestep"] = Field(
        "token", description="what chooses the heads: the token, the length of its queries, or the timestep"
    )
    shared_heads: int | float = Field(0, ge=0, description="heads that are always on: how many, or below 1.0 a share")
    active_heads: int | float | None = Field(
        None, ge=0, description="routed heads per token: how many, or a share of all; None: all, the exact start"
    )
    router_std: float = Field(0.0, ge=0, description="standard deviation of the routers; 0: gates of exactly 1")
    max_error: float = Field(1.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")

    @model_validator(mode="after")
    def _some_head(self) -> MixtureOfHeadsOptions:
        if self.router_input != "timestep" and self.shared_heads == 0 and self.active_heads == 0:
            raise ValueError("no head is active: shared_heads and active_heads are both 0")
        if self.router_input == "timestep" and (self.shared_heads != 0 or self.active_heads is not None):
            raise ValueError("heads switched by the timestep have a budget, no shared_heads and active_heads")
        for name, value in (("shared_heads", self.shared_heads), ("active_heads", self.active_heads)):
            if isinstance(value, float) and value > 1:
                raise ValueError(f"{name} = {value} is no share; use an integer for a number of heads")
        return self

    def counts(self, heads: int) -> tuple[int, int | None]:
        """Return how many of ``heads`` are shared, and how many routed ones are active (None: all)."""
        shared, active = self.shared_heads, self.active_heads
        return _count(shared, heads), None if active is None else _count(active, heads)


def _count(wanted: int | float, heads: int) -> int:
    return wanted if isinstance(wanted, int) else round(wanted * heads)


@register_pass
class MixtureOfHeads(SitePass):
    """Gate the heads of an attention."""

    name = "mixture-of-heads"
    summary = "attention -> a gate per head before the output projection; exact while all heads are on"
    site_kind: ClassVar[Kind] = "attention"
    requires = frozenset({"attention-sites"})
    provides = frozenset({"routed-heads"})
    unit = "heads"
    preserves = frozenset({"ffn-sites", "block-sites"})
    Options = MixtureOfHeadsOptions
    options: MixtureOfHeadsOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep, if it chooses the heads."""
        return ("timestep",) if self.options.router_input == "timestep" else ()

    def refusal(self, site: Site) -> str:
        """Return why the heads of this attention cannot be gated."""
        o, problem = self.options, refuse_heads(site)
        if problem:
            return problem
        heads = count_heads(site)
        if o.router_input == "timestep":
            return "" if heads > 1 else "it has a single head, which stays on"
        shared, active = o.counts(heads)
        if shared + (active or 0) > heads:
            return f"{shared} shared and {active} routed heads of only {heads}"
        if shared + (1 if active is None else active) == 0:
            return f"no head of {heads} would be active"
        return refuse_queries(site) if o.router_input == "query" else ""

    def contract(self) -> Contract:
        """Exact at the identity start."""
        o = self.options
        if o.router_input == "timestep":
            return o.threshold_contract("head")
        if o.active_heads is None and (o.router_std == 0 or o.router_input == "query"):
            return Contract("exact", 0.0, "all heads active, and gates of 1")
        return Contract("approximate", o.max_error, "heads are dropped or weighted")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the gates' parameters, and the multiply-adds per token of the heads that are on, and of the gates.

        A head that the timestep switches off needs nothing, and as many are off as the budget asks for. A head that is
        off for a token still is there for the others as keys and values. Its query and its columns of the output
        projection count as left out, since their product is zero; they are computed until the weights are cut.
        """
        o, heads = self.options, count_heads(site)
        by_query, by_key = (macs / tokens_of(site) for macs in attention_macs(site))
        dense = round(by_query + by_key)
        if o.router_input == "timestep":
            gate = (heads - 1) * ((tap_width or TIMESTEP_WIDTH) + 1)
            return Costs(0, gate, dense, round((by_query + by_key) * o.expected_share))
        shared, active = o.counts(heads)
        on = heads if active is None else shared + active
        compute = round(by_query * on / heads + by_key)
        if o.router_input == "query":
            return Costs(0, 0, dense, compute)
        width = int(site.shapes["x"][-1])
        routed = heads - shared if active != 0 else 0
        gate = width * (shared + routed + (2 if shared and routed else 0)) * len(output_streams(site))
        return Costs(0, gate, dense, compute + gate)

    def ratios(self, site: Site) -> list[Ratio]:
        """Return numbers of heads that are on."""
        o, heads = self.options, count_heads(site)
        if o.router_input == "timestep":
            return [Ratio({"budget": on / heads}, on / heads) for on in steps(heads)]
        shared = o.counts(heads)[0]
        return [Ratio({"active_heads": on - shared}, on / heads) for on in steps(heads) if on > shared]

    def edit(self, context: Context) -> Edit:
        """Insert the gates into the local graph."""
        splice = Splice(context.graph, self.name)
        children = self._switch(context, splice) if self.taps else self._per_token(context, splice)
        for gate in children.values():
            assert gate is not None
            gate.train(context.graph.root.training)
        return Edit(routed=nn.ModuleDict({k: v for k, v in children.items() if v is not None}), children=children)

    def _per_token(self, context: Context, splice: Splice) -> dict[str, nn.Module | None]:
        """Give each token stream its own gate; where most are zero, the attention leaves out those heads."""
        children: dict[str, nn.Module | None] = {}
        heads, site = count_heads(context.site), context.site
        streams = sorted(output_streams(site), key=lambda s: s.q.offset if s.q else 0)
        shared, active = self.options.counts(heads)
        # On a CPU a query and head alone cost 1.1 to 1.3 times their share of one call for all (12 heads).
        sparse = active is not None and 2 * (shared + active) <= heads and gates_fit_core(context)
        made: list[Node] = []
        for i, stream in enumerate(streams):
            name = context.free_name(CHILD, children)
            children[name] = self._gate(context, stream, i)
            around = site.operands["core"] if sparse else reader(stream)
            assert stream.q is not None
            by_query = self.options.router_input == "query"
            argument = split_heads(splice, stream.q, heads, around=around) if by_query else stream.x
            made.append(gates_of(splice, name, (argument,), heads, around=around))
        if sparse:
            gate_core(splice, site, made)
        else:
            for stream, gates in zip(streams, made, strict=True):
                multiply_heads(splice, stream, gates)
        return children

    def _gate(self, context: Context, stream: Stream, index: int) -> nn.Module:
        o, heads = self.options, count_heads(context.site)
        shared, active = o.counts(heads)
        device = next(context.graph.root.parameters()).device
        if o.router_input == "query":
            return o.with_losses(QueryGate(heads, shared=shared, top_k=active, device=device))
        gate = HeadGate(
            int(stream.x.meta["val"].shape[-1]),
            heads,
            shared=shared,
            top_k=active,
            std=o.router_std,
            generator=context.generator(f"heads{index}"),
            device=device,
        )
        return o.with_losses(gate)

    def _switch(self, context: Context, splice: Splice) -> dict[str, nn.Module | None]:
        """Give all token streams one gate: a head that is off is off in all, with its keys and values."""
        heads, streams = count_heads(context.site), output_streams(context.site)
        name = context.free_name(CHILD)
        around = first_node([reader(stream) for stream in streams])
        gates = gates_of(splice, name, (streams[0].x, context.taps["timestep"]), heads, around=around)
        gates.meta["val"] = gates.meta["val"][:, :1]
        for stream in streams:
            multiply_heads(splice, stream, gates)
        return {name: threshold_gate(self.options, context, heads, cost=sum(attention_macs(context.site)))}
