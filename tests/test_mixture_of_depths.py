"""Mixture of depths on whole models: bitwise dense at capacity 1, equal to the equations below it."""

import copy

import pytest
import torch

from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.api import plan, transform, untransform
from moefx.errors import NothingMatched, OptionError
from moefx.graph import trace
from moefx.graph.inputs import synthesise
from tests.recipe_support import check_agree


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "PixArtTransformer2DModel", "UNet2DConditionModel"])
def test_capacity_one_is_the_dense_model_to_the_bit(name: str) -> None:
    model = zoo.tiny(name).eval()
    dense = copy.deepcopy(model)
    transform(model, recipe="mixture-of-depths", every=1)
    inputs = synthesise(dense, batch=3, seed=9)
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, dense(**inputs).sample)


def _dit() -> tuple[DiT, tuple[torch.Tensor, ...]]:
    model = randomise_zeros(DiT()).double().eval()
    return model, (torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.9]).double(), torch.tensor([3, 7]))


def test_a_block_follows_the_equation() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="mixture-of-depths", capacity=0.5, router_std=1.0, every=1, max_error=10.0)
    block, dense_forward = model.double().blocks[1], type(model.blocks[1]).__mro__[1].forward
    x, c = torch.randn(2, 16, 64).double().requires_grad_(), torch.randn(2, 64).double().requires_grad_()
    router = block.token_router
    wanted = x.clone()
    for b in range(2):
        r = x[b] @ router.weight[0] + router.bias
        chosen = sorted(r.topk(8).indices.tolist())
        update = dense_forward(block, x[b : b + 1, chosen], c[b : b + 1])[0] - x[b, chosen]
        wanted[b, chosen] = x[b, chosen] + r[chosen, None] * update
    check_agree(block(x, c), wanted, [x, c, router.weight, router.bias, block.attn.qkv.weight, block.mlp.fc1.weight])


def test_router_learns_and_skipped_tokens_pass_gradients() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="mixture-of-depths", capacity=0.5, router_std=1.0, max_error=10.0)
    model(*inputs).square().sum().backward()
    gradient = model.blocks[0].token_router.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_trace_and_undo() -> None:
    model, inputs = _dit()
    dense = copy.deepcopy(model)
    transform(model, inputs, recipe="mixture-of-depths", capacity=0.5, router_std=1.0, max_error=10.0)
    out = model(*inputs)
    torch.testing.assert_close(trace(model, inputs)(*inputs), out)
    untransform(model)
    assert torch.equal(model(*inputs), dense(*inputs))


@pytest.mark.parametrize(
    ("name", "reason"), [("SanaTransformer2DModel", "neighbouring"), ("UNet2DModel", "no module|batch, tokens")]
)
def test_blocks_whose_tokens_are_not_independent_of_place_are_left_dense(name: str, reason: str) -> None:
    with pytest.raises(NothingMatched, match=reason):
        plan(zoo.tiny(name), recipe="mixture-of-depths")


def test_capacity_zero_is_refused() -> None:
    with pytest.raises(OptionError, match="capacity"):
        plan(zoo.tiny("DiTTransformer2DModel"), recipe="mixture-of-depths", capacity=0.0)


def test_a_capacity_below_one_token_leaves_all_as_they_are() -> None:
    model, inputs = _dit()
    transform(model, inputs, recipe="mixture-of-depths", capacity=0.05, every=1, max_error=10.0, verify=False)
    x, c = torch.randn(2, 16, 64).double(), torch.randn(2, 64).double()
    assert torch.equal(model.blocks[0](x, c), x)
