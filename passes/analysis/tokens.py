"""What must be done to run a block on some of its tokens: found by comparing its graph at two sequence lengths.

A block may be given any subset of its tokens if what belongs to a token by position follows it: rotary tables, masks,
modulations per token. Tables with a batch axis are cut where they enter. A table that all samples share can only be cut
where it meets a value with a batch axis, after the reshapes in between: those edges are found here.

Axes that grow with the number of tokens are told apart from all others by growing it: the block is captured once more
with `MORE` tokens, and sizes of the same node are compared.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Node

from moefx.graph import Graph
from moefx.graph.kinds import POINTWISE, Op, op, shape
from moefx.passes.analysis.flow import Flow
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.streams import Streams
from moefx.routing.tokens import Joint

MORE = 2
# What reads neighbours of a token, so that leaving some out changes the meaning.
_LOCAL_KINDS = frozenset({"resample", "pad"})
_LOCAL_NAMES = frozenset({"roll", "flip", "cumsum", "cumprod", "diff", "unfold", "fold", "fft_fftn", "rfft", "fft"})
_MEETS = POINTWISE | {"mul", "add", "sub", "div", "sdpa", "complex"}


@dataclass(frozen=True)
class Follow:
    """A value that goes with the tokens: cut it for ``user``, or for all its users (``""``); see `routing.follow`."""

    node: str
    user: str
    axes: tuple[int, ...]
    ndim: int
    joint: Joint


@dataclass(frozen=True)
class Branch:
    """A feed-forward network of the stream: the node of its call, its module, and the stream that it is added to."""

    node: str
    module: str
    stream: str


@dataclass(frozen=True)
class TokenLayout:
    """Where the tokens of a block are: its entering stream, which output leaf they leave by, and what follows them."""

    stream: str
    output: int
    follows: tuple[Follow, ...]
    ffns: tuple[Branch, ...]


class NotByToken(Exception):
    """The block cannot run on some of its tokens, and why."""


class NeedsInside(Exception):
    """Some children must be written out before the question can be answered."""

    def __init__(self, children: Iterable[str]) -> None:
        super().__init__(sorted(children))
        self.children = frozenset(children)


def token_axes(value: torch.Tensor, tokens: int, others: Iterable[int], width: int) -> tuple[int, ...]:
    """Return the axes of a block's argument that may have one entry per token, from the front.

    Args:
        value: the argument.
        tokens: T.
        others: lengths of the other sequences; an axis of T plus one of them is that of a joint sequence.
        width: D; features are not tokens, even if there are as many.
    """
    sizes = {tokens, *(tokens + other for other in others)}
    found = [axis for axis, size in enumerate(value.shape) if size in sizes]
    last = value.ndim - 1
    if (
        len(found) > 1
        and found[-1] == last
        and value.is_floating_point()
        and value.ndim <= 3
        and value.shape[-1] == width
    ):
        found = found[:-1]
    return tuple(found)


def mixes_neighbours(site: Site, graph: Graph) -> str:
    """Return which operation of a block reads neighbouring tokens; ``""`` if none does."""
    for node in site.nodes:
        what = op(node, graph)
        local = what.kind == "conv" and not what.attrs["pointwise"]
        if local or what.kind in _LOCAL_KINDS or what.name in _LOCAL_NAMES:
            return f"{what.name} reads neighbouring tokens"
    return ""


def token_layout(
    one: Graph, two: Graph, stream: Node, following: dict[Node, tuple[int, ...]], output: int, ffns: Sequence[str]
) -> TokenLayout:
    """Return how the block ``one`` runs on some of its tokens.

    Args:
        one: the block, with T tokens.
        two: the same with T + `MORE`.
        stream: the placeholder of ``one`` whose tokens ``[B, T, D]`` are selected.
        following: further placeholders with an entry per token, and on which axes.
        output: the leaf of the output that returns the tokens.
        ffns: children of the block that are feed-forward networks.

    Raises:
        NotByToken: it cannot.
        NeedsInside: unless these children are written out first.
    """
    return _Finder(one, two, stream, following).layout(output, ffns)


class _Finder:
    def __init__(self, one: Graph, two: Graph, stream: Node, following: dict[Node, tuple[int, ...]]) -> None:
        self.graph, self.stream, self.following = one, stream, following
        self.nodes = list(one.fx.nodes)
        self.flow = Flow(one)
        sizes = shape(stream)
        if sizes is None or len(sizes) != 3:
            raise NotByToken(f"its stream has shape {sizes}, not [batch, tokens, width]")
        self.batch, self.tokens = sizes[0], sizes[1]
        self._grown = self._compare(one, two)

    def _compare(self, one: Graph, two: Graph) -> dict[Node, tuple[int, ...]]:
        """Return the axes of every node that grew with the number of tokens."""
        others = list(two.fx.nodes)
        same = len(others) == len(self.nodes) and all(
            (a.op, a.name, str(a.args), str(a.kwargs)) == (b.op, b.name, str(b.args), str(b.kwargs))
            for a, b in zip(self.nodes, others, strict=True)
        )
        expected = [(str(a.expected), str(b.expected)) for a, b in zip(one.guards, two.guards, strict=False)]
        if not same or len(one.guards) != len(two.guards) or any(a != b for a, b in expected):
            raise NotByToken("its forward depends on the number of tokens")
        ints = [(a, a.meta.get("val"), b.meta.get("val")) for a, b in zip(self.nodes, others, strict=True)]
        self._lengths = {a for a, m, n in ints if isinstance(m, int) and m != n}
        grown = {}
        for a, b in zip(self.nodes, others, strict=True):
            before, after = shape(a), shape(b)
            if before is not None and after is not None and len(before) == len(after):
                pairs = enumerate(zip(before, after, strict=True))
                grown[a] = tuple(i for i, (m, n) in pairs if n - m == MORE and m >= self.tokens)
        return grown

    def layout(self, output: int, ffns: Sequence[str]) -> TokenLayout:
        """Return the layout, or raise."""
        entering = {n: axes for n, axes in self.following.items() if self._has_batch(n, axes)}
        tables = {n for n in self.following if n not in entering}
        shared = self._shared(tables)
        self._check_cuts(shared)
        edges = [(node, user) for node in shared for user in node.users if user not in shared]
        follows = [self._follow(n, None, axes) for n, axes in entering.items()]
        follows += [self._edge(node, user) for node, user in edges if self._matters(node, user)]
        self._check_output(output)
        branches = tuple(branch for name in ffns for branch in self._branch(name))
        return TokenLayout(self.stream.name, output, tuple(dict.fromkeys(follows)), branches)

    def _has_batch(self, node: Node, axes: tuple[int, ...]) -> bool:
        sizes = shape(node) or ()
        return 0 not in axes and len(sizes) > 1 and sizes[0] in (1, self.batch)

    def _shared(self, tables: set[Node]) -> dict[Node, None]:
        """Return the values that are made of shared tables alone, in program order."""
        shared: dict[Node, None] = dict.fromkeys(sorted(tables, key=self.flow.index.__getitem__))
        for node in self.nodes:
            read = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor | tuple | list)]
            read = [n for n in read if n.op != "get_attr"]
            if node.op != "output" and read and all(n in shared for n in read) and self._what(node).kind != "size":
                if self._lengths.intersection(node.all_input_nodes):
                    raise NotByToken(f"{node.name} gives a table the length of the sequence")
                shared[node] = None
        return shared

    def _what(self, node: Node) -> Op:
        return self.flow.ops[node]

    def _matters(self, node: Node, user: Node) -> bool:
        if self._what(user).kind == "size":
            if user.op == "call_method" and self._grown.get(node) and not isinstance(user.meta.get("val"), int):
                return False
            if isinstance(user.meta.get("val"), int) and user.meta["val"] >= self.tokens:
                raise NotByToken(f"{user.name} asks a table for its length")
            return False
        if user.op == "output":
            raise NotByToken("it returns a table")
        if user.op == "call_module":
            raise NeedsInside([str(user.target)])
        return bool(self._grown.get(node))

    def _edge(self, node: Node, user: Node) -> Follow:
        sizes, result = shape(node) or (), shape(user)
        if self._what(user).kind not in _MEETS or result is None or result[0] != self.batch:
            raise NotByToken(f"a table meets the tokens in {user.name}, which is no elementwise operation")
        if len(sizes) > len(result) or (len(sizes) == len(result) and sizes[0] != 1):
            raise NotByToken(f"a table of shape {sizes} meets {result} in {user.name}")
        return self._follow(node, user, self._grown[node], len(result))

    def _follow(self, node: Node, user: Node | None, axes: tuple[int, ...], ndim: int | None = None) -> Follow:
        sizes = shape(node) or ()
        lengths = {sizes[axis] for axis in axes}
        joint: Joint = "" if lengths == {self.tokens} else self._joint(max(lengths))
        if joint and len(lengths) > 1:
            raise NotByToken(f"{node.name} relates all tokens to those of one sequence")
        back = tuple(axis - len(sizes) for axis in axes)
        return Follow(node.name, user.name if user else "", back, ndim or len(sizes), joint)

    def _joint(self, length: int) -> Joint:
        """Return whether the tokens come first or last where they are concatenated to ``length``."""
        found = set()
        for node in self.nodes:
            if self._what(node).kind != "cat":
                continue
            dim = self._what(node).attrs["dim"]
            parts = [(shape(n) or (), dim in self._grown.get(n, ())) for n in self._what(node).inputs]
            if (shape(node) or ())[dim] != length or sum(grown for _, grown in parts) != 1:
                continue
            at = next(i for i, (_, grown) in enumerate(parts) if grown)
            if parts[at][0][dim] == self.tokens:
                found.add("first" if at == 0 else "last" if at == len(parts) - 1 else "within")
        if not found:
            raise self._look_inside("where its tokens are joined with others is out of sight")
        if found == {"first"}:
            return "first"
        if found == {"last"}:
            return "last"
        raise NotByToken("its tokens lie within a joint sequence")

    def _look_inside(self, reason: str) -> Exception:
        """Return the request to write out the children that see the stream and other sequences together."""
        opaque = [n for n in self.nodes if n.op == "call_module" and len(_tensors(n)) > 1]
        mixed = [n for n in opaque if any(self.flow.depends(s, self.stream) for s in n.all_input_nodes)]
        mixed = [
            n for n in mixed if not type(self.graph.root.get_submodule(str(n.target))).__module__.startswith("torch.")
        ]
        return NeedsInside([str(n.target) for n in mixed]) if mixed else NotByToken(reason)

    def _check_cuts(self, shared: dict[Node, None]) -> None:
        """Refuse a block that treats some positions of its stream otherwise."""
        for node in self.nodes:
            what = self._what(node)
            if what.kind not in ("slice", "split") or node in shared or len(what.inputs) != 1:
                continue
            source = what.inputs[0]
            before, after = shape(source), shape(node)
            cut = [a for a in self._grown.get(source, ()) if (before or ())[a] == self.tokens]
            if after is None or before is None or len(after) != len(before):
                continue
            if any(after[a] != before[a] for a in cut):
                raise NotByToken(f"{node.name} cuts its tokens by position")

    def _check_output(self, output: int) -> None:
        leaves = self.flow.output.args[0]
        assert isinstance(leaves, list | tuple)
        for i, leaf in enumerate(leaves):
            grown = self._grown.get(leaf, ()) if isinstance(leaf, Node) else ()
            if i == output and (grown != (1,) or (shape(leaf) or ())[:2] != (self.batch, self.tokens)):
                raise NotByToken("what it returns is not one row per token")
            if i != output and grown:
                raise NotByToken("it returns another value per token")

    def _branch(self, name: str) -> list[Branch]:
        """Return the calls of an FFN child on the selected stream."""
        streams = Streams(self.flow)
        found = []
        for node in self.nodes:
            if node.op == "call_module" and node.target == name and self._grown.get(node) == (1,):
                residual = streams.residual(node, node.all_input_nodes[0])
                if residual is not None and (shape(node) or ())[1] == self.tokens:
                    stream = residual.stream
                    if self.nodes.index(stream) > self.nodes.index(node):  # a cast, made where the branch is added
                        stream = self.flow.uncast(stream)
                    found.append(Branch(node.name, name, stream.name))
        return found


def _tensors(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
