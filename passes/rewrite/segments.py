"""Segments of blocks: tokens dropped in training, tokens pooled, and blocks chosen.

The module that owns the blocks is rewritten, with the blocks as they are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import nn
from torch.fx import Node

from moefx.graph.splice import Splice
from moefx.passes.analysis.segments import Member, SegmentLayout
from moefx.passes.analysis.site import Kind, Site
from moefx.passes.rewrite.base import Contract, Costs, Edit, Options, SegmentContext, SegmentPass, register_pass
from moefx.routing.segments import (
    BlockChoice,
    SparseTokens,
    TokenDrop,
    follow_shared,
    gate_block,
)
from moefx.routing.skip import block_of_some
from moefx.routing.tokens import follow, gather_tokens, put_tokens


class TokenDropOptions(Options):
    """Options of :class:`TokenDropPass`."""

    start: float = Field(2 / 12, ge=0, lt=1, description="where the segment begins, as a fraction of the blocks")
    end: float = Field(8 / 12, gt=0, le=1, description="where it ends")
    capacity: float = Field(0.5, gt=0, le=1, description="fraction of the tokens that go through it in training")

    @model_validator(mode="after")
    def _in_order(self) -> TokenDropOptions:
        if self.start >= self.end:
            raise ValueError(f"start = {self.start} is not before end = {self.end}")
        return self


class _Blocks(SegmentPass):
    """What the three passes have in common."""

    site_kind: ClassVar[Kind] = "block"
    requires = frozenset({"block-sites"})
    preserves = frozenset({"ffn-sites", "attention-sites", "block-sites"})

    def _device(self, context: SegmentContext) -> torch.device:
        return next((p.device for p in context.graph.root.parameters()), torch.device("cpu"))


@register_pass
class TokenDropPass(_Blocks):
    """Let a random part of the tokens go through a segment in training."""

    name = "token-drop"
    summary = "segment of blocks -> half of the tokens in training, all of them otherwise; exact"
    provides = frozenset({"dropped-tokens"})
    Options = TokenDropOptions
    options: TokenDropOptions

    def segments(self, layers: int) -> list[range]:
        """Return the one segment."""
        start = round(self.options.start * layers)
        return [range(start, max(start + 1, round(self.options.end * layers)))]

    def contract(self) -> Contract:
        """Exact in evaluation mode."""
        return Contract("exact", 0.0, "evaluation uses all tokens")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return nothing: inference is as it was."""
        return Costs(0, 0, 0, 0)

    def edit(self, context: SegmentContext) -> Edit:
        """Choose before the first block, let everything by token follow, and put the tokens back after the last."""
        layout, splice = context.layout, Splice(context.graph, self.name)
        x, first = context.node(layout.members[0].entries[0]), context.node(layout.members[0].call)
        drop = TokenDrop(self.options.capacity, per_sample=not layout.tables_are_shared)
        name = "token_drop"
        with x.meta["val"].fake_mode:
            value = torch.empty(x.meta["val"].shape[:2], dtype=torch.int64, device=x.meta["val"].device)
        index = splice.call_module(name, (x,), around=first, val=value)
        chosen = splice.call_function(gather_tokens, (x, index), around=first)
        first.replace_input_with(x, chosen)
        self._follow(context, splice, index, x)
        leave(context, splice, put_tokens, (x, index))
        return Edit(routed=drop, children={name: drop.train(context.graph.root.training)})

    def _follow(self, context: SegmentContext, splice: Splice, index: Node, x: Node) -> None:
        cuts: dict[str, Node] = {}
        for item in context.layout.follows:
            node, user = context.node(item.node), context.node(item.user)
            if item.node not in cuts:
                if context.layout.tables_are_shared:
                    args: tuple[Any, ...] = (node, index, x, item.axes, item.joint)
                    cuts[item.node] = splice.call_function(follow_shared, args, around=user)
                else:
                    args = (node, index, x, item.axes, item.ndim, item.joint)
                    cuts[item.node] = splice.call_function(follow, args, around=user)
            user.replace_input_with(node, cuts[item.node])


def leave(context: SegmentContext, splice: Splice, function: Any, before: tuple[Any, ...]) -> None:
    """Let all that reads what the segment returns read ``function(*before, it)``."""
    out = context.node(context.layout.members[-1].exits[0])
    users = list(out.users)
    merged = splice.call_function(function, (*before, out), around=out.next)
    for user in users:
        user.replace_input_with(out, merged)


