"""The zoo of tiny denoisers: names, determinism, no dead zeros, refusals."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from moefx import zoo
from moefx.errors import InputError
from moefx.graph.inputs import registered, synthesise

diffusers = pytest.importorskip("diffusers")

# Models of diffusers that predict nothing of a diffusion step: encoders, decoders, projections and base classes.
NOT_DENOISERS = {
    "AudioLDM2ProjectionModel",
    "AutoModel",
    "ConsistencyDecoderVAE",
    "EMAModel",
    "LTX2VideoDiffusionDecoderModel",  # a decoder that runs a whole sampling loop and draws its own noise
    "MiniMaxMusic3RVQDepthDecoder",
    "ModelMixin",
    "OnnxRuntimeModel",
    "StableAudioProjectionModel",
    "UniDiffuserTextDecoder",
    "VQModel",
}


def denoisers() -> set[str]:
    """Return the names of the denoiser classes which diffusers exports."""
    found = set()
    for name in dir(diffusers):
        likely = name.endswith("Model") or any(word in name for word in ("Transformer", "UNet", "Decoder"))
        if (
            not likely
            or name in NOT_DENOISERS
            or any(word in name for word in ("ControlNet", "Autoencoder", "Adapter"))
        ):
            continue
        kind = getattr(diffusers, name)
        if inspect.isclass(kind) and issubclass(kind, nn.Module) and hasattr(kind, "from_config"):
            found.add(name)
    return found


def test_every_denoiser_of_diffusers_is_in_the_zoo() -> None:
    assert denoisers() - set(zoo.names()) == set()


def test_every_tiny_model_has_a_maker() -> None:
    assert set(zoo.names()) - set(registered()) == set()


def test_names_are_sorted() -> None:
    assert zoo.names() == sorted(zoo.names())


def test_weights_depend_on_the_seed_alone() -> None:
    states = [zoo.tiny("FluxTransformer2DModel", seed=seed).state_dict() for seed in (0, 0, 1)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_random_state_and_deterministic_mode_are_as_before() -> None:
    before = torch.get_rng_state(), torch.are_deterministic_algorithms_enabled()
    zoo.tiny("FluxTransformer2DModel")
    assert torch.equal(before[0], torch.get_rng_state())
    assert torch.are_deterministic_algorithms_enabled() == before[1]


@pytest.mark.parametrize("name", ["StableAudio3DiTModel", "PriorTransformer", "ErnieImageTransformer2DModel"])
def test_zero_parameters_are_filled_unless_asked_for(name: str) -> None:
    filled, plain = zoo.tiny(name), zoo.tiny(name, nonzero=False)
    assert all(p.any() for p in filled.parameters())
    assert not all(p.any() for p in plain.parameters())
    assert not filled.training


def test_uninitialised_parameters_are_filled() -> None:
    # The experts of this class are made with torch.empty.
    first, second = (zoo.tiny("NucleusMoEImageTransformer2DModel", nonzero=False).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert all(value.isfinite().all() for value in first.values())


def test_overrides_replace_entries() -> None:
    model = zoo.tiny("DiTTransformer2DModel", num_layers=1, sample_size=6)
    assert len(model.transformer_blocks) == 1  # type: ignore[arg-type]
    assert synthesise(model)["hidden_states"].shape == (2, 4, 6, 6)


def test_tiny_config_is_a_copy() -> None:
    zoo.tiny_config("DiTTransformer2DModel")["num_layers"] = 99
    assert zoo.tiny_config("DiTTransformer2DModel")["num_layers"] == 2


def test_from_config_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"_class_name": "DiTTransformer2DModel"} | zoo.tiny_config("DiTTransformer2DModel")))
    one, two = zoo.from_config("DiTTransformer2DModel", path), zoo.from_config("DiTTransformer2DModel", str(path))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_unknown_class_names_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'FluxTransformer2DModel'"):
        zoo.tiny("FluxTransformerModel")
    with pytest.raises(InputError, match="no model class 'FluxTransformerModel'"):
        zoo.from_config("FluxTransformerModel", {})
    with pytest.raises(InputError, match="no model class 'DDIMScheduler'"):
        zoo.from_config("DDIMScheduler", {})


@pytest.mark.parametrize(("text", "found"), [("{", "Expecting"), ("[1]", "list"), (None, "No such file")])
def test_bad_config_file_is_refused(tmp_path: Path, text: str | None, found: str) -> None:
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=found):
        zoo.from_config("DiTTransformer2DModel", path)
