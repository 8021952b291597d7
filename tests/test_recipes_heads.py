"""Recipes that switch heads and channels: exact at their start, equal to their equations away from it."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx import zoo
from moefx.errors import OptionError
from moefx.graph.inputs import synthesise
from moefx.passes.rewrite import mixture_of_heads
from moefx.routing.heads import HeadGate, QueryGate
from moefx.routing.threshold import ThresholdGate
from tests.recipe_support import check_agree

NAMES = [
    "DiTTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
    "CogVideoXTransformer3DModel",
]
INPUTS = (torch.randn(2, 1, 8, 8).double(), torch.tensor([0.2, 900.0]).double(), torch.tensor([3, 7]))


def dit() -> DiT:
    torch.manual_seed(0)
    return randomise_zeros(DiT()).double().eval()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("recipe", ["dydit", "moh-tuning"])
def test_with_everything_on_it_is_the_dense_model(name: str, recipe: str) -> None:
    model = zoo.tiny(name).eval()
    dense = copy.deepcopy(model)
    options = {"groups": 4} if recipe == "dydit" else {"active_heads": None}
    moefx.transform(model, recipe=recipe, **options)
    inputs = synthesise(dense, batch=3, seed=9)
    output = model(**inputs)[0]
    torch.testing.assert_close(output, dense(**inputs)[0], rtol=1e-5, atol=1e-6)
    output.square().mean().backward()
    routers = {n: p for n, p in model.named_parameters() if ".router." in n}
    assert bool(routers) == (recipe == "dydit")
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in routers.values())


@pytest.mark.parametrize("recipe", ["dydit", "dydit-heads"])
def test_switched_heads_and_channels_follow_the_equations(recipe: str) -> None:
    model = dit()
    moefx.transform(model, INPUTS, recipe=recipe, **({"groups": 4} if recipe == "dydit" else {}))
    block = model.double().blocks[1]
    heads, ffn = block.attn.head_gate, block.mlp
    switches = [heads, ffn.gate] if recipe == "dydit" else [heads]
    for gate in switches:
        torch.nn.init.normal_(gate.router.bias, generator=torch.Generator().manual_seed(3))
        torch.nn.init.normal_(gate.router.tap_weight, std=0.5, generator=torch.Generator().manual_seed(4))
    x, c = torch.randn(2, 16, 64).double().requires_grad_(), torch.randn(2, 64).double().requires_grad_()

    def gates(gate: ThresholdGate) -> torch.Tensor:
        z = c @ gate.router.tap_weight.T + gate.router.bias
        y = torch.sigmoid(z / 5)
        return torch.cat([torch.ones(2, 1), (z > 0) + y - y.detach()], dim=-1)

    assert 0 < (gates(heads)[:, 1:] > 0.5).double().mean() < 1
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
    q, k, v = block.attn.qkv(block.norm1(x) * (1 + scale_a) + shift_a).reshape(2, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)
    heads_out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * gates(heads)[:, None, :, None]
    wanted = x + gate_a * block.attn.proj(heads_out.reshape(2, 16, 64))
    h = block.norm2(wanted) * (1 + scale_m) + shift_m
    if recipe == "dydit":
        mask = gates(ffn.gate).repeat_interleave(64, dim=-1)[:, None]
        hidden = F.gelu((h @ ffn.w_in.T + ffn.b_in) * mask, approximate="tanh")
        wanted = wanted + gate_m * (hidden @ ffn.w_out.T + ffn.b_out)
        weights = [ffn.w_in, ffn.w_out, ffn.b_out]
    else:
        wanted = wanted + gate_m * (F.gelu(ffn.fc1(h), approximate="tanh") @ ffn.fc2.weight.T + ffn.fc2.bias)
        weights = [ffn.fc1.weight, ffn.fc2.weight]
    routers = [p for gate in switches for p in gate.router.parameters()]
    check_agree(block(x, c), wanted, [x, c, *routers, *weights, block.attn.qkv.weight, block.attn.proj.weight])
    with torch.no_grad():  # what is off is cut out
        torch.testing.assert_close(block(x, c), wanted, rtol=1e-10, atol=1e-12)


def test_heads_with_long_queries_follow_the_equation() -> None:
    model = dit()
    moefx.transform(model, INPUTS, recipe="moh-tuning", max_error=10.0)
    attention = model.blocks[1].attn
    assert isinstance(attention.head_gate, QueryGate)
    x = torch.randn(2, 16, 64).double().requires_grad_()
    q, k, v = attention.qkv(x).reshape(2, 16, 3, 4, 16).permute(2, 0, 3, 1, 4)
    heads = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    length = q.square().sum(-1).sqrt()[:, 2:].transpose(1, 2)  # heads 0 and 1 are shared, one of the other two is on
    spread = (length[..., :1] - length[..., 1:]).abs() / 2**0.5
    p = (length / spread).softmax(-1)
    on = torch.stack([length[..., 0] >= length[..., 1], length[..., 0] < length[..., 1]], dim=-1)
    gates = torch.cat([torch.ones(2, 16, 2), on * (1 + p - p.detach())], dim=-1)
    wanted = attention.proj((heads * gates.unsqueeze(-1)).reshape(2, 16, 64))
    check_agree(attention(x), wanted, [x, attention.qkv.weight, attention.proj.weight])


def test_queries_are_read_before_norm_and_rotation() -> None:
    model = zoo.tiny("FluxTransformer2DModel").double()
    inputs = synthesise(model)
    moefx.transform(model, recipe="moh-tuning", max_error=10.0)
    attention = model.transformer_blocks[0].attn
    read: list[torch.Tensor] = []
    attention.head_gate_1.register_forward_hook(lambda _, args, __: read.append(args[0]))
    x: list[torch.Tensor] = []
    attention.to_q.register_forward_hook(lambda _, __, out: x.append(out))
    attention.add_q_proj.register_forward_hook(lambda _, __, out: x.append(out))
    model(**inputs)
    assert any(torch.equal(read[0].flatten(-2), value) for value in x)


def test_heads_of_a_prompt_without_words() -> None:
    model = zoo.tiny("SD3Transformer2DModel")
    inputs = synthesise(model)
    moefx.transform(model, inputs, recipe="moh-tuning", max_error=10.0)
    silent = inputs | {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :0]}
    output = model(**silent)[0]
    assert output.isfinite().all()
    assert output.shape == model(**inputs)[0].shape


def test_a_head_off_in_joint_attention_is_off_in_both_streams() -> None:
    model = zoo.tiny("FluxTransformer2DModel").double()
    moefx.transform(model, recipe="dydit-heads")
    block = model.transformer_blocks[0]
    assert sum(isinstance(m, ThresholdGate) for m in block.modules()) == 1
    torch.nn.init.constant_(block.attn.head_gate.router.bias, -15.0)
    columns: list[torch.Tensor] = []
    for projection in (block.attn.to_out[0], block.attn.to_add_out):
        projection.register_forward_pre_hook(lambda _, args: columns.append(args[0]))
    model(**synthesise(model))
    assert len(columns) == 2
    assert all(c[..., 16:].abs().max() == 0 and c[..., :16].abs().min() > 0 for c in columns)


@pytest.mark.parametrize("name", ["DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_heads_that_are_off_are_not_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"recipe": "moh", "active_heads": 1, "router_std": 1.0, "max_error": 99.0}
    sparse = moefx.transform(zoo.tiny(name).double(), **options)
    monkeypatch.setattr(mixture_of_heads, "gates_fit_core", lambda _: False)
    masked = moefx.transform(zoo.tiny(name).double(), **options)
    inputs = synthesise(sparse, batch=3, seed=9)
    called: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names(), torch.no_grad():
        sparse(**inputs)
    assert "moefx.head_attention.default" in called
    outputs = [model(**inputs)[0] for model in (sparse, masked)]
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    for a, b in zip(sparse.parameters(), masked.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-11)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    inputs = synthesise(model)
    moefx.transform(model, recipe="dydit", groups=4, budget=0.7, router_bias=0.1, warmup=0.5, losses={"budget": 1.0})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path)
    again = moefx.load(tmp_path)
    assert torch.equal(again(**inputs)[0], model(**inputs)[0])
    gate = next(m for m in again.modules() if isinstance(m, ThresholdGate))
    assert (gate.budget, gate.target.item(), gate.record.coefficients) == (0.7, pytest.approx(0.7), {"budget": 1.0})


def test_budget_is_in_the_auxiliary_loss() -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    moefx.transform(model, recipe="dydit", groups=4, budget=0.25)
    model(**synthesise(model))
    torch.testing.assert_close(moefx.aux_loss(model).detach(), torch.tensor(2 * 0.75**2))
    assert moefx.aux_loss(model).requires_grad


def test_shares_of_heads_and_illegal_options() -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    moefx.transform(model, recipe="moh", shared_heads=0.25, active_heads=0.5, max_error=10.0)
    gate = next(m for m in model.modules() if isinstance(m, HeadGate))
    assert (gate.shared, gate.top_k) == (1, 2)
    assert gate.record.coefficients == {"balance": 0.02}
    for options in ({"shared_heads": 1.5}, {"router_input": "timestep", "shared_heads": 1}):
        with pytest.raises(OptionError, match=r"shared_heads|budget"):
            moefx.plan(zoo.tiny("DiTTransformer2DModel"), recipe="moh", **options)
