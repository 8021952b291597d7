"""What all passes share that put one module in the place of a feed-forward network."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn

from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.base import Context, Edit, SitePass
from moefx.passes.rewrite.cut import cannot_cut, mixes_tokens, splice_ffn
from moefx.passes.rewrite.dense import unshare
from moefx.passes.rewrite.routing_build import accepts_tap, state_costs
from moefx.passes.rewrite.routing_options import RoutingOptions


class FFNPass(SitePass):
    """Replace an FFN by what `build` returns, as a module or inside the forward that it is written in."""

    site_kind: ClassVar[Kind] = "ffn"
    requires = frozenset({"ffn-sites"})
    preserves = frozenset({"attention-sites", "block-sites"})

    def refusal(self, site: Site) -> str:
        """Return why this FFN cannot be replaced."""
        if site.dead:
            return "its result feeds nothing that is returned; experts would waste memory and never learn"
        mixing = self.refuse_mixing(site) if mixes_tokens(site) else ""
        if mixing:
            return mixing
        if any(rate > 0 for rate in site.operands.get("dropout", ())):
            return "an active dropout inside it; set its rate to 0 first"
        return self.misfit(site) or ("" if site.region_is_module else cannot_cut(site))

    def refuse_mixing(self, site: Site) -> str:
        """Return why an FFN whose tokens are mixed inside cannot be replaced; ``""`` if it can."""
        return "a depthwise convolution between its projections mixes tokens"

    def misfit(self, site: Site) -> str:
        """Return why the options do not fit this FFN; ``""`` if they do."""
        return ""

    @abstractmethod
    def build(self, context: Context) -> nn.Module:
        """Return the module that stands where ``context.site`` stood."""

    def edit(self, context: Context) -> Edit:
        """Build the replacement, and wire it in where the FFN is not a module of its own."""
        routed = unshare(self.build(context), context.graph.root)
        if context.whole:
            return Edit(routed=routed)
        return Edit(routed=routed, children=splice_ffn(context, self.name, routed))


class RoutedFFNPass(FFNPass):
    """An `FFNPass` whose router and selector follow `RoutingOptions`."""

    options: RoutingOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """What router and selector read besides the token."""
        return self.options.taps

    @property
    def state_width(self) -> int:
        """The width of what its routers hand on, if they have memory."""
        o = self.options
        return {"none": 0, "recurrent": o.state_width}.get(o.state, o.groups)

    def state_costs(self, site: Site, layer: int, tap_width: int = 0) -> tuple[int, int]:
        """Return what memory adds to a router."""
        return state_costs(self.options, int(site.shapes["D"]), tap_width, layer)

    def accepts(self, tap: str, value: torch.Tensor) -> bool:
        """Intervals and tables need a raw timestep."""
        return accepts_tap(self.options, tap, value)
