"""The region tree of a graph: module invocations, leaf modules and sites, nested and in program order."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.graph import Graph, ModuleCall
from moefx.graph.origin import origin_of
from moefx.inspect.describe import describe_module, describe_site, is_routed, is_trivial, routed_mark
from moefx.inspect.text import clean, numberless, tensor_types
from moefx.passes.analysis import Facts, analyse
from moefx.passes.analysis.site import Site

RegionKind = Literal["model", "module", "leaf", "site"]


@dataclass(eq=False)
class Region:
    """One line of a dump: the model, one invocation of a module, a leaf module, or a site inside a module.

    Attributes:
        kind: ``"site"`` for a site that is only a part of its module; such a region has no module of its own.
        path: module path; ``index`` counts the invocations of that module.
        label: the path below the enclosing region, as shown.
        type_name: class of the module.
        detail: what it is, in a few words.
        output: its tensors, as types.
        parameters: elements of its distinct parameters.
        nodes: the nodes inside.
        site: the site that this region is, or that is all it has inside.
        marks: what is routed, or why not.
        trivial: a dropout or an identity, which text and pictures leave out.
        children: what is inside, if it says more than ``detail``.
    """

    kind: RegionKind
    path: str
    index: int
    label: str
    type_name: str
    detail: str
    output: tuple[str, ...]
    parameters: int
    nodes: tuple[Node, ...]
    site: Site | None = None
    marks: tuple[str, ...] = ()
    trivial: bool = False
    children: list[Region] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The path, with ``#i`` for every call after the first."""
        return self.path if self.index == 0 else f"{self.path}#{self.index}"

    def walk(self) -> Iterator[Region]:
        """Iterate over this region and all inside it, in program order."""
        yield self
        for child in self.children:
            yield from child.walk()

    def signature(self) -> Any:
        """Return what two regions must share to be shown as one repeated line."""
        inside = tuple(child.signature() for child in self.children)
        return (
            self.kind,
            numberless(self.label),
            self.type_name,
            self.detail,
            self.output,
            self.parameters,
            self.marks,
            inside,
        )


def build_regions(graph: Graph, marks: Mapping[str, str] | None = None) -> Region:
    """Return the region tree of ``graph``; ``marks`` are notes by site name."""
    return _Builder(graph, marks or {}).build()