class SparseSegmentOptions(Options):
    """Options of :class:`SparseSegment`."""

    side: int = Field(8, ge=1, description="side of the grid of sparse tokens")
    dense_first: int = Field(2, ge=1, description="blocks at the beginning that see all tokens")
    dense_last: int = Field(2, ge=1, description="blocks at the end that see all tokens")
    max_error: float = Field(2.0, gt=0, description="refuse a start further from the dense model than this")


@register_pass
class SparseSegment(_Blocks):
    """Run the blocks in the middle on pooled tokens."""

    name = "sparse-segment"
    summary = "blocks in the middle -> run on pooled tokens; the full stream is recovered after them"
    provides = frozenset({"pooled-tokens"})
    Options = SparseSegmentOptions
    options: SparseSegmentOptions

    def segments(self, layers: int) -> list[range]:
        """Return the blocks between the dense ones."""
        middle = range(self.options.dense_first, layers - self.options.dense_last)
        return [middle] if len(middle) else []

    def refusal(self, site: Site) -> str:
        """Return why the tokens cannot be pooled."""
        return super().refusal(site) or self._grid(site)

    def _grid(self, site: Site) -> str:
        total = int(site.shapes["x"][1])
        side = round(total**0.5)
        if side * side != total or side < self.options.side:
            return f"its {total} tokens are no square grid of at least {self.options.side} x {self.options.side}"
        return ""

    def layout_refusal(self, layout: SegmentLayout) -> str:
        """Return why pooled tokens would have no position."""
        return "its blocks read tables per token, which pooled tokens have no row of" if layout.follows else ""

    def contract(self) -> Contract:
        """The start leaves the segment out."""
        return Contract("approximate", self.options.max_error, "the blocks of the segment see pooled tokens")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the cost of the recovery, on the first block's account, and what that block saves."""
        width, total = int(site.shapes["x"][-1]), int(site.shapes["x"][1])
        saved = 1 - min(1.0, self.options.side**2 / total)
        return Costs(0, 2 * width * width + width, 0, 2 * width * width, saved_fraction=saved)

    def edit(self, context: SegmentContext) -> Edit:
        """Pool before the first block, recover after the last."""
        splice, layout = Splice(context.graph, self.name), context.layout
        x, first = context.node(layout.members[0].entries[0]), context.node(layout.members[0].call)
        value, out = x.meta["val"], context.node(layout.members[-1].exits[0])
        sparse = SparseTokens(int(value.shape[-1]), self.options.side, device=self._device(context))
        name = "sparse_tokens"
        with value.fake_mode:
            small = torch.empty((value.shape[0], self.options.side**2, value.shape[2]), dtype=value.dtype)
        pooled = splice.call_module(name, (x,), around=first, val=small)
        first.replace_input_with(x, pooled)
        users = list(out.users)
        full = splice.call_module(name, (x, out), around=out.next, val=value)
        for user in users:
            user.replace_input_with(out, full)
        like = next((p for p in context.graph.root.parameters() if p.is_floating_point()), None)
        routed = sparse if like is None else sparse.to(like.dtype)
        return Edit(routed=routed, children={name: routed.train(context.graph.root.training)})


class BlockChoiceOptions(Options):
    """Options of :class:`BlockChoicePass`."""

    group: int = Field(3, ge=2, description="consecutive blocks of a group")
    active: int = Field(2, ge=1, description="adjacent ones of them that run, per sample")
    dense_first: int = Field(0, ge=0, description="blocks at the beginning that always run")
    dense_last: int = Field(0, ge=0, description="blocks at the end that always run")
    capacity: float | None = Field(
        None, gt=0, le=1, description="most samples a block takes, as a share of the batch: shapes are fixed; None: all"
    )
    mix: float = Field(0.5, ge=0, le=1, description="share of the tokens in the score; the rest is the condition's")
    router_std: float = Field(0.02, ge=0, description="standard deviation of the router")
    max_error: float = Field(2.0, gt=0, description="refuse a start further from the dense model than this")

    @model_validator(mode="after")
    def _fewer(self) -> BlockChoiceOptions:
        if self.active > self.group:
            raise ValueError(f"active = {self.active} of only {self.group} blocks")
        return self


