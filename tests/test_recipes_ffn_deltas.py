"""Recipes whose experts are no FFNs of their own: deltas, masks, mixed weights, cheap experts; hard time experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moefx
from moefx.routing.prior import match_units, prior_loss, prior_map
from moefx.routing.router import sinusoidal
from moefx.training import step_schedules
from tests import recipe_support as support
from tests.recipe_support import DIT, MODELS
from tests.test_recipes_ffn import assert_equal, kept, tokens

pytestmark = support.MARKS
SMALL: dict[str, dict[str, Any]] = {
    "lora-moe": {"rank": 3, "alpha": 6.0},
    "ppap": {"rank": 3},
    "timestep-lora": {"experts": 7, "intervals": [4, 2, 1], "rank": 3},
    "switch-dit": {},
    "remix-dit": {},
    "raphael": {"space_experts": 0},
    "moe++": {"experts": 7},
}
EXACT = set(SMALL) - {"moe++"}


def stirred(model: nn.Module) -> nn.Module:
    """Draw every zero parameter of the routed layers anew, so that experts differ."""
    draws = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for layer in support.layers(model).values():
            for parameter in layer.parameters():
                if not parameter.any():
                    parameter.copy_(torch.randn(parameter.shape, generator=draws) * 0.2)
            for parameter in getattr(layer, "mixed", nn.ParameterDict()).values():
                parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.05)
    return model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", SMALL)
def test_on_models(recipe: str, name: str) -> None:
    model = support.realised(recipe, name, **SMALL[recipe])
    support.check_runs(model, name)
    if recipe in EXACT:
        support.check_equal(model, name)
    stirred(model)
    for training in (True, False):
        support.check_learns(model, name, training=training, routers=recipe != "ppap")


def layer_of(recipe: str, **options: Any) -> Any:
    """Return one routed layer in float64 with experts that differ and a decided router."""
    model = stirred(support.realised(recipe, DIT, **SMALL[recipe] | options))
    layer = next(iter(support.layers(model).values())).double()
    draws = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draws, dtype=torch.float64) * 0.6)
    return layer


def delta(layer: Any, name: str, x: Tensor, gates: Tensor) -> Tensor:
    """Return s Σ_e g_e B_e A_e x; gates [..., E]."""
    experts = layer.experts
    rank = torch.einsum("...d,erd->...er", x, getattr(experts, f"a_{name}"))
    rows = torch.einsum("...er,eor->...eo", rank, getattr(experts, f"b_{name}"))
    return experts.scaling * (gates.unsqueeze(-1) * rows).sum(-2)


def with_deltas(layer: Any, x: Tensor, gates: Tensor) -> Tensor:
    """Return the dense FFN with deltas on the maps that have them."""
    w = layer.experts.dense.weights()
    up = x @ w.w_in.T + w.b_in
    if layer.experts.a_in is not None:
        up = up + delta(layer, "in", x, gates)
    hidden = layer.experts.dense.act(up)
    return hidden @ w.w_out.T + w.b_out + delta(layer, "out", hidden, gates)


def narrow(layer: Any) -> Tensor:
    width = layer.experts.dense.w_in.shape[1]
    return torch.randn(2, 7, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_lora_moe() -> None:
    layer = layer_of("lora-moe")

    def expected(x: Tensor) -> Tensor:
        p = (x @ layer.router.weight.T).softmax(-1)
        return with_deltas(layer, x, p * kept(p, 1))

    assert layer.experts.a_in is None
    assert layer.experts.scaling == 2
    assert_equal(layer, expected, narrow(layer))


TIMES = torch.tensor([130.0, 870.0], dtype=torch.float64)


def test_ppap() -> None:
    layer = layer_of("ppap")
    assert_equal(
        layer,
        lambda x, t: with_deltas(layer, x, F.one_hot(torch.tensor([0, 4]), 5).double().unsqueeze(1)),
        narrow(layer),
        TIMES,
    )


def test_timestep_lora() -> None:
    layer = layer_of("timestep-lora")

    def expected(x: Tensor, t: Tensor) -> Tensor:
        gates = x @ layer.router.weight.T + (sinusoidal(t, 256).double() @ layer.router.tap_weight.T).unsqueeze(1)
        core = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1]]).double()
        coarse = torch.tensor([[1, 0, 1], [0, 1, 1]]).double().unsqueeze(1) * gates[..., 4:]
        return with_deltas(layer, x, torch.cat([core.unsqueeze(1).expand(2, 7, 4), coarse], -1))

    assert_equal(layer, expected, narrow(layer), TIMES)


def test_raphael() -> None:
    layer = layer_of("raphael").eval()
    s = layer.router.scorer

    def expected(x: Tensor, t: Tensor) -> Tensor:
        logits = F.gelu(sinusoidal(t, 256).double() @ s.w_in.T + s.b_in) @ s.w_out.T + s.b_out
        p, rows, w = logits.softmax(-1), [], layer.experts.weights()
        for b in range(2):
            e = int(logits[b].argmax())
            y = layer.experts.act(x[b] @ w.w_in[e].T + w.b_in[e]) @ w.w_out[e].T
            rows.append(y * (1 + p[b, e] - p[b, e].detach()) + w.b_out)
        return torch.stack(rows)

    assert_equal(layer, expected, tokens(layer), TIMES)


def test_moe_plus_plus() -> None:
    layer = layer_of("moe++", state="none")
    cheap, s = layer.experts, layer.router.scorer
    x = torch.randn(2, 40, cheap.experts.w_in.shape[2], dtype=torch.float64)

    def expected(x: Tensor) -> Tensor:
        p = (torch.tanh(x @ s.w_in.T + s.b_in) @ s.w_out.T + s.b_out).softmax(-1)
        g = p * kept(p, 2)
        g = torch.cat([g[..., :3], 0 * g[..., 3:4], g[..., 4:]], -1)
        g = g / g.sum(-1, keepdim=True)
        w = cheap.experts.weights()
        up = torch.einsum("...d,efd->...ef", x, w.w_in) + w.b_in
        outputs = list(torch.einsum("...ef,edf->...ed", cheap.experts.act(up), w.w_out).unbind(-2))
        outputs += [torch.zeros_like(x), x]
        for c in range(2):
            a = (x @ cheap.w_mix[c].T).softmax(-1)
            outputs.append(a[..., :1] * x + a[..., 1:] * cheap.value[c])
        return (g.unsqueeze(-1) * torch.stack(outputs, -2)).sum(-2) + w.b_out

    assert_equal(layer, expected, x)
    assert set(layer.route(x).experts.flatten().tolist()) == set(range(7))
    p = layer.router(x).softmax(-1).reshape(-1, 7)
    fraction = torch.stack([(layer.route(x).experts == e).any(-1).double().mean() for e in range(7)])
    eta = torch.tensor([1, 1, 1, 0.75, 0.75, 0.75, 0.75]).double()
    wanted = float((eta * fraction * p.mean(0)).sum().detach())
    assert float(layer.record.terms["weighted_balance"].detach()) == pytest.approx(wanted, rel=1e-6)


def test_a_token_that_chose_zero_experts_only_gets_the_bias() -> None:
    layer = layer_of("moe++", state="none")
    x = torch.randn(3, cheap_width(layer), dtype=torch.float64)
    y = layer.experts(x, torch.tensor([[3, 3], [3, 0], [4, 3]]), torch.full((3, 2), 0.5, dtype=torch.float64))
    bias = layer.experts.experts.b_out
    assert torch.equal(y[0], bias)
    assert torch.allclose(y[2], x[2] + bias)


def cheap_width(layer: Any) -> int:
    return int(layer.experts.experts.w_in.shape[2])


def test_remix_dit() -> None:
    layer = layer_of("remix-dit")
    x = torch.randn(2, 7, layer.mixed["w_in"].shape[-1], dtype=torch.float64)

    def expected(x: Tensor, t: Tensor) -> Tensor:
        rows = []
        for b, e in enumerate((1, 6)):
            a = layer.router.table[e].softmax(0)
            w = {name: sum(a[k] * value[k] for k in range(4)) for name, value in layer.mixed.items()}
            rows.append(layer.act(x[b] @ w["w_in"].T + w["b_in"]) @ w["w_out"].T + w["b_out"])
        return torch.stack(rows)

    assert_equal(layer, expected, x, TIMES)
    both = layer(x, TIMES)
    assert torch.allclose(both[1:], layer(x, TIMES[1])[1:])
    target = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    wanted = F.cross_entropy(layer.router.table, target)
    assert float(layer.record.terms["prior"].detach()) == pytest.approx(float(wanted.detach()))
    step_schedules(layer, 0.75)
    assert layer.record.coefficients["prior"] == pytest.approx(2.5e-5)


def test_switch_dit() -> None:
    """The rewritten block against the dense block called by hand."""
    model = stirred(support.realised("switch-dit", DIT)).double()
    dense = support.dense(DIT).double()
    block, plain = model.transformer_blocks[1], dense.transformer_blocks[1]
    mask = block.stream_mask.routed
    x = torch.randn(2, 25, 32, dtype=torch.float64).requires_grad_()
    t, label = torch.tensor([130, 870]), torch.tensor([1, 5])
    s = mask.router.scorer
    logits = F.silu(sinusoidal(t, 256)).double() @ s.weight.T + s.bias  # what reads a sinusoid alone is float32
    p = logits.softmax(-1)
    g = (p * kept(p, 2)).unsqueeze(1)
    rows = torch.einsum("btd,eod->bteo", x, mask.experts.weight) + mask.experts.bias
    m = 1 + (g.unsqueeze(-1) * rows).sum(-2)
    wanted = plain(x * m, timestep=t, class_labels=label) + (1 - m) * x
    found = block(x, timestep=t, class_labels=label)
    support.check_agree(found, wanted, [x, s.weight, s.bias, mask.experts.weight, mask.experts.bias])


def test_the_diffusion_prior() -> None:
    prior = prior_map(1000, 28, 3, 2)
    assert prior.shape == (1000, 84)
    assert prior.sum(1).unique().tolist() == [56]
    assert [int(prior[t].argmax()) for t in (0, 250, 500, 750, 999)] == [0, 0, 2, 9, 28]
    shuffled = prior[:, torch.randperm(84, generator=torch.Generator().manual_seed(1))]
    columns = match_units(shuffled, prior)
    assert torch.equal(prior[:, columns], shuffled)  # the cheapest matching undoes a permutation
    rows = prior[[3, 700]]
    p = (rows / 56 * 28).view(2, 28, 3).unbind(1)
    assert float(prior_loss(list(p), rows)) == pytest.approx(0, abs=1e-6)
    uniform = [torch.full((1, 2), 0.5, dtype=torch.float64)]
    one = torch.tensor([[1.0, 0.0]])
    wanted = 0.5 * (0.5 * torch.tensor([0.5 / 0.75]).log() + 0.5 * torch.tensor([0.5 / 0.25]).log())
    wanted = wanted + 0.5 * torch.tensor([1 / 0.75]).log()
    assert float(prior_loss(uniform, one)) == pytest.approx(float(wanted), rel=1e-4)


def test_masks_and_ffns_go_together() -> None:
    model = support.realised("switch-dit", DIT)
    moefx.transform(model, recipe="sparse-upcycling", experts=4, inputs=support.inputs(DIT))
    support.check_equal(model, DIT)
