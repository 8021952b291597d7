"""Attention mechanisms: full, local or coarse attention in the place of full attention, fixed or picked per head.

Sources: CLEAR, arXiv 2412.16112 (image tokens attend within a disc); VORTA, arXiv 2505.18809 (the timestep picks full,
windowed or coarse attention for each head). The projections, norms and embeddings around the attention stay untouched.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.fx import Node

from moefx.graph.splice import Splice
from moefx.passes.analysis import Facts
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.attention import core_call, refuse_core
from moefx.passes.rewrite.base import Context, Contract, Costs, Edit, Options, SitePass, register_pass
from moefx.passes.rewrite.thresholds import TIMESTEP_WIDTH
from moefx.passes.rewrite.token_grid import token_layouts
from moefx.routing.attention_masks import TokenGrid
from moefx.routing.attention_mechanisms import Attend, AttendCoarsely, AttendLocally, RoutedAttention
from moefx.routing.router import LinearRouter

CHILD = "attend"


class AttentionMechanismsOptions(Options):
    """Options of :class:`AttentionMechanisms`."""

    mechanisms: list[Literal["full", "disc", "window", "coarse"]] = Field(
        ["full", "window", "coarse"], min_length=1, description="one: fixed; several: the timestep picks one per head"
    )
    radius: float = Field(16.0, gt=0, description="reach of disc and window, in tokens; nearer than this is seen")
    bucket: int = Field(2, ge=1, description="coarse: tokens per axis that are averaged")
    grid: list[int] | None = Field(
        None, min_length=2, max_length=3, description="image tokens as [frames,] height, width; None: from the latents"
    )
    router_bias: float = Field(5.0, description="start of the router's bias for full attention")
    threshold: float = Field(0.5, ge=0, le=1, description="heads less decided than this attend fully in evaluation")
    losses: dict[str, float] | None = Field(None, description="coefficients of the auxiliary terms; None: the paper's")
    max_error: float = Field(2.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")
    layouts: dict[str, list[int]] = Field({}, description="where the image is among the tokens; found in planning")

    @model_validator(mode="after")
    def _falls_back(self) -> AttentionMechanismsOptions:
        if self.routed and (self.mechanisms[0] != "full" or len(set(self.mechanisms)) < len(self.mechanisms)):
            raise ValueError("several mechanisms begin with 'full', which heads fall back to, and differ")
        return self

    @property
    def routed(self) -> bool:
        """Whether the timestep picks."""
        return len(self.mechanisms) > 1


@register_pass
class AttentionMechanisms(SitePass):
    """Attend otherwise."""

    name = "attention-mechanisms"
    summary = "attention -> full, local or coarse attention among the image tokens, fixed or picked by the timestep"
    site_kind: ClassVar[Kind] = "attention"
    requires = frozenset({"attention-sites"})
    provides = frozenset({"attention-mechanisms"})
    preserves = frozenset({"ffn-sites", "block-sites"})
    Options = AttentionMechanismsOptions
    options: AttentionMechanismsOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep, if it picks."""
        return ("timestep",) if self.options.routed else ()

    def fitted(self, facts: Facts) -> Self:
        """Find the image among the tokens of every attention."""
        o = self.options
        return self if o.layouts else type(self)(**o.model_dump() | {"layouts": token_layouts(facts, o.grid)})

    def refusal(self, site: Site) -> str:
        """Return why this attention cannot be another."""
        if site.dead:
            return "its result feeds nothing that is returned"
        if site.flavour not in ("self", "joint"):
            return f"{site.flavour} attention: its keys are not its own tokens"
        problem = refuse_core(site)
        if problem:
            return problem
        if site.name not in self.options.layouts and set(self.options.mechanisms) != {"full"}:
            return "the grid of its image tokens is not known; pass grid=[height, width] of the model's image tokens"
        return ""

    def contract(self) -> Contract:
        """Exact where full attention serves, or everything is within reach."""
        o = self.options
        if o.routed and o.router_bias > 0:
            return Contract("exact", 0.0, "every head picks full attention")
        covers = all(o.radius > _diagonal(layout[2:]) for layout in o.layouts.values())
        if not o.routed and (o.mechanisms == ["full"] or ("coarse" not in o.mechanisms and covers)):
            return Contract("exact", 0.0, "every token is within reach")
        return Contract("approximate", o.max_error, "tokens do not attend to all others")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the router's parameters; the attention itself counts in no plan."""
        if not self.options.routed:
            return Costs(0, 0, 0, 0)
        rows = int(site.operands["q"].meta["val"].shape[1]) * len(self.options.mechanisms)
        return Costs(0, rows * ((tap_width or TIMESTEP_WIDTH) + 1), 0, 0)

    def edit(self, context: Context) -> Edit:
        """Let the attention of the local graph be another module's."""
        core: Node = context.site.operands["core"]
        call = core_call(core)
        attend = self._attend(context, call)
        name = context.free_name(CHILD)
        splice = Splice(context.graph, self.name)
        arguments = (call["query"], call["key"], call["value"], *context.taps.values())
        made = splice.call_module(name, arguments, around=core, val=core.meta["val"])
        splice.replace(core, made)
        attend.train(context.graph.root.training)
        return Edit(routed=attend, children={name: attend})

    def _attend(self, context: Context, call: dict[str, Any]) -> nn.Module:
        o, site = self.options, context.site
        before, after, *sizes = o.layouts.get(context.name, [0, 0, 1, 1])
        grid = TokenGrid(before, after, tuple(sizes))
        same: dict[str, Any] = {"scale": call.get("scale"), "grouped": bool(call.get("enable_gqa", False))}
        made: dict[str, Any] = {
            "full": lambda: Attend(**same),
            "disc": lambda: AttendLocally(grid, o.radius, **same),
            "window": lambda: AttendLocally(grid, o.radius, round_=False, **same),
            "coarse": lambda: AttendCoarsely(grid, o.bucket, **same),
        }
        mechanisms = [made[name]() for name in o.mechanisms]
        if not o.routed:
            return mechanisms[0]  # type: ignore[no-any-return]
        tap = context.taps["timestep"].meta["val"]
        raw, heads = tap.ndim <= 1, int(site.operands["q"].meta["val"].shape[1])
        router = LinearRouter(
            0,
            heads * len(mechanisms),
            tap_dim=TIMESTEP_WIDTH if raw else int(tap.shape[-1]),
            embed_timestep=raw,
            bias=True,
            device=next(context.graph.root.parameters()).device,
        )
        assert router.bias is not None
        with torch.no_grad():
            router.bias[:: len(mechanisms)] = o.router_bias
        routed = RoutedAttention(router, mechanisms, heads, threshold=o.threshold)
        if o.losses is not None:
            routed.record.coefficients = dict(o.losses)
        return routed


def _diagonal(sizes: list[int]) -> float:
    return math.sqrt(sum((size - 1) ** 2 for size in sizes))
