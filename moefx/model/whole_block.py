"""Planning rewrites of whole blocks and of segments of them: which of their arguments follow their tokens."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.errors import CaptureError
from moefx.graph import Graph, ModuleCall
from moefx.model.captures import Captures
from moefx.model.forward import make_forward
from moefx.model.local import JSON, call_inputs, encode, local_graph
from moefx.model.plan import TapPlan
from moefx.model.taps import choose_tap
from moefx.passes.analysis import Facts
from moefx.passes.analysis.blocks import structure
from moefx.passes.analysis.samples import rows_per_sample
from moefx.passes.analysis.segments import SegmentLayout, segment_layout
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.tokens import (
    MORE,
    Follow,
    NeedsInside,
    NotByToken,
    TokenLayout,
    mixes_neighbours,
    token_axes,
    token_layout,
)
from moefx.routing.tokens import Joint

_MOST_EXPANSIONS = 4


def plan_whole_block(facts: Facts, site: Site, call: ModuleCall | None, opened: Sequence[str] = ()) -> dict[str, Any]:
    """Return the fields of a block's plan that say where it is realised and where its tokens are.

    Children in ``opened`` are written out in its graph in any case.

    Raises:
        NotByToken: it cannot run on some of its tokens.
        CaptureError, PlanError: it cannot be captured alone.
    """
    graph = facts.graph
    if call is None:
        raise NotByToken("it is no module of its own")
    if sum(c.path == site.path for c in graph.calls) > 1:
        raise NotByToken(f"{site.path!r} is called more than once in one forward")
    mixed = mixes_neighbours(site, graph)
    if mixed:
        raise NotByToken(mixed)
    outputs = pytree.tree_leaves(call.output)
    output = next((i for i, leaf in enumerate(outputs) if leaf is site.output), None)
    if output is None:
        raise NotByToken("it does not return its token stream as it is")
    inputs = call_inputs(call)
    known = facts.graph.facts.setdefault("token layouts", {})
    key = (call.type_name, str(inputs), structure(facts.context.flow, call.nodes), tuple(opened))
    if key not in known:
        known[key] = _Block(facts, site, call, inputs).layout(output, opened)
    else:
        make_forward(Captures.of(graph).see(site.path, inputs, known[key][1]))
    layout, expand = known[key]
    return {"block": site.path, "block_inputs": inputs, "tokens": layout, "expand": expand}


def plan_segment(
    facts: Facts, wanted: range, root_inputs: JSON, taps: Sequence[str], *, by_token: bool
) -> dict[str, Any]:
    """Return the fields of a segment's plan: the module that owns its blocks, and where their tokens are in its graph.

    Taps that the owner does not see are left out.

    Raises:
        NotByToken: the blocks cannot be routed together.
        CaptureError, PlanError: their owner cannot be rewritten faithfully.
    """
    sites = [s for s in facts.sites if s.kind == "block" and s.role == "main" and not s.dead]
    sites = sorted((s for s in sites if s.operands["layer"] in wanted), key=lambda s: int(s.operands["layer"]))
    owner = _owner(facts.graph.root, [s.path for s in sites])
    calls = [c for c in facts.graph.calls if c.path == owner] if owner else []
    if owner and len(calls) != 1:
        raise NotByToken(f"{owner!r} is called {len(calls)} times in one forward")
    inputs = call_inputs(calls[0]) if owner else root_inputs
    local = Captures.of(facts.graph).see(owner, inputs)
    make_forward(local)
    blocks = []
    for site in sites:
        call = next(c for c in facts.graph.calls if c.path == site.path and c.index == site.call_index)
        path = site.path.removeprefix(f"{owner}." if owner else "")
        blocks.append((path, site, call, _followers(facts, site, call) if by_token else {}))
    layout = segment_layout(local, blocks, None if by_token else _rows(facts, [block[2] for block in blocks]))
    found = [_tap(name, facts, calls[0] if owner else None, local, layout) for name in taps]
    return {
        "block": owner,
        "block_inputs": inputs,
        "segment": layout,
        "taps": tuple(tap for tap in found if tap is not None),
    }


def _rows(facts: Facts, calls: Sequence[ModuleCall]) -> set[Node] | None:
    """Return which arguments of blocks have one row per sample; None if that cannot be told."""
    leaves = {leaf for call in calls for leaf in pytree.tree_leaves((call.args, call.kwargs)) if _is_tensor(leaf)}
    inputs = [p.meta["val"] for p in facts.context.flow.placeholders if _is_tensor(p) and p.meta["val"].ndim > 1]
    return rows_per_sample(facts.context.flow, leaves, int(inputs[0].shape[0])) if inputs else None


def _owner(root: nn.Module, paths: Sequence[str]) -> str:
    """Return the smallest module around all ``paths`` that has a forward of its own."""
    parents = [path.split(".")[:-1] for path in paths]
    shared = [parts[0] for parts in itertools.takewhile(lambda p: len(set(p)) == 1, zip(*parents, strict=False))]
    while shared and isinstance(root.get_submodule(".".join(shared)), nn.ModuleList | nn.ModuleDict | nn.Sequential):
        shared.pop()
    return ".".join(shared)


def _followers(facts: Facts, site: Site, call: ModuleCall) -> dict[Node, Follow]:
    """Return the arguments of a block that follow its tokens."""
    layout: TokenLayout = plan_whole_block(facts, site, call)["tokens"]
    joint: Joint = next((f.joint for f in layout.follows if f.joint), "")
    total = site.shapes["x"][1]
    found = {}
    for leaf, axes in _Block(facts, site, call, call_inputs(call)).axes.items():
        value = leaf.meta["val"]
        back = tuple(axis - value.ndim for axis in axes)
        longer = any(value.shape[axis] != total for axis in axes)
        found[leaf] = Follow(leaf.name, "", back, value.ndim, joint if longer else "")
    return found


def _tap(name: str, facts: Facts, call: ModuleCall | None, local: Graph, layout: SegmentLayout) -> TapPlan | None:
    """Return the plan of a tap if its value is there before the segment begins."""
    node = choose_tap(name, facts, call, local)
    if node is None:
        return None
    for earlier in local.fx.nodes:
        if earlier is node:
            value = node.meta["val"]
            return TapPlan(name=name, node=node.name, rank=value.ndim, width=value.shape[-1])
        if earlier.name == layout.members[0].call:
            break
    return None


class _Block:
    def __init__(self, facts: Facts, site: Site, call: ModuleCall, inputs: JSON) -> None:
        self.facts, self.site, self.call, self.inputs = facts, site, call, inputs
        self.module = facts.graph.root.get_submodule(site.path)
        self.axes = dict(self._following())

    def _following(self) -> Iterator[tuple[Node, tuple[int, ...]]]:
        """Yield the arguments with an entry per token, and on which axes."""
        stream: torch.Tensor = self.site.operands["stream"].meta["val"]
        entries = [entry for entry, _ in self.site.operands["streams"]]
        leaves = [leaf for leaf in pytree.tree_leaves((self.call.args, self.call.kwargs)) if _is_tensor(leaf)]
        others = {entry.meta["val"].shape[1] for entry in entries if entry is not self.site.operands["stream"]}
        others |= {leaf.meta["val"].shape[1] for leaf in leaves if self._is_text(leaf)}
        for leaf in leaves:
            if leaf not in entries and not self._is_text(leaf) and not self._per_sample(leaf):
                axes = token_axes(leaf.meta["val"], stream.shape[1], others, stream.shape[-1])
                if axes:
                    yield leaf, axes

    def _is_text(self, leaf: Node) -> bool:
        found = self.facts.context.classes.of(leaf)
        return leaf.meta["val"].ndim == 3 and "text" in found and "tokens" not in found

    def _per_sample(self, leaf: Node) -> bool:
        found = self.facts.context.classes.of(leaf)
        return leaf.meta["val"].ndim <= 2 and bool(found) and found <= {"timestep", "label"}

    def layout(self, output: int, opened: Sequence[str] = ()) -> tuple[TokenLayout, tuple[str, ...]]:
        """Return the layout, and the children that have to be written out for it, those in ``opened`` at least."""
        expand: set[str] = set(opened)
        for _ in range(_MOST_EXPANSIONS):
            one = Captures.of(self.facts.graph).see(self.site.path, self.inputs, expand)
            two = self._grown(expand)
            stream, following = self._placeholders(one)
            try:
                found = token_layout(one, two, stream, following, output, self._ffns())
            except NeedsInside as wanted:
                if wanted.children <= expand:
                    break
                expand |= wanted.children
                continue
            make_forward(one)
            return found, tuple(sorted(expand))
        raise NotByToken("its children cannot be written out")

    def _grown(self, expand: set[str]) -> Graph:
        """Capture the block with more tokens."""

        def grow(leaf: Any) -> Any:
            if not _is_tensor(leaf):
                return leaf
            axes = (1,) if leaf is self.site.operands["stream"] else self.axes.get(leaf, ())
            value = leaf.meta["val"]
            sizes = [size + MORE * (axis in axes) for axis, size in enumerate(value.shape)]
            return torch.empty(sizes, dtype=value.dtype, device="meta")

        args, kwargs = pytree.tree_map(grow, (self.call.args, self.call.kwargs))
        inputs = {"args": [encode(a) for a in args], "kwargs": {k: encode(v) for k, v in kwargs.items()}}
        try:
            return local_graph(self.module, inputs, "children", expand)
        except CaptureError as error:
            raise NotByToken(f"it does not run with another number of tokens: {error.found}") from error

    def _placeholders(self, local: Graph) -> tuple[Node, dict[Node, tuple[int, ...]]]:
        """Return the placeholder of the stream, and those that follow it."""
        assert local.call_spec is not None
        leaves = pytree.tree_leaves(local.call_spec.bind(self.call.args, self.call.kwargs))
        outer = [leaf for leaf in leaves if _is_tensor(leaf)]
        inner = [n for n in local.fx.nodes if n.op == "placeholder"]
        pairs = list(zip(inner, outer, strict=True))
        stream = next((a for a, b in pairs if b is self.site.operands["stream"]), None)
        if stream is None:
            raise NotByToken("its token stream is not an argument of its own")
        return stream, {a: self.axes[b] for a, b in pairs if b in self.axes}

    def _ffns(self) -> list[str]:
        """Return the children of the block that are feed-forward networks."""
        prefix = f"{self.site.path}."
        ffns = [s for s in self.facts.sites if s.kind == "ffn" and s.region_is_module and s.path.startswith(prefix)]
        return sorted({s.path.removeprefix(prefix) for s in ffns})


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), torch.Tensor)
