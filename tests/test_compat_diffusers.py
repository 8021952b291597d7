"""Routed models under what diffusers and PEFT do to models: caches, casts, offloading, adapters, compilation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from inductor import linkable
from save_support import (
    DIT,
    FLUX,
    MODELS,
    dense_model,
    gradients,
    inputs_of,
    output_of,
    plain_inputs,
    routed_model,
    routed_plain,
    transformed,
)

import moefx


@pytest.mark.parametrize("name", MODELS)
def test_the_model_has_a_class_that_only_moefx_provides(name: str) -> None:
    model = routed_model(name)
    cls = type(model)
    assert (cls.__module__, cls.__name__) == ("moefx", f"Moefx{name}")
    assert getattr(moefx, f"Moefx{name}") is cls
    assert issubclass(cls, type(dense_model(name)))
    with pytest.raises(moefx.MoefxError, match="load a folder"):
        cls()
    with pytest.raises(moefx.MoefxError, match="load a folder"):
        cls.from_config(model.config)


def test_a_class_that_diffusers_does_not_have_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="0 diffusers models named 'Nonsense'"):
        moefx.MoefxNonsense  # noqa: B018


def test_first_block_cache() -> None:
    from diffusers import FirstBlockCacheConfig

    model = routed_model(FLUX)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    with torch.no_grad(), model.cache_context("cond"):
        first = output_of(model, inputs)
        second = output_of(model, inputs)
    assert torch.equal(first, wanted)
    torch.testing.assert_close(second, wanted, rtol=1e-4, atol=1e-4)
    model.disable_cache()
    assert torch.equal(output_of(model, inputs), wanted)


def test_first_block_cache_skips_the_later_blocks() -> None:
    from diffusers import FirstBlockCacheConfig

    model = routed_model(FLUX)
    inputs = inputs_of(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    calls = []
    model.single_transformer_blocks[-1].moe.register_forward_hook(lambda *args: calls.append(1))
    with torch.no_grad(), model.cache_context("cond"):
        output_of(model, inputs)
        output_of(model, inputs)
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("name", MODELS)
def test_layerwise_casting(name: str) -> None:
    model = routed_model(name)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    dense, plain = dense_model(name), dense_model(name)
    error_of_dense = float((_cast_layerwise(dense, inputs) - output_of(plain, inputs)).detach().norm())
    found = _cast_layerwise(model, inputs)
    assert float((found - wanted).detach().norm()) <= 3 * error_of_dense + 1e-3 * float(wanted.detach().norm())


def _cast_layerwise(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with torch.no_grad():
        return output_of(model, inputs)


def test_group_offload() -> None:
    model = routed_model(FLUX)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    model.enable_group_offload(
        onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, use_stream=False
    )
    with torch.no_grad():
        assert torch.equal(output_of(model, inputs), wanted)


def test_what_the_dense_class_does_not_support_is_refused_as_before() -> None:
    model = routed_model(DIT)
    with pytest.raises(ValueError, match="does not support group offloading"):
        model.enable_group_offload(onload_device=torch.device("cpu"))
    assert not hasattr(dense_model(DIT), "add_adapter")
    assert not hasattr(model, "add_adapter")


def test_group_offload_at_leaf_level() -> None:
    model = routed_model(FLUX)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type="leaf_level", use_stream=False)
    with torch.no_grad():
        assert torch.equal(output_of(model, inputs), wanted)


# ------------------------------------------------------------------------------------------------------------ adapters


def test_lora_on_attention() -> None:
    from peft import LoraConfig

    model = routed_model(FLUX)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    changed = output_of(model, inputs)
    assert not torch.allclose(changed, wanted)
    changed.square().mean().backward()
    found = gradients(model)
    assert found
    assert all("lora_" in key for key in found)
    model.set_adapters(["default"], weights=[0.0])
    torch.testing.assert_close(output_of(model, inputs), wanted)
    model.disable_adapters()
    assert torch.equal(output_of(model, inputs), wanted)
    model.delete_adapters("default")


def test_lora_on_attention_through_peft_alone() -> None:
    from peft import LoraConfig, get_peft_model

    model = routed_model(DIT)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    changed = output_of(adapted, inputs)
    assert not torch.allclose(changed, wanted)
    changed.square().mean().backward()
    assert all("lora_" in key for key in gradients(adapted))
    with adapted.disable_adapter():
        assert torch.equal(output_of(adapted, inputs), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_lora_on_stacked_experts(name: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = routed_model(name)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    targets = [key for key, _ in model.named_parameters() if key.endswith("experts.w_in")]
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    )
    changed = output_of(adapted, inputs)
    assert not torch.allclose(changed, wanted)
    changed.square().mean().backward()
    found = gradients(adapted)
    assert len([k for k in found if "lora_" in k]) == 2 * len(targets)
    with adapted.disable_adapter():
        torch.testing.assert_close(output_of(adapted, inputs), wanted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output_of(merged, inputs), changed, rtol=1e-4, atol=1e-5)


def test_adapters_and_weights_of_the_other_orientation_are_refused(tmp_path: Any) -> None:
    """vLLM issue 52198: adapters of stacked experts were turned, or left out, without a word."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    model = routed_model(DIT)
    state = model.state_dict()
    turned = {key: value.mT.contiguous() if key.endswith("experts.w_in") else value for key, value in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(turned)
    with pytest.raises(moefx.MoefxError, match=r"experts\.w_in is \[.*the model's is"):
        moefx.save(model, tmp_path / "model", state_dict=turned)
    targets = [key for key, _ in model.named_parameters() if key.endswith("experts.w_in")]
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=[], target_parameters=targets))
    adapter = get_peft_model_state_dict(adapted)
    twin = {key: key.translate(str.maketrans("AB", "BA")) for key in adapter}
    other = {key: adapter[twin[key]].mT.contiguous() for key in adapter}
    with pytest.raises(RuntimeError, match="size mismatch"):
        set_peft_model_state_dict(adapted, other)
    assert not set_peft_model_state_dict(adapted, adapter).unexpected_keys
    strange = {key.replace("ff", "ffn"): value for key, value in adapter.items()}
    assert set_peft_model_state_dict(adapted, strange).unexpected_keys


