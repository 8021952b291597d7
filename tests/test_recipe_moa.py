"""Attention experts: exact as copies, equal to their equation as anything else."""

import copy
from pathlib import Path

import pytest
import torch

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.errors import OptionError
from moefx.graph.inputs import synthesise
from moefx.routing.attention_experts import OutputExperts, QueryExperts
from moefx.routing.router import LinearRouter

NAMES = [
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "Lumina2Transformer2DModel",
]
INPUTS = (torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 0.9]).double(), torch.tensor([3, 7]))


@pytest.mark.filterwarnings("ignore::moefx.errors.MoefxWarning")
@pytest.mark.parametrize("name", NAMES)
def test_copies_are_the_dense_model(name: str) -> None:
    model = zoo.tiny(name).eval()
    dense = copy.deepcopy(model)
    moefx.transform(model, recipe="moa", experts=3)
    inputs = synthesise(dense, batch=3, seed=9)
    output = model(**inputs)[0]
    torch.testing.assert_close(output, dense(**inputs)[0], rtol=1e-5, atol=1e-5)
    (output.square().mean() + moefx.aux_loss(model)).backward()
    routers = {n: p for n, p in model.named_parameters() if "query_experts" in n and ".router." in n}
    assert routers
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers.values())


def expected(model: DiT, x: torch.Tensor, k: int) -> torch.Tensor:
    """Every token's every expert, one at a time, as the paper says."""
    attention = model.blocks[1].attn
    queries, outputs = attention.query_experts, attention.output_experts
    batch, tokens, width = x.shape
    _, key, value = attention.qkv(x).reshape(batch, tokens, 3, 4, 16).permute(2, 0, 3, 1, 4)
    logits = x @ queries.router.weight.double().T
    chosen = logits.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    gates = logits.gather(-1, chosen).softmax(-1)
    rows = []
    for b in range(batch):
        for t in range(tokens):
            total = attention.proj.bias if hasattr(attention, "proj") else outputs.b_out
            for j in range(k):
                e = int(chosen[b, t, j])
                q = (queries.w_q[e] @ x[b, t] + queries.b_q[e]).reshape(4, 1, 16)
                heads = ((q @ key[b].transpose(1, 2)) / 4).softmax(-1) @ value[b]
                total = total + gates[b, t, j] * (outputs.w_out[e] @ heads.reshape(width))
            rows.append(total)
    return torch.stack(rows).reshape(x.shape)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_experts_follow_the_equation_forward_and_backward(k: int) -> None:
    torch.manual_seed(0)
    model = randomise_zeros(DiT()).double().eval()
    options = {"experts": 3, "top_k": k, "noise": 0.5, "router_std": 1.0, "max_error": 100.0}
    moefx.transform(model, INPUTS, recipe="moa", **options)
    attention = model.blocks[1].attn
    x = torch.randn(2, 5, 64).double().requires_grad_()
    found, wanted = attention(x), expected(model, x, k)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(found)
    over = [x, attention.query_experts.w_q, attention.output_experts.w_out]
    over += [attention.query_experts.router.weight] if k > 1 else []
    a, b = (torch.autograd.grad((y * weights).sum(), over) for y in (found, wanted))
    for one, two in zip(a, b, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7 if one.dtype is torch.float32 else 1e-10, atol=1e-10)


def test_losses_are_the_released_ones() -> None:
    layer = QueryExperts(LinearRouter(8, 4, std=1.0), torch.randn(4, 6, 8), None, top_k=2, mode="topk_softmax")
    x = torch.randn(3, 5, 8)
    layer(x)
    logits = layer.router(x).reshape(-1, 4)
    p = logits.softmax(-1).sum(0)
    counts = torch.zeros(4).index_add(0, logits.topk(2).indices.flatten(), torch.ones(30))
    switch = 4 * (p / p.sum() * counts / counts.sum()).sum()
    wanted = 0.01 * (switch + 0.1 * logits.logsumexp(-1).square().mean())
    torch.testing.assert_close(moefx.aux_loss(layer), wanted)


def test_dense_queries_and_outputs_are_gone() -> None:
    model = zoo.tiny("FluxTransformer2DModel")
    width = model.single_transformer_blocks[0].proj_out.in_features
    moefx.transform(model, recipe="moa", experts=3, noise=1e-3)
    names = [name for name, _ in model.named_parameters()]
    assert not any("to_q" in n or "add_q_proj" in n or "to_out" in n or "to_add_out" in n for n in names)
    assert any("to_k" in n for n in names)
    assert model.single_transformer_blocks[0].proj_out.in_features == width - 32  # the columns of the FFN stay


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = zoo.tiny("FluxTransformer2DModel")
    inputs = synthesise(model)
    moefx.transform(model, recipe="moa", experts=3, noise=0.1, losses={"balance": 0.5})
    model.save_pretrained(tmp_path)
    again = moefx.load(tmp_path)
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    assert next(m for m in again.modules() if isinstance(m, QueryExperts)).record.coefficients == {"balance": 0.5}


def test_a_sample_does_not_depend_on_its_batch() -> None:
    layer = QueryExperts(LinearRouter(8, 4, std=1.0), torch.randn(4, 6, 8), torch.randn(4, 6), top_k=2)
    out = OutputExperts(torch.randn(4, 8, 6), torch.randn(8))

    def run(x: torch.Tensor) -> torch.Tensor:
        order, offsets, gates, *slots = layer(x)
        return out(order, offsets, gates, *slots)

    x = torch.randn(5, 7, 8)
    torch.testing.assert_close(run(x)[:2], run(x[:2]))
    assert run(x[:, :0]).shape == (5, 0, 8)


def test_impossible_numbers_are_refused() -> None:
    for options in ({"top_k": 3, "experts": 2}, {"normalise": "one_plus_su"}, {"normalise": "soft"}):
        with pytest.raises(OptionError):
            moefx.plan(zoo.tiny("DiTTransformer2DModel"), recipe="moa", **options)
