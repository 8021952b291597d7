"""Mixture of heads on whole models: exact at its start, equal to the equations away from it."""

import copy

import pytest
import torch
import torch.nn.functional as F

from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.api import plan, transform, untransform
from moefx.errors import NothingMatched, OptionError
from moefx.graph.inputs import synthesise
from tests.recipe_support import check_agree

NAMES = ["DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel", "UNet2DConditionModel"]


@pytest.mark.parametrize("name", [*NAMES, "WanTransformer3DModel", "SanaTransformer2DModel"])
def test_all_heads_at_zero_routers_is_the_dense_model(name: str) -> None:
    model = zoo.tiny(name).eval()
    dense = copy.deepcopy(model)
    transform(model, recipe="mixture-of-heads")
    inputs = synthesise(dense, batch=3, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], dense(**inputs)[0], rtol=1e-6, atol=1e-7)


def test_an_attention_follows_the_equation() -> None:
    model = randomise_zeros(DiT()).double().eval()
    inputs = (torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.9]).double(), torch.tensor([3, 7]))
    options = {"shared_heads": 1, "active_heads": 2, "router_std": 1.0, "max_error": 10.0}
    transform(model, inputs, recipe="mixture-of-heads", **options)
    attention = model.double().blocks[1].attn
    gate = attention.head_gate
    x = torch.randn(2, 16, 64).double().requires_grad_()
    q, k, v = attention.qkv(x).reshape(2, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    logits = x @ gate.routed_weight.T
    kept = logits.topk(2).indices
    routed = torch.zeros_like(logits).scatter(-1, kept, logits.gather(-1, kept).softmax(-1) * 2)
    balance = (x @ gate.balance_weight.T).softmax(-1) * 2
    gates = torch.cat([balance[..., :1], balance[..., 1:] * routed], dim=-1)
    wanted = attention.proj((heads * gates.unsqueeze(-1)).reshape(2, 16, 64))
    check_agree(attention(x), wanted, [x, gate.routed_weight, gate.balance_weight, attention.qkv.weight])


def test_gates_learn_and_undo_is_bitwise() -> None:
    model = zoo.tiny("FluxTransformer2DModel").eval()
    dense = copy.deepcopy(model)
    inputs = synthesise(dense)
    transform(model, recipe="moh")
    model(**inputs).sample.square().sum().backward()
    gates = {n: p.grad for n, p in model.named_parameters() if "head_gate" in n}
    assert gates
    assert all(g is not None and g.abs().sum() > 0 for g in gates.values())
    untransform(model)
    assert torch.equal(model(**inputs).sample, dense(**inputs).sample)


def test_with_upcycling_on_one_model() -> None:
    model = zoo.tiny("FluxTransformer2DModel").eval()
    dense = copy.deepcopy(model)
    transform(model, passes=["mixture-of-heads", "upcycle"], experts=3, top_k=1)
    inputs = synthesise(dense, batch=3, seed=9)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, dense(**inputs).sample, rtol=1e-4, atol=1e-5)


def test_too_many_heads_and_no_head_are_refused() -> None:
    with pytest.raises(NothingMatched, match="heads of only"):
        plan(zoo.tiny("DiTTransformer2DModel"), recipe="moh", shared_heads=99)
    with pytest.raises(OptionError, match="no head is active"):
        plan(zoo.tiny("DiTTransformer2DModel"), recipe="moh", active_heads=0)
