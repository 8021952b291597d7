"""Example inputs: every tiny denoiser runs on them, whatever the batch; errors say what to pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moefx import zoo
from moefx.errors import InputError
from moefx.graph.inputs import Request, register_inputs, registered, synthesise
from tests.zoo_models import NAMED

pytest.importorskip("diffusers")

# What some models say when they run on a CPU and are not compiled.
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
    pytest.mark.filterwarnings("ignore:CPU Autocast only supports:UserWarning"),
]


def tensors(value: Any) -> list[Tensor]:
    """Return the tensors of a model's inputs or outputs."""
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def run(model: nn.Module, inputs: dict[str, Any]) -> list[Tensor]:
    torch.manual_seed(0)  # a few models draw noise inside forward
    with torch.no_grad():
        return tensors(model(**inputs))


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_every_named_model_is_in_the_zoo() -> None:
    assert set(NAMED) <= set(zoo.names())


@pytest.mark.parametrize("name", zoo.names())
def test_runs_finite_deterministic_and_sensitive(name: str) -> None:
    model = zoo.tiny(name)
    once = run(model, synthesise(model))
    assert once
    assert all(t.isfinite().all() for t in once)
    assert any(t.std() > 1e-4 for t in once)
    assert equal(once, run(zoo.tiny(name), synthesise(model)))
    assert not equal(once, run(model, synthesise(model, seed=1)))
    assert not equal(once, run(zoo.tiny(name, seed=1), synthesise(model)))


@pytest.mark.parametrize("name", zoo.names())
def test_batch_is_a_free_choice(name: str) -> None:
    model = zoo.tiny(name)
    three = run(model, synthesise(model, batch=3))
    one = run(model, synthesise(model, batch=1))
    assert sum(t.numel() for t in three) == 3 * sum(t.numel() for t in one)


@pytest.mark.parametrize("name", zoo.names())
def test_inputs_of_a_meta_model_have_the_same_shapes_on_meta(name: str) -> None:
    real, meta = zoo.tiny(name), zoo.from_config(name, zoo.tiny_config(name), device="meta")
    on_meta, on_cpu = tensors(synthesise(meta)), tensors(synthesise(real))
    assert {t.device.type for t in on_meta} == {"meta"}
    assert [(t.shape, t.dtype) for t in on_meta] == [(t.shape, t.dtype) for t in on_cpu]


@pytest.mark.parametrize("name", NAMED)
def test_float_type_follows_the_model(name: str) -> None:
    model = zoo.tiny(name).to(torch.bfloat16)
    inputs = synthesise(model)
    assert any(t.dtype == torch.bfloat16 for t in tensors(inputs))
    assert all(t.isfinite().all() for t in run(model, inputs))


def test_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state()
    synthesise(zoo.tiny("DiTTransformer2DModel"))
    assert torch.equal(before, torch.get_rng_state())


def test_sizes_are_told_apart() -> None:
    inputs = synthesise(zoo.tiny("FluxTransformer2DModel"))
    assert inputs["hidden_states"].shape == (2, 24, 12)
    assert inputs["encoder_hidden_states"].shape == (2, 7, 20)
    assert inputs["img_ids"].shape == (24, 3)
    assert inputs["img_ids"].unique(dim=0).shape == (24, 3)


def test_fixed_position_table_decides_the_size() -> None:
    model = zoo.tiny("PixArtTransformer2DModel", sample_size=12)
    assert synthesise(model)["hidden_states"].shape == (2, 4, 12, 12)


class Unknown(nn.Module):
    """A module without a config."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor, step: torch.LongTensor, scale: float = 1.0) -> Tensor:
        return self.linear(x) * step.float() * scale


def test_unknown_model_says_what_to_pass() -> None:
    with pytest.raises(InputError, match="argument 'x' of forward") as caught:
        synthesise(Unknown())
    text = str(caught.value)
    assert "x: float32 tensor" in text
    assert "step" in text
    assert "register_inputs('Unknown')" in text


class Configured(Unknown):
    """A module with a config that lacks the width of its text."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"in_channels": 3}

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        return hidden_states


def test_missing_config_entry_is_named_with_the_shape() -> None:
    with pytest.raises(InputError, match="'encoder_hidden_states'") as caught:
        synthesise(Configured())
    assert "[batch, text tokens, width of the text encoder]" in str(caught.value)
    assert "'cross_attention_dim'" in str(caught.value)


class Mine(Unknown):
    """A module whose inputs a user registers."""


def test_user_maker_by_class_and_its_subclass() -> None:
    @register_inputs(Mine)
    def mine(request: Request) -> dict[str, Any]:
        return {"x": request.normal(request.batch, 3), "step": request.integers(9, request.batch, 1)}

    class Heir(Mine):
        pass

    model = Heir()
    inputs = synthesise(model, batch=5)
    assert inputs["x"].shape == (5, 3)
    assert run(model, inputs)[0].shape == (5, 3)
    assert "Mine" in registered()


def test_compiled_model_has_the_inputs_of_the_model_inside() -> None:
    model = zoo.tiny("DiTTransformer2DModel")
    inputs = synthesise(torch.compile(model))
    assert equal(tensors(inputs), tensors(synthesise(model)))


def test_main_float_type_wins_over_layers_kept_in_float32() -> None:
    model = zoo.tiny("WanTransformer3DModel").to(torch.bfloat16)
    model.scale_shift_table.data = model.scale_shift_table.data.float()
    assert synthesise(model)["hidden_states"].dtype == torch.bfloat16


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "2"])
def test_bad_batch_is_refused(batch: Any) -> None:
    with pytest.raises(InputError, match="batch size"):
        synthesise(Unknown(), batch=batch)


def test_bad_model_and_bad_registration_are_refused() -> None:
    with pytest.raises(InputError, match="torch"):
        synthesise("FluxTransformer2DModel")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="class names"):
        register_inputs()