@register_pass
class BlockChoicePass(_Blocks):
    """Run some adjacent blocks of each group."""

    name = "block-choice"
    summary = "groups of blocks -> adjacent ones of each run, chosen per sample; exact while all run"
    provides = frozenset({"routed-blocks"})
    by_token = False
    Options = BlockChoiceOptions
    options: BlockChoiceOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The embedding of timestep and label or text, where there is one."""
        return ("condition",)

    def layout_refusal(self, layout: SegmentLayout) -> str:
        """Return why a block cannot run on a fixed number of samples."""
        if self.options.capacity is not None and any(member.rows is None for member in layout.members):
            return "which arguments of its blocks have a row per sample cannot be told"
        return ""

    def warnings(self) -> list[str]:
        """Warn of results that depend on the batch."""
        if self.options.capacity is None:
            return []
        return ["with a capacity, which samples pass a block by depends on the others of the batch"]

    def segments(self, layers: int) -> list[range]:
        """Return the groups."""
        o = self.options
        last = layers - o.dense_last
        return [range(i, i + o.group) for i in range(o.dense_first, last - o.group + 1, o.group)]

    def contract(self) -> Contract:
        """Exact if all blocks run."""
        if self.options.active == self.options.group:
            return Contract("exact", 0.0, "all blocks run")
        return Contract("approximate", self.options.max_error, "blocks are left out")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return the router's parameters, and the share of each block that samples leave out.

        Where shapes must not depend on the choice and there is no capacity, blocks run on all samples all the same.
        """
        o = self.options
        width = sum(int(entry.meta["val"].shape[-1]) for entry, _ in site.operands["streams"])
        windows = o.group - o.active + 1
        saved = 1 - min(o.active / o.group, 1.0 if o.capacity is None else o.capacity)
        return Costs(0, windows * (width + tap_width), 0, 0, saved_fraction=saved)

    def edit(self, context: SegmentContext) -> Edit:
        """Choose before the first block, and gate what each returns."""
        members, splice = context.layout.members, Splice(context.graph, self.name)
        first = context.node(members[0].call)
        streams = [_now(first, context.node(name)) for name in members[0].entries]
        taps = list(context.taps.values())
        router = BlockChoice(
            len(members),
            self.options.active,
            tuple(int(s.meta["val"].shape[-1]) for s in streams),
            condition_dim=int(taps[0].meta["val"].shape[-1]) if taps else 0,
            mix=self.options.mix,
            capacity=self.options.capacity,
            std=self.options.router_std,
            generator=context.generator("blocks"),
            device=self._device(context),
        )
        name = f"block_choice_{members[0].call}"
        value = streams[0].meta["val"]
        with value.fake_mode:
            shape = torch.empty((value.shape[0], len(members)), dtype=torch.float32, device=value.device)
        gates = splice.call_module(name, (*streams, *taps), around=first, val=shape)
        for i, member in enumerate(members):
            _may_skip(context, member, gates, i, self.options.capacity)
            for entry, exit_ in zip(member.entries, member.exits, strict=True):
                if exit_:
                    before = _now(context.node(member.call), context.node(entry))
                    self._gate(splice, before, context.node(exit_), gates, i)
        child: nn.Module = router.train(context.graph.root.training)
        return Edit(routed=child, children={name: child})

    def _gate(self, splice: Splice, before: Node, exit_: Node, gates: Node, block: int) -> None:
        users = list(exit_.users)
        gated = splice.call_function(gate_block, (before, exit_, gates, block), around=exit_.next)
        gated.meta["replaces"] = exit_
        for user in users:
            user.replace_input_with(exit_, gated)


def _now(call: Node, entry: Node) -> Node:
    """Return what a block reads where it read ``entry``: what an earlier block returned may have been gated since."""
    return next(n for n in call.all_input_nodes if n is entry or n.meta.get("replaces") is entry)


def _may_skip(context: SegmentContext, member: Member, gates: Node, block: int, capacity: float | None) -> None:
    """Say on the call of a block what may be called in its place, if its result holds streams and nothing else."""
    call = context.node(member.call)
    arguments: list[tuple[int | str, Any]] = [*enumerate(call.args), *call.kwargs.items()]
    read = [_now(call, context.node(entry)) for entry in member.entries]
    streams = [next((where for where, value in arguments if value is node), None) for node in read]
    exits = [context.node(name) if name else None for name in member.exits]
    alone = exits[0] is call
    places = () if alone else tuple(-1 if node is None else int(str(node.args[1])) for node in exits)
    others = [user for user in call.users if user not in exits] if not alone else []
    if None not in streams and not others and not (alone and len(exits) > 1):
        call.meta["instead"] = (block_of_some, (gates, block, capacity, tuple(streams), places, member.rows))
