"""Weights of a routed model as those of the dense one, and back, where the two hold the same numbers.

A split network holds every neuron of the dense one once, and a mask leaves them where they are: both ways are exact.
Copies are the dense network as long as they are equal. Everything else has no dense equivalent and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moefx.errors import PlanError
from moefx.graph import Graph
from moefx.model.handle import handle_of
from moefx.model.local import local_graph
from moefx.model.plan import Plan, SitePlan
from moefx.model.realise import capture_module, find_module, find_site
from moefx.passes.analysis.site import Index, Site, Weight
from moefx.passes.rewrite.dense import dense_weights
from moefx.routing.experts import DenseFFN, Experts
from moefx.routing.layout import OnAxis
from moefx.routing.moe import RoutedFFN
from moefx.routing.neurons import NeuronSubsets
from moefx.routing.slices import OffsetExperts, cut, merge
from moefx.routing.weights import FFNWeights


@dataclass(frozen=True)
class _Pair:
    """One site in its dense graph, and the layer that stands for it; ``kept`` is the rest of its projection."""

    name: str
    graph: Graph
    site: Site
    layer: nn.Module
    kept: nn.Module | None


@torch.no_grad()
def routed_to_dense(model: nn.Module, dense: nn.Module) -> nn.Module:
    """Fill ``dense`` with the weights of a routed model and return it: all slices at weight 1, masks gone.

    Parameters outside the rewritten sites are copied. Of a split whose channels were calibrated, the scaled weights are
    what is copied.

    Args:
        model: what :func:`moefx.transform` made, or was loaded.
        dense: a fresh model of the class and config it had before, with any weights.

    Raises:
        PlanError: the model was not transformed, or a site has no dense equivalent; ``dense`` is as it was.
    """
    pairs = list(_pairs(model, dense))
    weights = [_merged(pair) for pair in pairs]
    own, state = dict(dense.named_parameters()) | dict(dense.named_buffers()), model.state_dict()
    for name, value in own.items():
        if name in state and state[name].shape == value.shape:
            value.copy_(state[name])
    for pair, found in zip(pairs, weights, strict=True):
        for name, operand in pair.site.weights().items():
            part = getattr(found, name, None)
            if isinstance(part, Tensor) and not (name == "b_out" and pair.kept is not None):
                _put(pair.graph, operand, part)
        _put_rest(pair)
    return dense


@torch.no_grad()
def dense_to_routed(dense: nn.Module, model: nn.Module) -> nn.Module:
    """Fill the slices of a split ``model`` with the weights of ``dense`` and return it; routers and constants stay.

    For a newer checkpoint of the dense model: the neurons keep their places. What was measured on the older weights
    (routers, thresholds, means, scaled channels) is not measured again.

    Raises:
        PlanError: the model was not transformed, or a site was not split; ``model`` is as it was.
    """
    pairs = list(_pairs(model, dense))
    for pair in pairs:
        if not isinstance(pair.layer, RoutedFFN) or "neurons" not in pair.layer._buffers:
            raise _refused(pair.name, "fill a split model", "it was not split into slices")
    own, state = dict(model.named_parameters()) | dict(model.named_buffers()), dense.state_dict()
    for name, value in own.items():
        if name in state and state[name].shape == value.shape:
            value.copy_(state[name])
    for pair in pairs:
        _fill(pair)
    return model


def _pairs(model: nn.Module, dense: nn.Module) -> Iterator[_Pair]:
    handle = handle_of(model)
    if handle is None or len(handle.plans) != 1:
        found = "it was not transformed" if handle is None else f"{len(handle.plans)} transforms"
        raise PlanError(
            f"turn {type(model).__name__} into a dense model", found=found, do="pass one transform's result"
        )
    plan: Plan = handle.plans[0]
    inline: dict[str, Iterator[str]] = {}
    for site in plan.sites:
        if site.kind != "ffn":
            raise _refused(site.name, "turn it into a dense one", f"it is no feed-forward network but {site.kind}")
        yield _pair(model, dense, site, inline)


def _pair(model: nn.Module, dense: nn.Module, plan: SitePlan, inline: dict[str, Iterator[str]]) -> _Pair:
    if plan.module is not None:
        graph, site = capture_module(dense, plan.module, plan.module_inputs)
        layer, kept = model.get_submodule(plan.module), None
    else:
        path = plan.block or ""
        assert plan.block_inputs is not None
        block = find_module(dense, path)
        graph = local_graph(block, plan.block_inputs, "children", plan.expand)
        site = find_site(graph, path, plan.kind, plan.weights)
        routed = model.get_submodule(path)
        # Layers of inline sites are new children, added in the order of the plan.
        new = inline.setdefault(path, iter([name for name in routed._modules if name not in block._modules]))
        layer = routed.get_submodule(next(new))
        kept = routed.get_submodule(str(site.output.target)) if site.operands.get("rest") else None
    return _Pair(plan.name, graph, site, layer.inner if isinstance(layer, OnAxis) else layer, kept)


def _merged(pair: _Pair) -> FFNWeights:
    layer = pair.layer
    if isinstance(layer, DenseFFN):
        return layer.weights()
    if isinstance(layer, NeuronSubsets):
        return layer.ffn.weights()
    if not isinstance(layer, RoutedFFN):
        raise _refused(pair.name, "turn it into a dense one", f"a {type(layer).__name__} has no dense equivalent")
    if "neurons" in layer._buffers:
        return merge(layer)
    return _copies(pair, layer)


def _copies(pair: _Pair, layer: RoutedFFN) -> FFNWeights:
    """Return the one network that all copies are."""
    if not isinstance(layer.experts, Experts) or layer.shared is not None:
        raise _refused(pair.name, "turn it into a dense one", "its experts are no copies")
    stacked = layer.experts.weights()
    shards = stacked.hidden and pair.site.shapes["F"] // stacked.hidden

    def whole(tensor: Tensor, axis: int) -> Tensor:
        copies = tensor.detach().reshape(-1, shards, *tensor.shape[1:])
        joined = torch.cat(list(copies.unbind(1)), dim=axis)
        if not bool((joined == joined[:1]).all()):
            raise _refused(pair.name, "turn it into a dense one", "its copies were trained apart")
        one: Tensor = joined[0]
        return one

    return stacked.neurons(whole)


def _fill(pair: _Pair) -> None:
    layer = pair.layer
    assert isinstance(layer, RoutedFFN)
    order = layer._buffers["neurons"]
    experts = layer.experts.experts if isinstance(layer.experts, OffsetExperts) else layer.experts
    assert order is not None
    assert isinstance(experts, Experts)
    dense = dense_weights(pair.site, pair.graph)
    width = experts.w_in.shape[1]
    shared, slices = cut(dense, order, dense.hidden // width - experts.num_experts, experts.num_experts)
    _copy(experts, replace(slices, b_out=None))
    if shared is not None:
        assert isinstance(layer.shared, DenseFFN)
        _copy(layer.shared, shared)
    if isinstance(layer.experts, Experts) and experts.b_out is not None and dense.b_out is not None:
        experts.b_out.copy_(dense.b_out)
    if pair.kept is not None:
        columns = torch.cat([w.tensor(pair.graph) for _, w in pair.site.operands["rest"]], dim=-1)
        pair.kept.get_parameter("weight").copy_(columns)
        if "b_out" in pair.site.operands:
            pair.kept.get_parameter("bias").copy_(pair.site.operands["b_out"].tensor(pair.graph))


def _copy(module: nn.Module, weights: FFNWeights) -> None:
    for name, value in vars(weights).items():
        if value is not None:
            module.get_parameter(name).copy_(value)


def _put_rest(pair: _Pair) -> None:
    """Write the columns of a shared projection that are not the network's, and its bias."""
    if pair.kept is None:
        return
    weight, first = pair.kept.get_parameter("weight"), 0
    for _, columns in pair.site.operands["rest"]:
        width = columns.tensor(pair.graph).shape[1]
        _put(pair.graph, columns, weight[:, first : first + width])
        first += width
    bias = pair.site.operands.get("b_out")
    if isinstance(bias, Weight):
        _put(pair.graph, bias, pair.kept.get_parameter("bias"))


def _put(graph: Graph, weight: Weight, value: Tensor) -> None:
    """Write what :meth:`Weight.tensor` reads."""
    found = graph.parameter(weight.fqn).detach()
    if found.ndim > 2 and all(size == 1 for size in found.shape[2:]):
        found = found.flatten(1)  # a view: the kernel is 1 x 1
    if weight.transposed:
        found = found.transpose(0, 1)
    rows = _index(weight.rows, found.shape[0])
    if found.ndim == 1:
        found[rows] = value.to(found)
    else:
        found[rows.unsqueeze(1), _index(weight.cols, found.shape[1])] = value.to(found)


def _index(part: Index, size: int) -> Tensor:
    everything = torch.arange(size)
    return everything if part is None else everything[part if isinstance(part, slice) else list(part)]


def _refused(name: str, asked: str, found: str) -> PlanError:
    return PlanError(f"{asked}: {name}", found=found, do="keep the dense checkpoint, or distil a dense model")
