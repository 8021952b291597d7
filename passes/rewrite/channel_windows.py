"""Channel windows: every block reads some channels of its stream, which ones is a function of the timestep.

Source: Denoising Task Routing, arXiv 2310.07138. What a block does not see passes it by:
``block(x ⊙ M) + (1 − M) ⊙ x``. All blocks share one mask, made from the raw timestep in the forward of the module that
owns the blocks.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import nn
from torch.fx import Node

from moefx.graph.splice import Splice
from moefx.passes.analysis.segments import Member
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.base import Contract, Costs, Edit, Options, SegmentContext, SegmentPass, register_pass
from moefx.routing.masks import complement, masked
from moefx.routing.windows import ChannelWindow

CHILD = "channel_window"


class ChannelWindowsOptions(Options):
    """Options of :class:`ChannelWindows`."""

    share: float = Field(
        0.8, gt=0, le=1, description="share of the channels that a block reads; 1: all, the dense model"
    )
    alpha: float = Field(4.0, gt=0, description="how late the window moves on; 1: evenly over the timesteps")
    last_timestep: float = Field(999.0, gt=0, description="largest timestep the model is called with; 1 for sigma")
    max_error: float = Field(10.0, gt=0, description="refuse a start further from the dense model than this")


@register_pass
class ChannelWindows(SegmentPass):
    """Mask what blocks read of their stream."""

    name = "channel-windows"
    summary = "blocks -> read a window of channels that slides with the timestep; what they do not see passes by"
    site_kind: ClassVar[Kind] = "block"
    requires = frozenset({"block-sites"})
    provides = frozenset({"channel-windows"})
    preserves = frozenset({"ffn-sites", "attention-sites", "block-sites"})
    by_token = False
    Options = ChannelWindowsOptions
    options: ChannelWindowsOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep, raw."""
        return ("timestep",)

    def segments(self, layers: int) -> list[range]:
        """Return all blocks at once."""
        return [range(layers)]

    def refusal(self, site: Site) -> str:
        """Return why this block's stream has no channels to mask."""
        if len(site.shapes["x"]) != 3:
            return f"its stream has shape {tuple(site.shapes['x'])}, not [batch, tokens, width]"
        return super().refusal(site)

    def contract(self) -> Contract:
        """Exact while everything is seen."""
        if self.options.share == 1:
            return Contract("exact", 0.0, "every block reads all channels")
        return Contract("approximate", self.options.max_error, "blocks read some of the channels")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return nothing: a mask has no parameters and saves nothing."""
        return Costs(0, 0, 0, 0)

    def edit(self, context: SegmentContext) -> Edit:
        """Make the mask once, and put it around every block."""
        o, members, splice = self.options, context.layout.members, Splice(context.graph, self.name)
        x, tap = context.node(members[0].entries[0]), context.taps["timestep"]
        window = ChannelWindow(
            int(x.meta["val"].shape[-1]), share=o.share, alpha=o.alpha, last_timestep=o.last_timestep
        ).train(context.graph.root.training)
        value = x.meta["val"][:, :1]
        mask = splice.call_module(CHILD, (x, tap), around=context.node(members[0].call), val=value)
        for member in members:
            _around(context, splice, member, mask)
        children: dict[str, nn.Module | None] = {CHILD: window}
        return Edit(routed=window, children=children)


def _around(context: SegmentContext, splice: Splice, member: Member, mask: Node) -> None:
    """Mask the streams of one block, and add what it did not see to what it returns."""
    call = context.node(member.call)
    for entry, name in zip(member.entries, member.exits, strict=True):
        x = _now(call, context.node(entry))
        call.replace_input_with(x, splice.call_function(masked, (x, mask), around=call))
        if name:
            exit_ = context.node(name)
            users = list(exit_.users)
            total = splice.call_function(complement, (exit_, x, mask), around=exit_.next)
            for user in users:
                user.replace_input_with(exit_, total)


def _now(call: Node, entry: Node) -> Node:
    """Return what stands for ``entry`` among the arguments of a block: itself, or what the block before made of it."""
    return next(n for n in call.all_input_nodes if n is entry or (n.target is complement and n.args[0] is entry))
