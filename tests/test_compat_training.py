"""Routed models in training: checkpointing, autocast, averaged weights, casts, copies, state dicts, undo."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from save_support import (
    DIT,
    FLUX,
    MODELS,
    dense_model,
    gradients,
    inputs_of,
    output_of,
    routed_model,
    same_state,
    transformed,
)

import moefx


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    plain, checkpointed = routed_model(name).train(), routed_model(name).train()
    checkpointed.enable_gradient_checkpointing()
    inputs = inputs_of(plain)
    for model in (plain, checkpointed):
        torch.manual_seed(0)  # DiT drops labels at random
        output_of(model, inputs).square().mean().backward()
    wanted, found = gradients(plain), gradients(checkpointed)
    assert wanted.keys() == found.keys()
    assert any("experts" in key for key in found)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_torch_checkpoint_around_blocks(name: str) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

    plain, wrapped = routed_model(name).train(), routed_model(name).train()
    kinds = set(plain._no_split_modules or ["BasicTransformerBlock"])
    apply_activation_checkpointing(wrapped, check_fn=lambda m: type(m).__name__ in kinds)
    inputs = inputs_of(plain)
    for model in (plain, wrapped):
        torch.manual_seed(0)
        output_of(model, inputs).square().mean().backward()
    wanted = gradients(plain)
    found = {key.replace("_checkpoint_wrapped_module.", ""): value for key, value in gradients(wrapped).items()}
    assert wanted.keys() == found.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MODELS)
def test_adamw_with_averaged_weights(name: str) -> None:
    from diffusers.training_utils import EMAModel
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = routed_model(name).train()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=type(model), model_config=model.config)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = inputs_of(model)
    losses = []
    for _ in range(3):
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = output_of(model, inputs).square().mean() + model.moefx.aux_loss()
        loss.backward()
        optimizer.step()
        ema.step(model.parameters())
        averaged.update_parameters(model)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    state = model.state_dict()
    assert any("experts" in key and not torch.equal(state[key], start[key]) for key in state)
    ema.copy_to(model.parameters())
    key = next(k for k, _ in model.named_parameters() if "experts.w_in" in k)
    assert not torch.equal(model.state_dict()[key], start[key])
    averaged.eval()
    torch.testing.assert_close(output_of(averaged.module, inputs), output_of(averaged, inputs))


def test_ema_that_saves_itself_from_a_config_is_refused(tmp_path: object) -> None:
    from diffusers.training_utils import EMAModel

    model = routed_model(DIT)
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    with pytest.raises(moefx.MoefxError, match="a config alone does not say how"):
        ema.save_pretrained(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of the dense model's own norms
@pytest.mark.parametrize("name", MODELS)
def test_autocast(name: str) -> None:
    model = routed_model(name)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = output_of(model, inputs)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), wanted, rtol=0.1, atol=0.1)
    found.float().square().mean().backward()
    assert all(torch.isfinite(g).all() for g in gradients(model).values())
    assert all(p.dtype == torch.float32 for p in model.parameters())


CASTS = [
    (DIT, torch.bfloat16),
    (DIT, torch.float16),
    (DIT, torch.float64),
    (FLUX, torch.bfloat16),
    (FLUX, torch.float64),
]


def cast_inputs(model: torch.nn.Module, dtype: torch.dtype) -> dict[str, object]:
    found = inputs_of(model).items()
    return {k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in found}


@pytest.mark.parametrize(("name", "dtype"), CASTS)
def test_casts(name: str, dtype: torch.dtype) -> None:
    model = routed_model(name)
    inputs = inputs_of(model)
    wanted = output_of(model, inputs)
    cast = cast_inputs(model, dtype)
    found = output_of(model.to(dtype), cast)
    assert found.dtype == dtype
    assert model.dtype == dtype
    tolerance = 1e-5 if dtype is torch.float64 else 0.1
    torch.testing.assert_close(found.float(), wanted, rtol=tolerance, atol=tolerance)


def test_half_after_a_capture_that_branches_on_half_is_refused() -> None:
    # A block of FLUX clips its values in float16 alone, so a capture in float32 does not know of it.
    model = routed_model(FLUX)
    cast = cast_inputs(model, torch.float16)
    with pytest.raises(moefx.MoefxError, match="float16"):
        output_of(model.half(), cast)


def test_half_before_the_transform_works() -> None:
    dense = dense_model(FLUX).half()
    cast = cast_inputs(dense, torch.float16)
    wanted = output_of(dense, cast)
    model = moefx.transform(dense, cast, experts=4, noise=0.001, max_error=10.0)
    torch.testing.assert_close(output_of(model, cast), wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", MODELS)
def test_deepcopy_is_independent(name: str) -> None:
    model = routed_model(name)
    twin = copy.deepcopy(model)
    assert type(twin) is type(model)
    assert same_state(model, twin)
    inputs = inputs_of(model)
    before = output_of(model, inputs)
    assert torch.equal(output_of(twin, inputs), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert torch.equal(output_of(model, inputs), before)
    assert twin.moefx is not model.moefx
    assert twin.moefx.routing.keys() == model.moefx.routing.keys()
    output_of(twin, inputs)
    assert twin.moefx.aux_loss() is not model.moefx.aux_loss()


@pytest.mark.parametrize("name", MODELS)
def test_copies_can_be_untransformed(name: str) -> None:
    dense = dense_model(name)
    twin = copy.deepcopy(transformed(name))
    moefx.untransform(twin)
    assert same_state(dense, twin)
    assert torch.equal(output_of(dense), output_of(twin))


@pytest.mark.parametrize("name", MODELS)
def test_state_dict_through_torch_save(name: str) -> None:
    model, other = routed_model(name), transformed(name, noise=0.2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same_state(model, other)
    assert torch.equal(output_of(model), output_of(other))


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_state_dict_does_not_load_silently(name: str) -> None:
    model = routed_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.w_in"):
        model.load_state_dict(dense_model(name).state_dict())
    assert before.keys() == model.state_dict().keys()


def test_pickle_of_a_module_tier_model_works() -> None:
    model = routed_model(DIT)
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert same_state(model, again)
    assert torch.equal(output_of(model), output_of(again))


def test_pickle_of_a_rewritten_block_is_refused_with_the_reason() -> None:
    with pytest.raises(moefx.MoefxError, match="pickle a rewritten FluxSingleTransformerBlock"):
        pickle.dumps(routed_model(FLUX))


@pytest.mark.parametrize("name", MODELS)
def test_a_second_transform_by_the_same_pass_is_refused(name: str) -> None:
    model = routed_model(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(moefx.MoefxError, match="by the same pass before"):
        moefx.transform(model, experts=4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", MODELS)
def test_untransform_to_the_bit(name: str) -> None:
    dense, model = dense_model(name), transformed(name)
    output_of(model).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if "experts" in str(parameter.shape):
                parameter.mul_(2)
    moefx.untransform(model)
    assert type(model) is type(dense)
    assert [type(m) for m in model.modules()] == [type(m) for m in dense.modules()]
    assert list(model.state_dict()) == list(dense.state_dict())
    assert same_state(model, dense)
    assert dict(model.config) == dict(dense.config)
    assert torch.equal(output_of(model), output_of(dense))
    assert not hasattr(model, "moefx")
    again = moefx.transform(model, experts=4, noise=0.05, max_error=10.0)
    assert type(again).__name__ == f"Moefx{name}"


@pytest.mark.parametrize("name", MODELS)
def test_names_outside_the_sites_are_kept(name: str) -> None:
    dense, model = dense_model(name), routed_model(name)
    assert isinstance(model, type(dense))
    assert dict(model.config) == dict(dense.config)
    touched = {weight for plan in model.moefx.plans for site in plan.sites for weight in site.weights}
    touched |= {weight.replace(".weight", ".bias") for weight in touched}
    kept = dense.state_dict().keys() - touched
    assert len(kept) > 0.6 * len(dense.state_dict())
    assert all(torch.equal(model.state_dict()[k], dense.state_dict()[k]) for k in kept)
    assert model._no_split_modules == dense._no_split_modules
