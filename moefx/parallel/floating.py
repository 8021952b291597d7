"""Tokens that stay where their experts are: routed layers in a row with nothing but per-token operations between.

The way home of one layer and the way out of the next become one. A part of a model is traced, and run node by node on
tokens that change rank at each routed layer; with a token go the values that are still to be read, such as a residual.
At the end it goes home. Where attention or another exchange between tokens lies between, the result would be another,
and the part is refused.

Legend: T tokens that are here now, K slots per token, G ranks, D width, A tokens that arrive, P helpers: pairs of a
token and a rank that holds one of its slots and is not its next place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from moefx import ops
from moefx.errors import MoefxError, PlanError
from moefx.parallel.divided import DividedExperts, slots_of
from moefx.parallel.exchange import exchange, exchange_counts
from moefx.parallel.experts import ParallelExperts
from moefx.routing.experts import Experts
from moefx.routing.moe import RoutedFFN

_SHAPES = ("size", "numel", "dim")
_PROGRAM, _PROBE_TOKENS = "_moefx_floating", 6
_made: dict[type[nn.Module], type[nn.Module]] = {}


class FloatingPart:
    """A part of a model as a list of operations with routed layers among them.

    Args:
        module: maps ``[..., D]`` to ``[..., D_o]``, token by token.
        graph: of its forward, routed layers as single nodes.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        self.graph = fx.GraphModule(module, graph)
        nodes = list(self.graph.graph.nodes)
        place = {node: i for i, node in enumerate(nodes)}
        self.layers = [n for n in nodes if _is_routed(module, n)]
        tokenwise: set[fx.Node] = set()
        for n in nodes:
            if n.op == "placeholder" or tokenwise & set(n.all_input_nodes):
                tokenwise.add(n)
        last_use = {n: max((place[user] for user in n.users), default=-1) for n in nodes}
        # What is read at or after each routed layer, was made before it, and differs from token to token.
        self.carried = {
            layer: [n for n in nodes[: place[layer]] if n in tokenwise and last_use[n] > place[layer]]
            for layer in self.layers
        }

    def run(self, x: Tensor) -> Tensor:
        """Run the part on the tokens of this rank. A collective."""
        tokens = x.reshape(1, -1, x.shape[-1])
        first = self._experts(self.layers[0])
        rank, device = first.rank, x.device
        origin_T2 = torch.stack(
            [
                torch.full((tokens.shape[1],), rank, dtype=torch.int32, device=device),
                torch.arange(tokens.shape[1], dtype=torch.int32, device=device),
            ],
            dim=1,
        )
        values, runner, result = {}, fx.Interpreter(self.graph, garbage_collect_values=False), None
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                values[node] = tokens
            elif node in self.carried:
                values[node], origin_T2 = self._hop(node, values, origin_T2)
            elif node.op == "output":
                (result,) = (values[arg] for arg in node.all_input_nodes)
            else:
                args, kwargs = (fx.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
                values[node] = getattr(runner, node.op)(node.target, args, kwargs)
        assert isinstance(result, Tensor)
        return _go_home(result[0], origin_T2, first).reshape(*x.shape[:-1], -1)

    def _experts(self, node: fx.Node) -> DividedExperts:
        found = self.graph.get_submodule(str(node.target)).experts
        assert isinstance(found, DividedExperts)
        return found

    def _hop(self, node: fx.Node, values: dict[fx.Node, Any], origin_T2: Tensor) -> tuple[Tensor, Tensor]:
        """Move all tokens to their next place; return what the routed layer makes of them there, and their origins."""
        layer: Any = self.graph.get_submodule(str(node.target))
        (read,) = node.all_input_nodes
        along = [read, *(n for n in self.carried[node] if n is not read)]
        routing = layer.route(values[read])
        taken = [values[n][0] for n in along]
        hop = Hop(layer.experts, routing.experts)
        y_AD, moved, origin_A2 = hop.move(taken, routing.gates, origin_T2)
        for n, value in zip(along, moved, strict=True):
            values[n] = value.unsqueeze(0)
        if layer.experts.b_out is not None:
            y_AD = y_AD + layer.experts.b_out.to(y_AD.dtype)
        if layer.shared is not None:
            y_AD = y_AD + layer.shared(moved[0].unsqueeze(0))[0] * layer.shared_scale
        return y_AD.unsqueeze(0), origin_A2


class Hop:
    """One change of place: who goes where, from the slots of this rank's tokens.

    A token goes where most of its experts are; among equals it stays, or takes the next rank around. The other ranks
    that hold one of its experts get a copy of what the layer reads, and send their sums to its new place.

    Args:
        experts: of the layer.
        chosen_TK: expert numbers.
    """

    def __init__(self, experts: ParallelExperts, chosen_TK: Tensor) -> None:
        self.experts, self.group, self.rank = experts, experts.group, experts.rank
        ranks = len(experts.homes)
        self.slots_TK = slots_of(chosen_TK, experts.slot_of_copy, experts.end_of_copy)
        rank_TK = torch.searchsorted(experts.slot_bounds, self.slots_TK, right=True) - 1
        count_TG = rank_TK.new_zeros((len(chosen_TK), ranks + 1))
        count_TG.scatter_add_(1, rank_TK.clamp(max=ranks), torch.ones_like(rank_TK))
        self.count_TG = count_TG[:, :ranks]
        turn_G = (torch.arange(ranks, device=chosen_TK.device) - self.rank) % ranks
        self.owner_T = (self.count_TG * ranks - turn_G).argmax(dim=1)

    def move(self, taken: list[Tensor], gates_TK: Tensor, origin_T2: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the layer's sums at the new places, the values taken along (first what is read), and origins."""
        weights, k = self.experts.held(), self.slots_TK.shape[1]
        order_T = torch.argsort(self.owner_T, stable=True)
        sent, received = self._sizes(torch.bincount(self.owner_T, minlength=len(self.experts.homes)))
        widths = [value.shape[1] for value in taken]
        values_AD = exchange(torch.cat(taken, dim=1)[order_T], sent, received, self.group)
        numbers_T = torch.cat([origin_T2, self.slots_TK.to(torch.int32)], dim=1)
        origin_A2, slots_AK = torch.split(exchange(numbers_T[order_T], sent, received, self.group), [2, k], dim=1)
        gates_AK = exchange(gates_TK[order_T], sent, received, self.group)
        moved = list(torch.split(values_AD, widths, dim=1))
        slots_AK = slots_AK.to(torch.int64)
        y_AD = self._local(weights, moved[0], slots_AK, gates_AK)
        return (y_AD if k == 1 else self._with_help(weights, taken[0], gates_TK, y_AD, slots_AK)), moved, origin_A2

    def _sizes(self, leaving_G: Tensor) -> tuple[list[int], list[int]]:
        ones = [1] * len(leaving_G)
        coming_G = exchange_counts(leaving_G, ones, self.rank, self.group).flatten()
        sent, received = torch.stack([leaving_G, coming_G]).tolist()
        return sent, received

    def _local(self, weights: dict[str, Tensor], x_AD: Tensor, slots_AK: Tensor, gates_AK: Tensor) -> Tensor:
        """Return the weighted sum over the slots of this rank."""
        first, end = self.experts.slot_bounds[self.rank], self.experts.slot_bounds[self.rank + 1]
        here_AK = (slots_AK >= first) & (slots_AK < end)
        slots_AK = torch.where(here_AK, slots_AK - first, -1)
        return self.experts.local_sum(weights, self.experts._rows, x_AD, slots_AK, gates_AK * here_AK)

    def _with_help(
        self, weights: dict[str, Tensor], x_TD: Tensor, gates_TK: Tensor, y_AD: Tensor, slots_AK: Tensor
    ) -> Tensor:
        """Add what other ranks' experts make of the tokens that are here now.

        Everyone keeps tokens in the order of their last place, so sums need no numbers to find theirs.
        """
        ranks = torch.arange(len(self.experts.homes), device=x_TD.device)
        rank_P, token_P = ((self.count_TG > 0) & (ranks != self.owner_T.unsqueeze(1))).T.nonzero(as_tuple=True)
        sent, received = self._sizes(torch.bincount(rank_P, minlength=len(ranks)))
        x_PD = exchange(x_TD[token_P], sent, received, self.group)
        numbers_P = torch.cat([self.owner_T.unsqueeze(1), self.slots_TK], dim=1)[token_P].to(torch.int32)
        numbers_P = exchange(numbers_P, sent, received, self.group).to(torch.int64)
        gates_PK = exchange(gates_TK[token_P], sent, received, self.group)
        sums_PD = self._local(weights, x_PD, numbers_P[:, 1:], gates_PK)
        order_P = torch.argsort(numbers_P[:, 0], stable=True)
        back = torch.bincount(numbers_P[:, 0], minlength=len(ranks))
        rank_AK = torch.searchsorted(self.experts.slot_bounds, slots_AK, right=True) - 1
        helpers_GA = (rank_AK.unsqueeze(0) == ranks.view(-1, 1, 1)).any(dim=2) & (ranks != self.rank).unsqueeze(1)
        leaving, coming = torch.stack([back, helpers_GA.sum(dim=1)]).tolist()
        got_PD = exchange(sums_PD[order_P], leaving, coming, self.group)
        wide = torch.promote_types(y_AD.dtype, torch.float32)
        total_AD = y_AD.to(wide)
        place_P = helpers_GA.nonzero(as_tuple=True)[1]
        for places, part in zip(torch.split(place_P, coming), torch.split(got_PD, coming), strict=True):
            total_AD = total_AD.index_add(0, places, part.to(wide))  # a token at most once in each part
        return total_AD.to(y_AD.dtype)


def _go_home(y_TD: Tensor, origin_T2: Tensor, experts: DividedExperts) -> Tensor:
    """Bring all tokens back to the rank where they began, in their first order."""
    home_T = origin_T2[:, 0].to(torch.int64)
    order_T = torch.argsort(home_T, stable=True)
    leaving_G = torch.bincount(home_T, minlength=len(experts.homes))
    coming_G = exchange_counts(leaving_G, [1] * len(leaving_G), experts.rank, experts.group).flatten()
    sent, received = torch.stack([leaving_G, coming_G]).tolist()
    back_TD = exchange(y_TD[order_T], sent, received, experts.group)
    index_T = exchange(origin_T2[order_T, 1:], sent, received, experts.group).to(torch.int64)
    return ops.combine(back_TD, *_as_pairs(index_T[:, 0], back_TD))


def _as_pairs(index_T: Tensor, rows_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return order and weights with which a combine puts row i at ``index[i]``."""
    wide = torch.promote_types(rows_TD.dtype, torch.float32)
    return index_T, torch.ones((len(index_T), 1), dtype=wide, device=rows_TD.device)


def check_part(model: nn.Module, name: str, asked: str) -> None:
    """Refuse a part whose tokens may not float; before anything is divided.

    Raises:
        PlanError: there is no such part or no two routed layers in it, it cannot be traced, its experts are of another
            kind, or one token's result depends on others.
    """
    try:
        part = model.get_submodule(name)
    except AttributeError as error:
        raise PlanError(asked, found=f"floating part {name!r}: {error}", do="name a submodule") from error
    layers = [m for m in part.modules() if isinstance(m, RoutedFFN)]
    plain = all(type(m.experts) is Experts and not m.taps and not m.stateful for m in layers)
    if len(layers) < 2 or not plain or any(m.selector.by_expert for m in layers):
        found = f"{name}: {len(layers)} routed layers, or some with taps, state, wrapped experts or experts that choose"
        raise PlanError(asked, found=found, do="let parts float that hold several plain routed FFNs")
    trace_part(part, name, asked)
    first: Any = layers[0].experts
    _check_tokenwise(part, name, int(first.w_in.shape[-1]), asked)


def _check_tokenwise(part: nn.Module, name: str, width: int, asked: str) -> None:
    """Compare tokens in another order and number with tokens by themselves."""
    like = next(part.parameters())
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(1, _PROBE_TOKENS, width, generator=draws).to(like)
    turned = torch.arange(_PROBE_TOKENS - 2, -1, -1, device=like.device)
    training, kept = part.training, {name: buffer.clone() for name, buffer in part.named_buffers()}
    try:
        with torch.no_grad():
            whole, some = part.eval()(x), part(x[:, turned])
    except (RuntimeError, MoefxError) as error:
        raise PlanError(
            asked, found=f"{name} on tokens [1, T, {width}]: {error}", do="let other parts float"
        ) from error
    finally:
        part.train(training)
        for name, buffer in part.named_buffers():
            buffer.copy_(kept[name])  # routers count what they see
    close = max(1e-4, 4 * torch.finfo(whole.dtype).eps)
    if not torch.allclose(some, whole[:, turned], rtol=close, atol=close):
        raise PlanError(asked, found=f"{name}: results of a token depend on others", do="let per-token parts float")


def trace_part(part: nn.Module, name: str, asked: str) -> fx.Graph:
    """Return the part's graph with routed layers as nodes.

    Raises:
        PlanError: it cannot be traced, or takes more than one tensor.
    """
    try:
        graph = _Tracer().trace(part)
    except Exception as error:  # tracing runs the part's own code
        raise PlanError(asked, found=f"{name} cannot be traced: {error}", do="let other parts float") from error
    counted = [n.name for n in graph.nodes if n.target in _SHAPES or (n.target is getattr and n.args[1] == "shape")]
    if counted:
        found = f"{name} reads the number of tokens ({', '.join(counted)}), which changes on the way"
        raise PlanError(asked, found=found, do="let other parts float")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        raise PlanError(
            asked, found=f"{name} takes {len(inputs)} arguments", do="let parts float that take tokens only"
        )
    return graph


def install(model: nn.Module, name: str, asked: str) -> None:
    """Let the tokens of a divided part float; its class is replaced by a subclass, names and hooks stay."""
    part = model.get_submodule(name)
    part.__dict__[_PROGRAM] = FloatingPart(part, trace_part(part, name, asked))
    part.__class__ = _floats(type(part))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, RoutedFFN) or super().is_leaf_module(m, module_qualified_name)


def _is_routed(module: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and isinstance(module.get_submodule(str(node.target)), RoutedFFN)


def _floats(cls: type[nn.Module]) -> type[nn.Module]:
    """Return the subclass whose forward lets tokens float; one per class."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = self.__dict__[_PROGRAM].run(x)
        return found

    if cls not in _made:
        namespace = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
        _made[cls] = type(cls.__name__, (cls,), namespace)
    return _made[cls]
