"""Token recipes against plain implementations of their equations, on shared weights in float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.dit import DiT, modulate
from examples.randomise import randomise_zeros
from moefx import aux_loss
from moefx.api import plan, transform
from moefx.errors import NothingMatched
from moefx.ops import group
from moefx.passes.rewrite.mixture_of_depths import MixtureOfDepthsOptions
from moefx.routing import budget_loss
from moefx.training import step_schedules
from tests import recipe_support

T, D = 16, 32


def _dit(depth: int = 3) -> tuple[DiT, tuple[Tensor, ...]]:
    model = randomise_zeros(DiT(depth=depth, width=D)).double().eval()
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    return model, (x, torch.tensor([0.2, 0.9]).double(), torch.tensor([3, 7]))


def _tokens() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(5)
    return torch.randn(2, T, D, generator=draws).double(), torch.randn(2, D, generator=draws).double()


def _parts(block: Any, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """Return the stream after the attention, and what the FFN adds to it before its weight."""
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
    x = x + gate_a.unsqueeze(1) * block.attn(modulate(block.norm1(x), shift_a, scale_a))
    return x, gate_m.unsqueeze(1) * block.mlp(modulate(block.norm2(x), shift_m, scale_m))


def _agree(found: Tensor, wanted: Tensor, parameters: list[Tensor]) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(found.square().sum(), parameters)
    theirs = torch.autograd.grad(wanted.square().sum(), parameters)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        assert a.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
def test_p_mod(training: bool) -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="p-mod", router_std=1.0, verify=False)
    assert not hasattr(model.blocks[0], "token_router"), "its ratio is 1"
    block = model.blocks[1].train(training)
    x, c = _tokens()
    router = block.token_router
    assert router.capacity == pytest.approx(0.5)
    w = 1 + 0.2 * torch.tanh(x @ router.weight.double()[0] + router.bias.double())
    rows = []
    for b in range(2):
        chosen = sorted(w[b].topk(8).indices.tolist())
        middle, ffn = _parts(block, x[b : b + 1, chosen], c[b : b + 1])
        out = w[b, :, None] * x[b]
        out[chosen] = middle[0] + w[b, chosen, None] * ffn[0]
        rows.append(out)
    _agree(block(x, c), torch.stack(rows), [router.weight, router.bias, block.mlp.fc1.weight])


def test_p_mod_starts_with_weights_of_one_and_spread_tokens() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="p-mod", verify=False)
    chosen, weights = model.blocks[1].token_router(_tokens()[0])
    assert (weights == 1).all()
    assert chosen[0].diff().max() <= 4


@pytest.mark.parametrize(("recipe", "factor"), [("p-mod", 1.0), ("gamma-mod", 0.5)])
def test_with_all_tokens_the_start_is_the_dense_block_with_a_factor_on_its_ffn(recipe: str, factor: float) -> None:
    model, inputs = _dit()
    options = {"capacity": 1.0, "dense_above": 1.0, "dense_first": 0, "dense_last": 0, "router_std": 0.0}
    transform(model, inputs, recipe=recipe, verify=False, **options)
    block, (x, c) = model.blocks[1], _tokens()
    middle, ffn = _parts(block, x, c)
    torch.testing.assert_close(block(x, c), middle + factor * ffn, rtol=1e-12, atol=1e-12)


def test_p_mod_ratios_of_32_layers() -> None:
    options = MixtureOfDepthsOptions(capacity=0.15, capacity_schedule="cosine", dense_above=0.85)
    ratios = [options.capacity_of(layer, 32) for layer in range(32)]
    kept = [1.0 if ratio > options.dense_above else ratio for ratio in ratios]
    assert [ratio == 1.0 for ratio in kept] == [True] * 8 + [False] * 24
    assert kept[8] == pytest.approx(0.844, abs=5e-4)
    assert kept[23] == pytest.approx(0.156, abs=5e-4)
    assert kept[24:] == [0.15] * 8
    assert sum(kept) / 32 == pytest.approx(0.5375, abs=5e-5)
    assert kept[20] == pytest.approx(math.cos(math.pi * 20 / 31) / 2 + 0.5)


def test_gamma_mod() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="gamma-mod", router_std=1.0, dense_first=1, dense_last=0, verify=False)
    assert not hasattr(model.blocks[0], "token_router")
    block, router = model.blocks[1], model.blocks[1].token_router
    assert router is model.blocks[2].token_router
    x, c = _tokens()
    p = (x @ router.weight.double().T).softmax(-1)[..., 1]
    out = x.clone()
    for b in range(2):
        chosen = sorted(p[b].topk(8).indices.tolist())
        middle, ffn = _parts(block, x[b : b + 1, chosen], c[b : b + 1])
        out[b, chosen] = middle[0] + p[b, chosen, None] * ffn[0]
    _agree(block(x, c), out, [router.weight, block.mlp.fc1.weight])
    model.train()
    model(*inputs)
    torch.testing.assert_close(aux_loss(model), 0.01 * router.record.terms["selection"])


def test_the_three_outer_layers_stay_dense() -> None:
    model, inputs = _dit(6)
    made = plan(model, inputs, recipe="gamma-mod")
    assert [site.name for site in made.sites] == ["blocks.3", "blocks.4"]


def test_dydit_tokens() -> None:
    model, inputs = _dit()
    wanted = model(*inputs)
    dense = [{k: v.detach().clone() for k, v in b.mlp.state_dict().items()} for b in model.blocks]
    transform(model, inputs, recipe="dydit-tokens")
    torch.testing.assert_close(model(*inputs), wanted, rtol=1e-12, atol=1e-12)
    block = model.blocks[1]
    select = block.mlp.switch.router
    with torch.no_grad():
        select.bias_out.zero_()
        select.weight_out.copy_(torch.randn_like(select.weight_out))
    x, c = _tokens()

    def plain(x: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * block.attn(modulate(block.norm1(x), shift_a, scale_a))
        z = (x @ select.weight_in.double().T + select.bias_in).relu() @ select.weight_out.double()[0] + select.bias_out
        y = torch.sigmoid(z / 5)
        s = (z > 0).double() + y - y.detach()
        assert 0 < s.detach().mean() < 1
        h = modulate(block.norm2(x), shift_m, scale_m)
        h = h @ block.mlp.experts.w_in[0].T + block.mlp.experts.b_in[0]
        h = torch.nn.functional.gelu(h, approximate="tanh") @ block.mlp.experts.w_out[0].T + block.mlp.b_out
        return x + gate_m.unsqueeze(1) * s.unsqueeze(-1) * h

    assert torch.equal(block.mlp.experts.w_in[0], dense[1]["fc1.weight"])
    weights = [select.weight_in, select.weight_out, select.bias_out, block.mlp.experts.w_in, block.mlp.b_out]
    _agree(block(x, c), plain(x), weights)
    with torch.no_grad():
        torch.testing.assert_close(block(x, c), plain(x), rtol=1e-10, atol=1e-10)
    both = block(x[:1], c[:1])
    torch.testing.assert_close(both, block(x, c)[:1], rtol=1e-10, atol=1e-10)


def test_dydit_tokens_where_the_stream_is_cast_after_the_network_ran() -> None:
    model = recipe_support.realised("dydit-tokens", recipe_support.WAN, verify=False)
    recipe_support.check_runs(model, recipe_support.WAN)
    recipe_support.check_equal(model, recipe_support.WAN)


def test_tokens_that_are_off_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = _dit(1)
    transform(model, inputs, recipe="dydit-tokens", router_start=0.0, max_error=10.0)
    network, x = model.blocks[0].mlp, _tokens()[0]
    seen = []
    monkeypatch.setattr("moefx.ops.group", lambda ids, n: seen.append(group(ids, n)) or seen[-1])
    with torch.no_grad():
        network.switch.router.weight_out.copy_(torch.tensor([[1.0, -1.0]]))
        network(x, x)
    ((_, offsets),) = seen
    on = network.switch.record.load[1] * 2 * T
    assert int(offsets[-1]) == round(float(on))
    assert 0 < int(offsets[-1]) < 2 * T


def test_dydit_budget_follows_the_share_of_the_compute() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="dydit-tokens", budget=0.6, warm_up=0.5)
    model(*inputs)
    switch = model.blocks[0].mlp.switch
    attention, ffn = 4 * D * D + 2 * T * D, 8 * D * D
    assert switch.fixed == pytest.approx(attention / (attention + ffn))
    assert switch.record.terms["share"].item() == pytest.approx(1.0)
    torch.testing.assert_close(budget_loss(model, 0.6), torch.tensor(0.16, dtype=torch.float64))
    step_schedules(model, 0.0)
    model(*inputs)
    assert aux_loss(model).item() == pytest.approx(0.0, abs=1e-9)
    step_schedules(model, 1.0)
    model(*inputs)
    assert aux_loss(model).item() == pytest.approx(2 * 0.16, rel=1e-6)
    assert switch.record.terms["minimum"].item() == 0
    with torch.no_grad():
        switch.router.bias_out.fill_(-35.0)
    model(*inputs)
    assert switch.record.terms["minimum"].item() == pytest.approx(0.1)


def test_capacity_over_the_training_and_over_the_layers() -> None:
    model, inputs = _dit()
    transform(
        model,
        inputs,
        recipe="mod",
        every=1,
        capacity=0.5,
        capacity_schedule="linear",
        warm_up=1.0,
        max_error=10.0,
        verify=False,
    )
    routers = [block.token_router for block in model.blocks]
    assert [router.tokens(T) for router in routers] == [16, 12, 8]
    step_schedules(model, 0.5)
    assert [router.tokens(T) for router in routers] == [16, 14, 12]
    assert model(*inputs).shape == inputs[0].shape


def test_weights_on_the_ffn_need_one() -> None:
    model, inputs = _dit()
    with pytest.raises(NothingMatched, match="keep it dense"):
        plan(model, inputs, recipe="gamma-mod")
