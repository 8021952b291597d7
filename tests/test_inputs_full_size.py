"""Example inputs of published models at full size, on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from moefx import zoo
from moefx.graph.inputs import synthesise
from tests.zoo_models import FULL, NAMED, shallow

pytest.importorskip("diffusers")

# Lumina 2 turns its text mask into Python integers, which meta tensors cannot give.
READS_DATA = ("Lumina Image 2.0",)


def output_shape(class_name: str, inputs: dict[str, Any], config: Any) -> tuple[int, ...]:
    """Return the shape of the prediction: that of the latent, with the channels of the output."""
    if class_name == "UVit2DModel":
        batch, rows, columns = inputs["input_ids"].shape
        return batch, config["codebook_size"], rows, columns
    latent: Tensor = inputs.get("hidden_states", inputs.get("sample"))
    shape = list(latent.shape)
    channel = {"QwenImageTransformer2DModel": 2, "CogVideoXTransformer3DModel": 2}.get(class_name, 1)
    if class_name in ("FluxTransformer2DModel", "LTXVideoTransformer3DModel"):
        return tuple(shape)
    if class_name == "HunyuanDiT2DModel":
        shape[1] *= 2 if config["learn_sigma"] else 1
    else:
        shape[channel] = config.get("out_channels") or config["in_channels"]
    if class_name == "QwenImageTransformer2DModel":
        shape[2] *= config["patch_size"] ** 2
    return tuple(shape)


def test_every_named_class_is_here_at_full_size() -> None:
    assert {class_name for class_name, _, _ in FULL.values()} == set(NAMED)


def check(class_name: str, model: Any, *, reads_data: bool) -> None:
    """Assert that the model runs on its example inputs on meta, and returns a prediction of the shape of the latent."""
    inputs = synthesise(model)
    assert {t.device.type for t in pytree.tree_leaves(inputs) if isinstance(t, Tensor)} == {"meta"}
    if reads_data:
        assert inputs["hidden_states"].shape[1] == model.config["in_channels"]
        return
    with torch.no_grad():
        output = model(**inputs)
    output = output if isinstance(output, Tensor) else output[0]
    assert tuple(output.shape) == output_shape(class_name, inputs, model.config)


@pytest.mark.parametrize("name", FULL)
def test_full_width_model_runs_on_meta(name: str) -> None:
    class_name, config = shallow(name)
    model = zoo.from_config(class_name, config, device="meta").eval()
    check(class_name, model, reads_data=name in READS_DATA)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_model_has_its_published_parameters(name: str) -> None:
    class_name, config, millions = FULL[name]
    model = zoo.from_config(class_name, config, device="meta")
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.03)


def test_micro_conditions_of_sdxl_and_its_refiner() -> None:
    for name, ids, pooled in (("SDXL", 6, 1280), ("SDXL refiner", 5, 1280)):
        class_name, config, _ = FULL[name]
        added = synthesise(zoo.from_config(class_name, config, device="meta"))["added_cond_kwargs"]
        assert added["time_ids"].shape == (2, ids)
        assert added["text_embeds"].shape == (2, pooled)
