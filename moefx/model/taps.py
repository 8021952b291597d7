"""Taps: finding, inside one block, a value that carries what a router wants to read.

=============  ======================================================================================================
tap            value
=============  ======================================================================================================
timestep       ``[B]`` or ``[B, D_t]``: the raw timestep, else an embedding of it, else of it and the label
condition      ``[B, D_c]``: an embedding of the timestep, of the label or pooled text too where there is one
label          ``[B]``: the label itself, an integer, as it entered the model
pooled         ``[B, D_p]``: an embedding of the label or pooled text alone
text           ``[B, S, D_s]``: the text tokens
words          ``[B, S, D_w]``: what the block's attention over text projects the keys of the text from
queries        ``[B, H, T, d]``: its queries, in joint attention those of the text too
keys           ``[B, H, S, d]``: its keys, in joint attention those of the image too
unmodulated    ``[B, T, D]``: the site's input after its norm, before adaLN scales and shifts it
=============  ======================================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from moefx.errors import OptionError, nearest
from moefx.graph import Graph, ModuleCall
from moefx.graph.kinds import MOVES, op
from moefx.passes.analysis import Facts
from moefx.passes.analysis.local import local_sites, weight_names
from moefx.passes.analysis.site import Site
from moefx.passes.analysis.streams import is_whole_operand

Found = frozenset[str]


@dataclass(frozen=True)
class _Wanted:
    """Values that depend on all of ``needs`` and on nothing but ``allows``; the lowest ``rank`` is best."""

    needs: Found
    allows: Found
    shaped: Callable[[torch.Tensor], bool]
    rank: Callable[[torch.Tensor, Found], int]


def _per_sample(value: torch.Tensor) -> bool:
    return value.ndim == 1 or _embedding(value) or (value.ndim == 3 and value.shape[1] == 1)


def _embedding(value: torch.Tensor) -> bool:
    return value.ndim == 2 and value.is_floating_point()


def _sequence(value: torch.Tensor) -> bool:
    return value.ndim == 3 and value.is_floating_point()


_TIME, _LABEL, _TEXT = frozenset({"timestep"}), frozenset({"label"}), frozenset({"text"})
_WANTED = {
    "timestep": _Wanted(_TIME, _TIME | _LABEL, _per_sample, lambda v, found: (v.ndim - 1) + 2 * (len(found) - 1)),
    "condition": _Wanted(_TIME, _TIME | _LABEL, _embedding, lambda _, found: -len(found)),
    "pooled": _Wanted(_LABEL, _LABEL, _embedding, lambda *_: 0),
    "label": _Wanted(_LABEL, _LABEL, lambda v: v.ndim == 1 and not v.is_floating_point(), lambda *_: 0),
    "text": _Wanted(_TEXT, _TEXT | {"mask", "position"}, _sequence, lambda *_: 0),
}
OF_ATTENTION = ("words", "queries", "keys")
TAPS = (*_WANTED, *OF_ATTENTION, "unmodulated")


def choose_tap(
    name: str, facts: Facts, call: ModuleCall | None, local: Graph, entry: Node | None = None
) -> Node | None:
    """Return the node of ``local`` that best carries ``name``, or None; among equals the first in program order.

    Args:
        name: one of `TAPS`.
        facts: of the whole model; they say what each argument of the block depends on.
        call: the block's invocation in the whole model; None if the block is the whole model.
        local: the block's own graph.
        entry: the node of ``local`` that enters the site; ``unmodulated`` starts from it.

    Raises:
        OptionError: there is no such tap.
    """
    if name not in TAPS:
        raise OptionError(f"read the tap {name!r}", found="no such tap", do=nearest(name, TAPS))
    if name == "unmodulated":
        return _before_modulation(entry, local) if entry is not None else None
    if name in OF_ATTENTION:
        return _of_attention(name, facts, call, local)
    classes = _classes(facts, call, local)
    wanted = _WANTED[name]
    best: tuple[tuple[int, int], Node] | None = None
    for i, node in enumerate(local.fx.nodes):
        found = classes.get(node, frozenset())
        value = node.meta.get("val")
        if not (wanted.needs <= found <= wanted.allows and isinstance(value, torch.Tensor) and wanted.shaped(value)):
            continue
        rank = wanted.rank(value, found)
        if best is None or (rank, i) < best[0]:
            best = (rank, i), node
    return best[1] if best else None


def attention_over_text(facts: Facts, block: str) -> Site | None:
    """Return the attention inside ``block`` whose keys are those of another sequence, alone or beside its own."""
    inside = [s for s in facts.sites if s.kind == "attention" and s.path.startswith(f"{block}." if block else "")]
    return next((s for s in inside if s.flavour in ("cross", "joint")), None)


def _of_attention(name: str, facts: Facts, call: ModuleCall | None, local: Graph) -> Node | None:
    prefix = f"{call.path}." if call is not None else ""
    whole = attention_over_text(facts, prefix[:-1])
    if whole is None:
        return None
    same = (s for s in local_sites(local) if s.kind == "attention")
    site = next((s for s in same if tuple(prefix + n for n in weight_names(s)) == weight_names(whole)), None)
    if site is None:
        return None
    if name != "words":
        found: Node = site.operands[name[0]]
        return found if found.meta["val"].ndim == 4 else None
    # Which of two streams is the image's depends on the graph around the block.
    mine = whole.operands["w_k"].fqn
    others = [s.x for s in site.operands["streams"] if s.k is not None and prefix + s.k.weight.fqn != mine]
    context: Node = site.operands["context"]
    return context if whole.flavour == "cross" else next(iter(others), None)


def _before_modulation(entry: Node, local: Graph) -> Node | None:
    """Walk back from a site's input through scales and shifts to its norm; None if the norm is out of sight."""
    node = entry
    while True:
        what = op(node, local)
        if what.kind == "norm":
            return node
        if what.kind in MOVES | {"dropout"} - {"slice"} and len(what.inputs) == 1:
            node = what.inputs[0]
            continue
        if what.kind not in ("add", "mul") and what.name != "addcmul":
            return None
        # By shape: scales may come out of a module that is called with the tokens too (adaLN-zero).
        carriers = [n for n in what.inputs if is_whole_operand(n, node)]
        if len(carriers) != 1:
            return None
        node = carriers[0]


def _classes(facts: Facts, call: ModuleCall | None, local: Graph) -> dict[Node, Found]:
    """Return what every node of the local graph depends on."""
    found: dict[Node, Found] = {}
    outer = _outer_nodes(facts, call, local)
    for node in local.fx.nodes:
        if node.op == "placeholder":
            source = next(outer)
            # Arguments that nothing reads were pruned from the whole model's graph.
            known = isinstance(source, Node) and not source._erased
            found[node] = facts.context.classes.of(source) if known else frozenset()
        elif node.op == "call_method" and node.target == "size":
            found[node] = frozenset()
        elif node.op != "output":
            found[node] = frozenset().union(*(found[n] for n in node.all_input_nodes))
    return found


def _outer_nodes(facts: Facts, call: ModuleCall | None, local: Graph) -> Iterator[Any]:
    """Iterate over the whole model's nodes that stand behind the local placeholders."""
    if call is None:
        return iter([n for n in facts.graph.fx.nodes if n.op == "placeholder"])
    assert local.call_spec is not None
    leaves = pytree.tree_leaves(local.call_spec.bind(call.args, call.kwargs))
    return iter([leaf for leaf in leaves if isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), torch.Tensor)])
