"""Recipes of routed FFNs: each layer against its equations written out, and each recipe on real denoisers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from moefx.errors import InputError, NothingMatched, OptionError
from moefx.passes.rewrite.routing_options import RoutingOptions
from moefx.recipes import build_passes, get_recipe, recipes
from moefx.routing import RoutedFFN
from tests import recipe_support as support
from tests.recipe_support import DIT, MODELS, SD3, WAN

pytestmark = support.MARKS
# Small numbers of experts, so that every one gets tokens in a tiny model.
SMALL: dict[str, dict[str, Any]] = {
    "dit-moe": {"experts": 4},
    "deepseek-v3": {"experts": 8, "top_k": 3, "select_groups": 4, "keep_groups": 2},
    "ec-dit": {"experts": 4, "every": 1},
    "dynamic-top-p": {"experts": 5, "every": 1},
    "mode": {},
    "nucleus": {"experts": 8, "capacity": 3.0},
    "diffmoe": {"experts": 4, "every": 1},
    "promoe": {"experts": 4, "every": 1},
    "moma": {},
}  # fmt: skip


def realised(recipe: str, name: str) -> nn.Module:
    return support.realised(recipe, name, **SMALL[recipe])


# ------------------------------------------------------------------------------------------------- on real denoisers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", SMALL)
def test_on_models(recipe: str, name: str) -> None:
    model = realised(recipe, name)
    support.check_runs(model, name)
    for training in (True, False):
        support.check_learns(model, name, training=training, routers=recipe != "diffmoe" or training)


def routes_ffns(name: str) -> bool:
    return any(isinstance(rule.options, RoutingOptions) for rule in build_passes(get_recipe(name).passes, {}))


FFN_RECIPES = [recipe.name for recipe in recipes() if routes_ffns(recipe.name)]


@pytest.mark.parametrize("recipe", FFN_RECIPES)
def test_defaults_fit_a_model_and_the_flag_of_the_batch_is_true(recipe: str) -> None:
    found = get_recipe(recipe)
    plan = moefx.plan(support.dense(SD3 if recipe == "raphael" else DIT), recipe=recipe)  # DiT has no words
    assert plan.sites
    alone = all(rule.options.batch_invariant for rule in build_passes(found.passes, {}))
    assert alone is found.choices.batch_invariant
    assert any("depends on what else is in its batch" in line for line in plan.warnings) is not alone


# ---------------------------------------------------------------------------------------------------- equations


def layer_of(recipe: str, name: str = DIT, **options: Any) -> RoutedFFN:
    """Return one routed layer of the recipe in float64, its router made decided."""
    model = support.realised(recipe, name, **SMALL[recipe] | options)
    layer = next(iter(support.layers(model).values())).double()
    assert isinstance(layer, RoutedFFN)
    draws = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64) * 0.6)
    return layer


def width(layer: RoutedFFN) -> int:
    return int(layer.experts.w_in.shape[-1])


def every_expert(layer: RoutedFFN, x: Tensor) -> Tensor:
    """Return the outputs of all experts, [..., E, D], without the hoisted bias."""
    w = layer.experts.weights()
    up = torch.einsum("...d,efd->...ef", x, w.w_in) + (0 if w.b_in is None else w.b_in)
    if w.w_gate is not None:
        hidden = up * F.silu(torch.einsum("...d,efd->...ef", x, w.w_gate))
    else:
        hidden = layer.experts.act(up)
    return torch.einsum("...ef,edf->...ed", hidden, w.w_out)


def mixed(layer: RoutedFFN, x: Tensor, gates: Tensor) -> Tensor:
    """Return Σ_e gates_e E_e(x), the hoisted bias and the shared SwiGLU."""
    y = (gates.unsqueeze(-1) * every_expert(layer, x)).sum(-2)
    if layer.experts.b_out is not None:
        y = y + layer.experts.b_out
    if layer.shared is not None:
        w = layer.shared.weights()
        y = y + (F.silu(x @ w.w_gate.T) * (x @ w.w_in.T)) @ w.w_out.T
    return y


def kept(scores: Tensor, k: int) -> Tensor:
    """Return 1 for the k highest of each row, else 0."""
    return (scores >= scores.sort(-1, descending=True).values[..., k - 1 : k]).double()


def assert_equal(layer: RoutedFFN, expected: Any, *inputs: Tensor) -> None:
    """Compare value and all gradients of the layer with those of ``expected``."""
    torch.manual_seed(0)
    x = inputs[0].requires_grad_()
    learnt = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found, wanted = layer(x, *inputs[1:]), expected(*inputs)
    assert found.shape == wanted.shape
    assert float((found - wanted).detach().norm() / wanted.detach().norm()) < 1e-10
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found).cos()
    one = torch.autograd.grad((found * weight).sum(), learnt, allow_unused=True)
    two = torch.autograd.grad((wanted * weight).sum(), learnt, allow_unused=True)
    assert sum(g is not None for g in two) > 3
    for a, b in zip(one, two, strict=True):
        if b is not None:
            assert a is not None
            assert float((a - b).norm()) <= 1e-10 * max(float(b.norm()), 1.0)
        else:
            assert a is None or not a.any()


def tokens(layer: RoutedFFN, batch: int = 2, count: int = 7) -> Tensor:
    return torch.randn(batch, count, width(layer), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_dit_moe() -> None:
    layer = layer_of("dit-moe")

    def expected(x: Tensor) -> Tensor:
        p = (x @ layer.router.weight.T).softmax(-1)
        return mixed(layer, x, p * kept(p, 2))

    assert layer.shared.w_in.shape[0] * 2 == layer.experts.w_in.shape[1]
    assert_equal(layer, expected, tokens(layer))


def test_deepseek_v3() -> None:
    layer = layer_of("deepseek-v3")
    layer.selection_bias.copy_(torch.linspace(-0.3, 0.3, 8).flip(0))

    def expected(x: Tensor) -> Tensor:
        s = (x @ layer.router.weight.T).sigmoid()
        biased = s + layer.selection_bias
        groups = biased.view(*x.shape[:-1], 4, 2)
        allowed = kept(groups.sum(-1), 2).repeat_interleave(2, -1)
        chosen = kept(biased.masked_fill(allowed == 0, -math.inf), 3)
        return mixed(layer, x, 2.5 * s * chosen / (s * chosen).sum(-1, keepdim=True))

    assert_equal(layer, expected, tokens(layer))


def columns(a: Tensor, capacity: float) -> Tensor:
    """Return 1 where an expert (last axis) is among those that keep a token of its sample (middle axis)."""
    size = math.ceil(a.shape[1] * capacity / a.shape[-1])
    return kept(a.transpose(1, 2), size).transpose(1, 2)


def test_ec_dit() -> None:
    layer = layer_of("ec-dit")

    def expected(x: Tensor) -> Tensor:
        a = (x @ layer.router.weight.T).softmax(-1)
        return mixed(layer, x, a * columns(a, 2.0))

    assert_equal(layer, expected, tokens(layer))


def test_dynamic_top_p() -> None:
    layer = layer_of("dynamic-top-p")

    def expected(x: Tensor) -> Tensor:
        p = (x @ layer.router.weight.T).softmax(-1)
        before = (p.unsqueeze(-2) * (p.unsqueeze(-2) > p.unsqueeze(-1))).sum(-1)
        return mixed(layer, x, p * (before < 0.4))

    x = tokens(layer) / 5
    assert_equal(layer, expected, x)
    assert {2, 3} & set((layer.route(x).experts < 5).sum(-1).tolist())


def test_mode() -> None:
    layer = layer_of("mode").eval()
    t = torch.tensor([3.0, 800.0], dtype=torch.float64)
    s = layer.router.scorer

    def expected(x: Tensor, t: Tensor) -> Tensor:
        rates = torch.exp(torch.arange(128, dtype=torch.float32) * (-math.log(10_000.0) / 128))
        angles = t.float().unsqueeze(-1) * rates  # the sinusoid is float32 whatever the model
        c = torch.cat([angles.cos(), angles.sin()], -1).double()
        p = (F.gelu(c @ s.w_in.T + s.b_in) @ s.w_out.T + s.b_out).softmax(-1)
        g = p * kept(p, 2)
        return mixed(layer, x, (g / g.sum(-1, keepdim=True)).unsqueeze(1))

    assert layer.taps == ("timestep",)
    assert_equal(layer, expected, tokens(layer), t)


def test_nucleus() -> None:
    layer = layer_of("nucleus", WAN)  # its blocks see an embedding of the timestep
    x = tokens(layer)
    t = torch.randn(2, layer.router.scorer.weight.shape[1] - width(layer), dtype=torch.float64)
    plain = torch.randn_like(x)

    def expected(x: Tensor, t: Tensor, plain: Tensor) -> Tensor:
        r = torch.cat([t.unsqueeze(1).expand(-1, x.shape[1], -1), plain], -1)
        a = (r @ layer.router.scorer.weight.T).softmax(-1)
        g = a * columns(a, 3.0)
        return mixed(layer, x, 2.5 * g / (g.sum(-1, keepdim=True) + 1e-300))

    assert layer.taps == ("timestep", "unmodulated")
    assert_equal(layer, expected, x, t, plain)


def test_diffmoe() -> None:
    layer = layer_of("diffmoe").train()

    def expected(x: Tensor) -> Tensor:
        a = (x @ layer.router.weight.T).softmax(-1)
        pool = a.reshape(1, -1, a.shape[-1])
        return mixed(layer, x, a * columns(pool, 1.0).view_as(a))

    x = tokens(layer)
    assert_equal(layer, expected, x)
    a = (x @ layer.router.weight.T).softmax(-1).reshape(1, -1, 4)
    target = columns(a, 1.0)[0]
    predictor = layer.selector.predictor
    logits = F.silu(x.detach().reshape(-1, width(layer)) @ predictor[0].weight.T + predictor[0].bias)
    logits = logits @ predictor[2].weight.T + predictor[2].bias
    p = logits.sigmoid()
    bce = -(target * p.log() + (1 - target) * (1 - p).log()).mean()
    assert float(layer.record.terms["predictor"].detach()) == pytest.approx(float(bce.detach()), rel=1e-6)


def test_promoe() -> None:
    layer = layer_of("promoe")

    def expected(x: Tensor) -> Tensor:
        p = layer.router.scorer.prototypes
        cosine = (x @ p.T) / x.norm(dim=-1, keepdim=True) / p.norm(dim=-1)
        gates = cosine * kept(cosine, 1)
        own = torch.cat([torch.zeros_like(gates), torch.ones_like(gates[..., :1])], -1)
        return mixed(layer, x, torch.where(without.view(-1, 1, 1), own, F.pad(gates, (0, 1))))

    x = tokens(layer)
    without = torch.arange(x.shape[0]) == 1
    with moefx.routing.given(layer, unconditional=without) as told:
        assert told == ["selector"]
        assert_equal(layer, expected, x)
        layer.train()
        assert_equal(layer, expected, x)
    assert layer.experts.num_experts == 4
    without = torch.zeros(x.shape[0], dtype=torch.bool)
    assert_equal(layer, expected, x)
    with pytest.raises(InputError, match="one truth value per sample"), moefx.routing.given(layer, unconditional=x > 0):
        layer(x)
    with pytest.raises(InputError, match="no layer takes it"), moefx.routing.given(layer, unconditionl=without):
        pass
    p, flat = layer.router.scorer.prototypes, x.reshape(-1, width(layer))
    chosen = ((flat @ p.T) / p.norm(dim=-1)).argmax(-1)
    used = sorted(set(chosen.tolist()))
    means = torch.stack([flat[chosen == e].mean(0) for e in used])
    similar = torch.stack([F.cosine_similarity(p[e].unsqueeze(0), means) for e in used]) / 0.07
    loss = F.cross_entropy(similar, torch.arange(len(used)))
    assert float(layer.record.terms["contrastive"].detach()) == pytest.approx(float(loss.detach()), rel=1e-6)


def test_the_label_that_stands_for_none_chooses_the_unconditional_expert() -> None:
    told = support.realised("promoe", DIT, **SMALL["promoe"])
    read = support.realised("promoe", DIT, **SMALL["promoe"], unconditional="label", null_label=7)
    given = support.inputs(DIT, 3) | {"class_labels": torch.tensor([1, 7, 2])}
    with moefx.routing.given(told, unconditional=torch.tensor([False, True, False])):
        wanted = support.call(told, given)
    assert support.error(support.call(read, given), wanted) == 0
    assert support.error(support.call(told, given), wanted) > 1e-4
    with pytest.raises(OptionError, match="null_label goes with"):
        support.realised("promoe", DIT, unconditional="label")
    with pytest.raises(NothingMatched, match="label"):
        support.realised("promoe", WAN, every=1, unconditional="label", null_label=7)


def test_moma() -> None:
    layer = layer_of("moma").eval()

    def expected(x: Tensor) -> Tensor:
        s = (x @ layer.router.weight.T).sigmoid()
        return mixed(layer, x, s * columns(s.reshape(1, -1, 4), 1.0).view_as(s))

    assert_equal(layer, expected, tokens(layer))
