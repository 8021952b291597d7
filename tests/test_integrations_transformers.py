"""Hugging Face MoE models on moefx's operators: equal outputs and gradients, on tiny models with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", minversion="5.0")

from moefx.integrations import register_experts  # noqa: E402

SMALL: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 12, "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "Qwen3Moe": {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 20, "norm_topk_prob": True},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "NemotronH": {
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "n_group": 1, "topk_group": 1,
        "layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 16, "n_shared_experts": 1,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registered() -> None:
    register_experts()
    register_experts()


def tiny(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SMALL | CONFIGS[name], pad_token_id=0)
    torch.manual_seed(0)
    model: nn.Module = getattr(transformers, f"{name}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "experts" in parameter_name or "router" in parameter_name or "gate" in parameter_name:
                parameter.normal_(std=0.3)
    return model


def run(model: Any, implementation: str, tokens: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    logits = model(tokens).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_outputs_and_gradients_equal_the_eager_loop(name: str) -> None:
    model = tiny(name, torch.float64)
    tokens = torch.randint(1, 61, (2, 9))
    want, want_grads = run(model, "eager", tokens)
    got, got_grads = run(model, "moefx", tokens)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)  # routers may compute in float32
    assert set(got_grads) == set(want_grads)
    assert any("experts" in key and bool(grad.any()) for key, grad in got_grads.items())
    for key, grad in got_grads.items():
        torch.testing.assert_close(
            grad, want_grads[key], rtol=1e-5, atol=1e-8, msg=lambda text, key=key: f"{key} {text}"
        )


def test_it_is_really_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from moefx import ops

    model, tokens = tiny("Mixtral"), torch.randint(1, 61, (1, 5))
    called: list[int] = []
    original = ops.group
    monkeypatch.setattr(ops, "group", lambda *a: called.append(1) or original(*a))
    with torch.no_grad():
        model.set_experts_implementation("moefx")  # type: ignore[operator]
        model(tokens)
        model.set_experts_implementation("eager")  # type: ignore[operator]
        model(tokens)
    assert len(called) == 2, "one call per layer, and none when eager"


def test_sentinels_of_expert_parallelism_contribute_nothing() -> None:
    experts = next(m for m in tiny("Mixtral").modules() if type(m).__name__ == "MixtralExperts")
    x, index = torch.randn(7, 24), torch.randint(0, 5, (7, 2))
    gates = torch.rand(7, 2)
    experts.config._experts_implementation = "moefx"
    dropped = index.clone()
    dropped[::2, 1] = 5
    kept = gates.clone()
    kept[::2, 1] = 0
    with torch.no_grad():
        torch.testing.assert_close(experts(x, dropped, gates), experts(x, index, kept))


def test_one_graph_without_breaks() -> None:
    torch.compiler.reset()
    model = tiny("Qwen3Moe")
    model.set_experts_implementation("moefx")  # type: ignore[operator]
    tokens = torch.randint(1, 61, (2, 9))
    with torch.no_grad():
        want = model(tokens).logits
        compiled = torch.compile(model, backend="moefx", fullgraph=True, options={"inner": "eager"})
        torch.testing.assert_close(compiled(tokens).logits, want, rtol=1e-5, atol=1e-5)


def test_without_transformers_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from moefx.errors import MoefxError

    monkeypatch.setitem(sys.modules, "transformers.integrations.moe", None)
    with pytest.raises(MoefxError, match="pip install"):
        register_experts()
