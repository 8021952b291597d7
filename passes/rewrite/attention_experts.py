"""Attention experts: copies of an attention's query and output projections, routed per token over shared keys.

Source: JetMoE, arXiv 2404.07413. Equal copies whose gates sum to one compute what the dense attention computes. The
part of the graph from the queries to the output projection is repeated once per slot, whatever is in it: norms, rotary
embeddings, masks, two streams in one attention.
"""

from __future__ import annotations

import operator
from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.fx import Node

from moefx.graph.splice import Splice, is_inplace
from moefx.passes.analysis.attention import Stream
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.attention import (
    between,
    count_heads,
    first_node,
    output_streams,
    reader,
    refuse_heads,
    refuse_queries,
)
from moefx.passes.rewrite.base import Context, Contract, Costs, Edit, Options, SitePass, register_pass
from moefx.routing.attention_experts import OutputExperts, QueryExperts
from moefx.routing.initialise import normal_rows
from moefx.routing.normalise import SUM_TO_ONE, default_mode
from moefx.routing.router import LinearRouter

QUERIES, OUTPUTS = "query_experts", "output_experts"


class AttentionExpertsOptions(Options):
    """Options of :class:`AttentionExperts`."""

    experts: int = Field(8, ge=1, le=65536, description="number of attention experts E")
    top_k: int = Field(2, ge=1, le=16, description="experts per token K; the attention runs once for each")
    normalise: str | None = Field(None, description="gate normalisation by name; None: exact and trainable")
    router_std: float = Field(0.02, ge=0, description="standard deviation of the router's rows")
    noise: float = Field(0.0, ge=0, description="noise on each expert, relative to the std of its matrices")
    losses: dict[str, float] | None = Field(None, description="coefficients of the auxiliary terms; None: the paper's")
    max_error: float = Field(1.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")

    @model_validator(mode="after")
    def _enough_experts(self) -> AttentionExpertsOptions:
        if self.top_k > self.experts:
            raise ValueError(f"top_k = {self.top_k} of only {self.experts} experts")
        if self.normalise == "one_plus_su" or (self.normalise == "soft" and self.top_k != self.experts):
            raise ValueError(f"{self.normalise!r} is no mode for {self.top_k} of {self.experts} attention experts")
        return self

    @property
    def mode(self) -> str:
        """The normalisation mode in force."""
        return self.normalise or default_mode(self.experts, self.top_k)


@register_pass
class AttentionExperts(SitePass):
    """Give an attention experts with queries and outputs of their own."""

    name = "attention-experts"
    summary = "attention -> routed copies of its query and output projections over shared keys and values"
    site_kind: ClassVar[Kind] = "attention"
    requires = frozenset({"attention-sites"})
    provides = frozenset({"routed-attention"})
    preserves = frozenset({"ffn-sites", "block-sites"})
    Options = AttentionExpertsOptions
    options: AttentionExpertsOptions

    def refusal(self, site: Site) -> str:
        """Return why this attention cannot have experts."""
        problem = refuse_heads(site) or refuse_queries(site)
        if problem:
            return problem
        for stream in output_streams(site):
            assert stream.out is not None
            around = reader(stream)
            if around is not stream.out.node and set(around.users) != {stream.out.node}:
                return "its shared output projection does not read a plain concatenation"
        return ""

    def contract(self) -> Contract:
        """Exact for equal copies whose gates sum to one."""
        o = self.options
        sums_to_one = o.mode in SUM_TO_ONE or (o.top_k == 1 and o.mode in ("ste", "unit"))
        if sums_to_one and o.noise == 0:
            return Contract("exact", 0.0, "equal copies whose gates sum to one")
        return Contract("approximate", o.max_error, "the experts differ, or their gates do not sum to one")

    def warnings(self) -> list[str]:
        """Warn of a router that cannot learn."""
        o = self.options
        if o.experts == 1 or o.noise or o.mode not in SUM_TO_ONE:
            return []
        return [
            "equal attention experts under renormalised gates give the router exactly zero task gradient until they "
            "differ: train with moefx.aux_loss, or start with noise=1e-3, or use top_k=1"
        ]

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and multiply-adds per token of the main stream, projections and attention."""
        o, keys = self.options, site.operands["k"].meta["val"]
        inner = count_heads(site) * int(site.shapes["head_dim"])
        width = int(site.shapes["x"][-1])
        kept = keys.numel() // (int(keys.shape[0]) * int(site.shapes["kv_heads"]) * int(site.shapes["head_dim"]))
        matrices = sum(_matrices(stream, inner) for stream in output_streams(site))
        biases = sum(inner for s in output_streams(site) if s.q is not None and s.q.bias is not None)
        router = o.experts * width * len(output_streams(site))
        slot = _matrices(output_streams(site)[-1], inner) + 2 * inner * int(kept)
        return Costs(
            matrices + biases,
            o.experts * (matrices + biases) + router,
            slot,
            o.top_k * slot + o.experts * width,
        )

    def edit(self, context: Context) -> Edit:
        """Route the queries, repeat the attention per slot, and route the outputs."""
        streams, k = output_streams(context.site), self.options.top_k
        splice = Splice(context.graph, self.name)
        children: dict[str, nn.Module | None] = {}
        queries: list[Node] = []
        for i, stream in enumerate(streams):
            assert stream.q is not None
            name = context.free_name(QUERIES, children)
            children[name] = self._query_experts(context, stream, i)
            queries.append(_call_queries(splice, stream, name, k))
        region = between([s.q.value for s in streams if s.q], [s.out.pre for s in streams if s.out])
        concatenations = [reader(stream) for stream in streams]
        attended = [self._slot(splice, streams, region, queries, j) for j in range(k)]
        for i, stream in enumerate(streams):
            assert stream.out is not None
            name = context.free_name(OUTPUTS, children)
            results = [slot[i] for slot in attended]
            children |= self._output(context, splice, stream, (name, i), queries[i], results)
        splice.sweep([*region, *concatenations])
        splice.sweep(node for node in context.site.nodes if not is_inplace(node))
        for child in children.values():
            assert child is not None
            child.train(context.graph.root.training)
        return Edit(routed=nn.ModuleDict({k: v for k, v in children.items() if v is not None}), children=children)

    def _query_experts(self, context: Context, stream: Stream, index: int) -> QueryExperts:
        o, part = self.options, stream.q
        assert part is not None
        weight = part.weight.tensor(context.graph).detach()
        bias = part.bias.tensor(context.graph).detach() if part.bias is not None else None
        router = LinearRouter(int(weight.shape[1]), o.experts, std=0.0, device=weight.device)
        assert router.weight is not None
        with torch.no_grad():
            rows = normal_rows(o.experts, weight.shape[1], context.generator(f"router{index}"), std=o.router_std)
            router.weight.copy_(rows)
        copies = None if bias is None else bias.expand(o.experts, -1).clone()
        made = QueryExperts(
            router, self._copies(context, weight, f"queries{index}"), copies, top_k=o.top_k, mode=o.mode
        )
        if o.losses is not None:
            made.record.coefficients = dict(o.losses)
        return made

    def _copies(self, context: Context, weight: Tensor, purpose: str) -> Tensor:
        """Return E copies of a matrix, with noise where asked for."""
        o = self.options
        copies = weight.expand(o.experts, *weight.shape).clone()
        if o.noise:
            draws = torch.randn(copies.shape, generator=context.generator(purpose))
            copies += (o.noise * weight.float().std() * draws.to(weight.device)).to(weight.dtype)
        return copies

    def _slot(
        self, splice: Splice, streams: list[Stream], region: list[Node], queries: list[Node], slot: int
    ) -> list[Node]:
        """Repeat everything between the queries and the output projections with the queries of one slot."""
        around = first_node([reader(stream) for stream in streams])
        swap: dict[Node, Node] = {}
        for stream, call in zip(streams, queries, strict=True):
            assert stream.q is not None
            q = splice.call_function(operator.getitem, (call, 3 + slot), around=around)
            shape = tuple(int(size) for size in stream.q.lane.rows.shape)
            swap[stream.q.value] = splice.call_function(lay_out, (q, shape, tuple(stream.q.lane.dims)), around=around)
        for node in region:
            swap[node] = splice.copy(node, swap, around=around)
        return [swap[stream.out.pre] for stream in streams if stream.out]

    def _output(
        self,
        context: Context,
        splice: Splice,
        stream: Stream,
        place: tuple[str, int],
        query: Node,
        attended: list[Node],
    ) -> dict[str, nn.Module | None]:
        """Let routed outputs take the place of the projection, or of its part that belongs to the attention."""
        out, (name, index) = stream.out, place
        assert out is not None
        weight = out.weight.tensor(context.graph).detach()
        bias = out.bias.tensor(context.graph).detach().clone() if out.bias is not None else None
        around = reader(stream)
        shared = around is not out.node
        choice = [splice.call_function(operator.getitem, (query, i), around=out.node) for i in range(3)]
        y = splice.call_module(name, (*choice, *attended), around=out.node, val=out.node.meta["val"])
        experts = OutputExperts(self._copies(context, weight, f"outputs{index}"), None if shared else bias)
        children: dict[str, nn.Module | None] = {name: experts}
        if shared:
            target = str(out.node.target)
            others = [part for part in around.all_input_nodes if part is not out.pre]
            source = others[0] if len(others) == 1 else splice.call_function(torch.cat, (others, -1), around=out.node)
            kept = splice.call_module(target, (source,), around=out.node, val=out.node.meta["val"])
            y = splice.call_function(operator.add, (kept, y), around=out.node)
            children[target] = _kept_columns(context, stream)
        splice.replace(out.node, y)
        return children


def _matrices(stream: Stream, inner: int) -> int:
    assert stream.out is not None
    return inner * (int(stream.x.meta["val"].shape[-1]) + int(stream.out.node.meta["val"].shape[-1]))


def _call_queries(splice: Splice, stream: Stream, name: str, slots: int) -> Node:
    """Insert the call of a stream's query experts where its dense queries are complete."""
    assert stream.q is not None
    value, around = stream.q.value.meta["val"], stream.q.value.next
    tokens = stream.x.meta["val"]
    with tokens.fake_mode:
        count = tokens.numel() // tokens.shape[-1]
        made = [torch.empty(count * slots, dtype=torch.int64, device=value.device), torch.empty(2, dtype=torch.int64)]
        made += [torch.empty(count, slots, device=value.device)]
        made += [value.new_empty(*tokens.shape[:-1], stream.q.width) for _ in range(slots)]
    return splice.call_module(name, (stream.x,), around=around, val=tuple(made))


def lay_out(q: Tensor, shape: tuple[int, ...], dims: tuple[int, ...]) -> Tensor:
    """Give queries ``[B, T, N]`` the layout of the dense ones: features of ``shape`` along dimensions ``dims``."""
    split = q.reshape(*q.shape[:2], *shape)
    return split.movedim(tuple(range(-len(dims), 0)), dims)


def _kept_columns(context: Context, stream: Stream) -> nn.Linear:
    """Return the columns of a shared output projection that are not the attention's, with its bias."""
    out = stream.out
    assert out is not None
    dense = context.graph.root.get_submodule(str(out.node.target))
    assert isinstance(dense, nn.Linear)
    assert isinstance(out.weight.cols, slice)
    start, stop, _ = out.weight.cols.indices(dense.in_features)
    rest = torch.cat([dense.weight.detach()[:, :start], dense.weight.detach()[:, stop:]], dim=1)
    linear = nn.Linear(rest.shape[1], dense.out_features, bias=dense.bias is not None, device="meta")
    linear.weight = nn.Parameter(rest)
    if dense.bias is not None:
        linear.bias = nn.Parameter(dense.bias.detach().clone())
    return linear
