"""RAPHAEL: both mixtures and the edge loss written out, and what they read in real denoisers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from moefx.errors import InputError, NothingMatched
from moefx.routing import given
from moefx.routing.space import SpaceTimeFFN
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX, SD3, UNET, WAN

pytestmark = support.MARKS


def routed(name: str, **options: Any) -> nn.Module:
    return support.realised("raphael", name, **options)


def spaces(model: nn.Module) -> dict[str, SpaceTimeFFN]:
    return {path: m for path, m in model.named_modules() if isinstance(m, SpaceTimeFFN)}


def stirred(module: nn.Module) -> nn.Module:
    """Give everything that starts at zero, and the routers, values of weight."""
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if not parameter.any() or "router" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.3)
    return module


def written_out(
    layer: SpaceTimeFFN, x: Tensor, time: Tensor, words: Tensor, q: Tensor, k: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the layer's output and the maps, sample by sample and word by word."""
    mlp, w, se = layer.time.router.scorer, layer.time.experts.weights(), layer.space.experts.weights()
    r, act = layer.space.router, layer.time.experts.act
    tokens, count = x.shape[1], words.shape[1]
    rows, maps = [], torch.zeros(x.shape[0], count, tokens, dtype=x.dtype)
    for b in range(x.shape[0]):
        logits = F.gelu(time[b] @ mlp.w_in.T + mlp.b_in) @ mlp.w_out.T + mlp.b_out
        e, p = int(logits.argmax()), logits.softmax(-1)
        h = act(x[b] @ w.w_in[e].T + w.b_in[e]) @ w.w_out[e].T
        h = h * (1 + p[e] - p[e].detach()) + w.b_out
        first = count if layer.words_first and k.shape[2] > count else 0
        keys = k[b, :, :count] if first or k.shape[2] == count else k[b, :, tokens:]
        queries = q[b, :, first : first + tokens]
        seen = sum((queries[i] @ keys[i].T / q.shape[-1] ** 0.5).softmax(-1) for i in range(q.shape[1])) / q.shape[1]
        total = torch.zeros_like(h)
        for i in range(count):
            scores = F.gelu(words[b, i] @ r.w_in.T + r.b_in) @ r.w_out.T + r.b_out
            e, p = int(scores.argmax()), scores.softmax(-1)
            mask = (seen[:, i] >= 0.2 * seen[:, i].max()).to(x.dtype).unsqueeze(1)
            y = act((h * mask) @ se.w_in[e].T + se.b_in[e]) @ se.w_out[e].T
            total = total + y * (1 + p[e] - p[e].detach()) / count
        rows.append(h + total)
        maps = torch.cat([maps[:b], seen.T.unsqueeze(0), maps[b + 1 :]])
    return torch.stack(rows), maps


def edge_loss(layer: SpaceTimeFFN, maps: Tensor, edges: Tensor) -> Tensor:
    """Return the focal loss of the head's edges, from probabilities."""
    assert layer.edge is not None
    y = (maps / maps.amax(-1, keepdim=True)).mean(1).view(-1, 1, *edges.shape[1:])
    for i, conv in enumerate(layer.edge.layers):
        y = F.conv2d(y, conv.weight, conv.bias, padding=1)
        y = y if i == 4 else y.clamp(min=0)
    p = 1 / (1 + (-y[:, 0]).exp())
    right = torch.where(edges > 0.5, p, 1 - p)
    return (-0.5 * (1 - right) ** 2 * right.log()).mean()