class _Builder:
    def __init__(self, graph: Graph, marks: Mapping[str, str]) -> None:
        self.graph, self.marks = graph, marks
        self.facts: Facts = analyse(graph)
        self.order = {node: i for i, node in enumerate(graph.fx.nodes)}
        self.sites: dict[tuple[str, int], list[Site]] = {}
        self.blocks: dict[tuple[str, int], Site] = {}
        for site in self.facts.sites:
            if site.kind == "block":
                if site.region_is_module:
                    self.blocks[site.path, site.call_index] = site
            else:
                self.sites.setdefault((site.path, site.call_index), []).append(site)
        self.leaves: dict[tuple[str, int], list[Node]] = {}
        for node in graph.fx.nodes:
            if node.op == "call_module":
                origin = origin_of(node)
                self.leaves.setdefault((origin.path, origin.call_index), []).append(node)

    def build(self) -> Region:
        """Nest the invocations (they come innermost first) and let each one keep what is worth a line."""
        stack: list[tuple[tuple[int, int], Region]] = []
        for call in self.graph.calls:
            if not call.nodes:
                continue
            span = self.order[call.nodes[0]], self.order[call.nodes[-1]]
            inner: list[Region] = []
            while stack and span[0] <= stack[-1][0][0]:
                inner.append(stack.pop()[1])
            stack.append((span, self._call(call, inner[::-1])))
        return self._root([region for _, region in stack])

    def _root(self, inner: list[Region]) -> Region:
        model = self.graph.root
        nodes = tuple(self.graph.fx.nodes)
        output = next((n for n in reversed(nodes) if n.op == "output"), None)
        values = [n.meta.get("val") for n in output.all_input_nodes] if output is not None else []
        region = Region(
            "model", "", 0, "", clean(type(model).__name__), "", tensor_types(values), _parameters(model), nodes
        )
        region.children = self._children(region, inner)
        return region

    def _call(self, call: ModuleCall, inner: list[Region]) -> Region:
        module = self.graph.root.get_submodule(call.path)
        values = pytree.tree_map(lambda n: n.meta.get("val") if isinstance(n, Node) else n, call.output)
        region = Region(
            "module",
            call.path,
            call.index,
            "",
            clean(call.type_name),
            clean(call.type_name),
            tensor_types(values),
            _parameters(module),
            call.nodes,
        )
        block = self.blocks.get((call.path, call.index))
        if block is not None:
            region.marks = self._mark(block)
        own = self.sites.get((call.path, call.index), [])
        whole = next((s for s in own if s.region_is_module), None)
        nested = any(r.site or r.children or is_routed_region(r) for r in inner)
        if whole or (len(own) == 1 and not nested and self._fills(own[0], call)):
            self._become(region, whole or own[0])
            return region
        region.children = self._children(region, inner)
        if not any(r.site or r.children or is_routed_region(r) for r in region.children):
            region.children = []
        return region

    def _fills(self, site: Site, call: ModuleCall) -> bool:
        """Tell whether a module has nothing beside the site that would be worth a line."""
        inside = set(site.nodes)
        others = [n for n in self.leaves.get((call.path, call.index), []) if n not in inside]
        return all(is_trivial(self.graph.root.get_submodule(str(n.target))) for n in others)

    def _become(self, region: Region, site: Site) -> None:
        region.site, region.detail = site, describe_site(site)
        region.marks += self._mark(site)

    def _mark(self, site: Site) -> tuple[str, ...]:
        mark = self.marks.get(site.name) or self.marks.get(f"{site.kind} {site.path}")
        return (mark,) if mark else ()

    def _children(self, parent: Region, inner: list[Region]) -> list[Region]:
        """Return what is directly inside a module: invocations, leaf modules, and sites written inline."""
        key = (parent.path, parent.index)
        sites = [] if parent.site else self.sites.get(key, [])
        inside = {node for site in sites for node in site.nodes}
        children = [r for r in inner if not inside or r.site or r.children or not _mostly(r.nodes, inside)]
        for node in self.leaves.get(key, []):
            if node not in inside or is_routed(self.graph.root.get_submodule(str(node.target))):
                children.append(self._leaf(node))
        children += [self._inline(site) for site in sites]
        for child in children:
            child.label = _below(child, parent.path)
        return sorted(children, key=lambda r: (self.order[r.nodes[0]], self.order[r.nodes[-1]]))

    def _leaf(self, node: Node) -> Region:
        path = str(node.target)
        module = self.graph.root.get_submodule(path)
        index = int(node.meta.get("moefx_call_index", 0))
        kind = clean(type(module).__name__)
        detail, output = describe_module(module), tensor_types(node.meta.get("val"))
        marks = (routed_mark(module),) if is_routed(module) else ()
        size = _parameters(module)
        region = Region("leaf", path, index, "", kind, detail, output, size, (node,), marks=marks)
        region.trivial = is_trivial(module)
        return region

    def _inline(self, site: Site) -> Region:
        size = sum(_weight_size(site, name, self.graph) for name in site.weights())
        output = tensor_types(site.output.meta.get("val"))
        region = Region("site", site.path, site.call_index, "", "", "", output, size, site.nodes)
        self._become(region, site)
        return region


def is_routed_region(region: Region) -> bool:
    """Tell whether the region is a routed module."""
    return region.kind == "leaf" and bool(region.marks)


def _below(region: Region, parent: str) -> str:
    if region.kind == "site" and region.site is not None:
        return clean(":" + region.site.name.rpartition(":")[2])
    path = region.name
    return clean(path.removeprefix(f"{parent}.") if parent else path)


def _mostly(nodes: tuple[Node, ...], inside: set[Node]) -> bool:
    computing = [n for n in nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    return 2 * sum(n in inside for n in computing) > len(computing)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _weight_size(site: Site, name: str, graph: Graph) -> int:
    weight = site.weights()[name]
    if weight.is_whole:
        return graph.parameter(weight.fqn).numel()
    shape = list(graph.parameter(weight.fqn).shape)
    parts = (weight.cols, weight.rows) if weight.transposed else (weight.rows, weight.cols)
    for axis, part in enumerate(parts):
        if part is not None:
            shape[axis] = len(range(*part.indices(shape[axis]))) if isinstance(part, slice) else len(part)
    return int(torch.Size(shape).numel())