def test_adapters_are_saved_apart(tmp_path: Any) -> None:
    from peft import LoraConfig

    model, other = routed_model(FLUX), routed_model(FLUX)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    with pytest.raises(moefx.MoefxError, match="adapter of PEFT"):
        model.save_pretrained(tmp_path / "model")
    model.save_lora_adapter(tmp_path / "adapter")
    other.load_lora_adapter(tmp_path / "adapter", prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(output_of(other), output_of(model))


def test_untransform_under_an_adapter_of_attention() -> None:
    from peft import LoraConfig

    model, dense = transformed(FLUX), dense_model(FLUX)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    model.delete_adapters("default")
    moefx.untransform(model)
    assert type(model) is type(dense)
    torch.testing.assert_close(output_of(model), output_of(dense))


# ----------------------------------------------------------------------------------------------------------- compilers


@pytest.fixture
def _fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@linkable
def test_inductor_forward_and_backward_in_one_graph() -> None:
    model = routed_plain(depth=1)
    (x,) = plain_inputs()
    wanted = model(x)
    wanted.square().mean().backward()
    expected = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model, backend="inductor", fullgraph=True)
    found = compiled(x)
    found.square().mean().backward()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    compared = gradients(model)
    assert compared.keys() == expected.keys()
    for key, value in compared.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=1e-5)


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_whole_graph_without_recompiling() -> None:
    model = routed_model(FLUX)
    inputs = inputs_of(model)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    torch.testing.assert_close(output_of(compiled, inputs), output_of(model, inputs), rtol=1e-4, atol=1e-5)
    inputs["hidden_states"] = inputs["hidden_states"] * 2
    output_of(compiled, inputs)
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:The .grad attribute of a Tensor")
def test_compile_repeated_blocks() -> None:
    model = routed_model(FLUX)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(output_of(model, inputs), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export(name: str) -> None:
    model = routed_model(name)
    inputs = inputs_of(model) | {"return_dict": False}
    program = torch.export.export(model, (), inputs, strict=False)
    assert any("moefx.grouped_linear" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(**inputs)[0], output_of(model))


def test_lora_on_the_shared_expert_alone() -> None:
    from peft import LoraConfig, get_peft_model

    model = moefx.transform(dense_model(DIT), recipe="dit-moe", experts=3)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    targets = [key for key, _ in model.named_parameters() if key.endswith(("shared.w_in", "shared.w_out"))]
    adapted = get_peft_model(
        model, LoraConfig(r=2, lora_alpha=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
    )
    changed = output_of(adapted, inputs)
    assert not torch.allclose(changed, wanted)
    changed.square().mean().backward()
    found = gradients(adapted)
    assert len(found) == 2 * len(targets) > 0
    assert all("shared" in key and "lora_" in key for key in found)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(output_of(merged, inputs), changed, rtol=1e-4, atol=1e-5)