@pytest.mark.parametrize("first", [None, False, True], ids=["cross", "image first", "words first"])
def test_equations(first: bool | None) -> None:
    layer = next(iter(spaces(stirred(routed(WAN, edge=1.0))).values())).double()
    layer.words_first = bool(first)
    draws = torch.Generator().manual_seed(5)
    width, words_width = layer.time.experts.w_in.shape[-1], layer.space.router.w_in.shape[-1]
    time_width = layer.time.router.scorer.w_in.shape[-1]
    tokens, count = 12, 5
    size = tokens + count * (first is not None)
    shapes = [(2, tokens, width), (2, time_width), (2, count, words_width), (2, 2, size, 8), (2, 2, size, 8)]
    if first is None:
        shapes[4] = (2, 2, count, 8)
    inputs = [torch.randn(s, dtype=torch.float64, generator=draws).requires_grad_() for s in shapes]
    edges = (torch.rand(2, 3, 4, generator=draws) > 0.6).double()
    learnt = [*inputs, *layer.parameters()]
    with given(layer, edges=edges):
        found = layer(*inputs)
    wanted, maps = written_out(layer, *inputs)
    assert float((found - wanted).detach().norm() / wanted.detach().norm()) < 1e-10
    term = layer.space.record.terms["edge"]
    expected = edge_loss(layer, maps, edges)
    assert float(term.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    weight = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view_as(found).cos()
    one = torch.autograd.grad((found * weight).sum() + term, learnt, allow_unused=True)
    two = torch.autograd.grad((wanted * weight).sum() + expected, learnt, allow_unused=True)
    assert sum(g is not None and bool(g.any()) for g in two) > 12
    for a, b in zip(one, two, strict=True):
        assert (a is None or not a.any()) if b is None else float((a - b).norm()) <= 1e-10 * max(float(b.norm()), 1.0)


@pytest.mark.parametrize("name", [SD3, FLUX, UNET, WAN])
def test_models(name: str, tmp_path: Path) -> None:
    model = routed(name)
    layers = spaces(model)
    assert len(layers) == len(model.moefx.report.plan.sites) > 1
    support.check_equal(model, name)
    stirred(model)
    for path, layer in layers.items():
        x, _, words, queries, keys = support.captured(model, name, path, 3)
        block = model.get_submodule(path.rpartition(".")[0])
        crossed = name in (UNET, WAN)
        if crossed:
            attention, start = block.attn2, 0
            projected = attention.to_k(words)
            projected = projected if attention.norm_k is None else attention.norm_k(projected)
        else:
            attention = block.attn
            projected = attention.add_k_proj(words)
            start = 0 if name == FLUX else x.shape[1]
            assert layer.words_first is (name == FLUX)
        made = projected.unflatten(-1, (keys.shape[1], -1))
        if not crossed and attention.norm_added_k is not None:
            made = attention.norm_added_k(made)
        found = keys[:, :, start : start + words.shape[1]]
        torch.testing.assert_close(found, made.transpose(1, 2).detach(), rtol=1e-5, atol=1e-6)
        assert queries.shape[2] == x.shape[1] + (0 if crossed else words.shape[1])
    for training in (True, False):
        model.train(training).zero_grad(set_to_none=True)
        support.call(model, support.inputs(name), grad=True)[0].square().mean().backward()
        for layer in layers.values():
            assert layer.space.router.w_out.grad.any()
            assert layer.time.router.scorer.w_out.grad.any()
            assert layer.space.experts.w_in.grad.any()
    support.check_batch_invariant(model, name)
    if name == WAN:
        support.check_saves(model, name, tmp_path, 1e-6)


def test_refusals_and_edges() -> None:
    with pytest.raises(NothingMatched, match="sees the words"):
        routed(DIT)
    model = routed(WAN, edge=2.0).train()
    tokens = support.captured(model, WAN, next(iter(spaces(model))), 2)[0].shape[1]
    edges = torch.zeros(2, 1, tokens)
    with given(model, edges=edges, edge_samples=torch.tensor([True, False])):
        support.call(model, support.inputs(WAN), grad=True)
        both = moefx.aux_loss(model, balance=0.0, edge=2.0)
        assert float(both.detach()) == pytest.approx(2 * float(moefx.aux_loss(model, balance=0.0, edge=1.0).detach()))
        assert float(both.detach()) > 0
    support.call(model, support.inputs(WAN), grad=True)
    assert "edge" not in next(iter(spaces(model).values())).space.record.terms
    with given(model, edges=edges[0]), pytest.raises(InputError, match="edge map of shape"):
        support.call(model, support.inputs(WAN), grad=True)
