"""Mixture of depths: a block runs on the tokens that need it, the others pass by.

Sources: Mixture-of-Depths, arXiv 2404.02258, per sample and without the causal predictor, which bidirectional models do
not need; γ-MoD, arXiv 2410.13859; p-MoD, arXiv 2412.04449. At capacity 1 and weights of 1 the block is the dense one to
the bit.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch.fx import Node

from moefx.passes.analysis.site import Kind, Site
from moefx.passes.analysis.tokens import TokenLayout
from moefx.passes.rewrite._on_tokens import Keys, Routed, run_on_tokens, set_output
from moefx.passes.rewrite.attention import refuse_core
from moefx.passes.rewrite.base import BlockContext, BlockPass, Contract, Costs, Edit, Options, register_pass
from moefx.passes.rewrite.ratios import STEPS, Ratio, steps
from moefx.routing.depths import TokenRouter, Weight, scale_tokens, weighted_update
from moefx.routing.timed_depths import TimedTokenRouter, passing
from moefx.routing.tokens import put_tokens

CHILD = "token_router"


class MixtureOfDepthsOptions(Options):
    """Options of :class:`MixtureOfDepths`."""

    capacity: float = Field(1.0, gt=0, le=1, description="fraction of the tokens that pass a block; 1: the exact start")
    capacity_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="over layers: from 1 down to the capacity, along a line or half a cosine cut at it"
    )
    warm_up: float = Field(0.0, ge=0, le=1, description="fraction of the training in which the capacity falls from 1")
    over_time: list[float] = Field(
        [], description="shares of the capacity by interval of the timestep, equal intervals from t = 0 up; empty: none"
    )
    timesteps: float = Field(1000.0, gt=0, description="raw timesteps are in [0, this); 1 if they are sigma")
    dense_above: float = Field(1.0, gt=0, le=1, description="blocks that the schedule gives more than this stay dense")
    dense_first: int = Field(0, ge=0, description="blocks at the beginning that stay dense")
    dense_last: int = Field(0, ge=0, description="blocks at the end that stay dense")
    weight: Weight = Field("identity", description="how the router's score becomes a token's weight")
    alpha: float = Field(0.2, gt=0, description="range of the weight 1 + alpha * tanh(score)")
    gate: Literal["update", "ffn"] = Field("update", description="what a selected token's weight multiplies")
    skipped: Literal["kept", "weighted"] = Field("kept", description="what happens to the tokens that pass by")
    keep_keys: bool = Field(False, description="skipped tokens stay keys and values of the block's attention")
    shared_router: bool = Field(False, description="one router for all blocks of a width")
    router_bias: bool = Field(True, description="give the router a bias, which starts its weights at 1")
    router_std: float = Field(0.0, ge=0, description="standard deviation of the router; 0: every weight is equal")
    ties: Literal["first", "spread"] = Field("first", description="which tokens equal scores select")
    losses: dict[str, float] = Field({}, description="coefficients of the terms balance, z and selection")
    max_error: float = Field(1.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching block (2 in the paper)")

    @model_validator(mode="after")
    def _shares(self) -> MixtureOfDepthsOptions:
        if any(not 0 < share <= 1 for share in self.over_time):
            raise ValueError(f"over_time = {self.over_time} must be shares in (0, 1]")
        if self.over_time and self.shared_router:
            raise ValueError("over_time needs routers of the blocks' own, and shared_router is on")
        return self

    def capacity_of(self, layer: int, layers: int) -> float:
        """Return the capacity of block number ``layer`` of ``layers``."""
        depth = layer / max(1, layers - 1)
        if self.capacity_schedule == "cosine":
            return max(self.capacity, math.cos(math.pi * depth) / 2 + 0.5)
        return 1 - depth * (1 - self.capacity) if self.capacity_schedule == "linear" else self.capacity


@register_pass
class MixtureOfDepths(BlockPass):
    """Let a router choose the tokens that pass a block."""

    name = "mixture-of-depths"
    summary = "block -> runs on its best tokens only; exact at capacity 1"
    site_kind: ClassVar[Kind] = "block"
    requires = frozenset({"block-sites"})
    provides = frozenset({"routed-tokens"})
    unit = "tokens"
    preserves = frozenset({"ffn-sites", "attention-sites"})
    Options = MixtureOfDepthsOptions
    options: MixtureOfDepthsOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep, if the capacity follows it."""
        return ("timestep",) if self.options.over_time else ()

    def accepts(self, tap: str, value: torch.Tensor) -> bool:
        """Return whether the timestep is a raw one: an embedding has no interval."""
        return value.ndim <= 1

    def refusal(self, site: Site) -> str:
        """Return why this block cannot skip tokens."""
        o, layer, layers = self.options, int(site.operands["layer"]), int(site.operands["layers"])
        if site.dead:
            return "its result feeds nothing that is returned"
        if not site.region_is_module:
            return "it is no module of its own"
        if len(site.shapes["x"]) != 3:
            return f"its stream has shape {tuple(site.shapes['x'])}, not [batch, tokens, width]"
        if layer < o.dense_first or layer >= layers - o.dense_last:
            return "dense_first and dense_last keep it dense"
        if o.capacity_of(layer, layers) > o.dense_above:
            return f"the schedule gives it {o.capacity_of(layer, layers):.3f} of its tokens, above {o.dense_above}"
        return ""

    def layout_refusal(self, layout: TokenLayout) -> str:
        """Return why a weight has no place on the feed-forward branch alone."""
        if self.options.gate == "ffn" and not layout.ffns:
            return "its feed-forward network is no module of its own, so that weights have no place there"
        return ""

    def attention_refusal(self, attention: Site) -> str:
        """Return why the attention's keys cannot be computed for more tokens than its queries."""
        return refuse_core(attention)

    @property
    def opens_attention(self) -> bool:
        """Whether the attention has to be written out."""
        return self.options.keep_keys

    def contract(self) -> Contract:
        """Exact when no token is skipped and every weight is 1."""
        o = self.options
        at_one = o.router_std == 0 and (o.weight == "one_plus_tanh" or (o.weight == "identity" and o.router_bias))
        if at_one and o.capacity == 1 and all(share == 1 for share in o.over_time):
            return Contract("exact", 0.0, "every token passes with weight 1")
        return Contract("approximate", o.max_error, "tokens are skipped or weighted")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the router's parameters and multiply-adds per token; what skipping saves is in ``saved_fraction``."""
        o, width = self.options, int(site.shapes["x"][-1])
        rows = 2 if o.weight == "probability" else 1
        bias = int(o.router_bias and o.weight != "probability")
        over_time = sum(o.over_time) / len(o.over_time) if o.over_time else 1.0
        saved = 1 - over_time * o.capacity_of(int(site.operands["layer"]), int(site.operands["layers"]))
        # Keys and values are 2 of the 12 D² that a block of usual proportions multiplies a token with.
        saved *= 5 / 6 if o.keep_keys else 1
        # A shared router is counted with the first block.
        own = not (o.shared_router and int(site.operands["layer"]))
        return Costs(0, own * (rows * width + bias), 0, rows * width, saved_fraction=saved)

    def ratios(self, site: Site) -> list[Ratio]:
        """Return shares of the tokens, in place of what a schedule over layers would give the block."""
        shares = [kept / STEPS for kept in steps(STEPS)]
        return [Ratio({"capacity": share, "capacity_schedule": "constant"}, share) for share in shares]

    def kept_first(self, losses: torch.Tensor) -> torch.Tensor:
        """Return the tokens to which the block adds most first."""
        return losses

    def edit(self, context: BlockContext) -> Edit:
        """Put the router in front of the block, and weigh and return what the block makes of its tokens."""
        o = self.options
        router = self._router(context)
        count = router.tokens(context.stream.meta["val"].shape[1])
        keys = Keys.of(context.graph) if o.keep_keys else None
        routed = run_on_tokens(context, self.name, CHILD, count, tuple(context.taps.values()))
        if keys is not None:
            keys.keep(routed)
        chosen_weights = routed.call(torch.gather, routed.weights, 1, routed.index, around=routed.chosen.next)
        after = routed.after
        if o.gate == "ffn":
            self._gate_ffns(context, routed, chosen_weights)
        else:
            after = routed.call(weighted_update, routed.chosen, after, chosen_weights)
        kept = routed.x if o.skipped == "kept" else routed.call(scale_tokens, routed.x, routed.weights)
        if routed.passes is not None:
            after = routed.call(passing, after, kept, routed.index, routed.passes)
        set_output(context, routed.call(put_tokens, kept, routed.index, after))
        return Edit(routed=router, children={CHILD: router})

    def _gate_ffns(self, context: BlockContext, routed: Routed, weights: Node) -> None:
        for branch in context.layout.ffns:
            node = context.node(branch.node)
            users = list(node.users)
            scaled = routed.call(scale_tokens, node, weights, around=node.next)
            for user in users:
                user.replace_input_with(node, scaled)

    def _router(self, context: BlockContext) -> TokenRouter:
        width = int(context.stream.meta["val"].shape[-1])
        if not self.options.shared_router:
            return self._new_router(context, width)
        key = f"router {width}"
        if key not in context.common:
            context.common[key] = self._new_router(context, width)
        found = context.common[key]
        assert isinstance(found, TokenRouter)
        return found

    def _new_router(self, context: BlockContext, width: int) -> TokenRouter:
        o, module = self.options, context.graph.root
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        options: dict[str, Any] = {
            "capacity": o.capacity_of(context.layer, context.layers),
            "weight": o.weight,
            "alpha": o.alpha,
            "bias": o.router_bias,
            "std": o.router_std,
            "ties": o.ties,
            "warm_up": o.warm_up,
            "losses": o.losses,
            "generator": context.generator("tokens"),
            "device": device,
        }
        if not o.over_time:
            return TokenRouter(width, **options).train(module.training)
        timed = TimedTokenRouter(width, o.over_time, steps=o.timesteps, alone=o.keep_keys, **options)
        return timed.train(module.training)
