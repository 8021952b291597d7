"""Pipelines of diffusers with a routed transformer: they sample, and are saved and loaded in a fresh process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from save_support import DIT, FLUX, inputs_of, run_python, same_state

import moefx
from moefx.zoo import tiny

TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

# What a fresh process does: load the pipeline from argv[1] without the components argv[3:], sample, write to argv[2].
LOAD = """
import sys
import torch
import diffusers
from test_save_pipelines import sample
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], **dict.fromkeys(sys.argv[3:]))
torch.save(sample(pipe), sys.argv[2])
print(type(pipe.transformer).__name__)
"""


def dit_pipeline(transformer: Any) -> Any:
    """Return a DiTPipeline around ``transformer``, with a tiny autoencoder."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=10).eval()
    return DiTPipeline(transformer=transformer, vae=vae, scheduler=DDIMScheduler())


def flux_pipeline(transformer: Any) -> Any:
    """Return a FluxPipeline around ``transformer`` without text encoders."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=transformer.config.in_channels // 4,
        sample_size=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()
    return FluxPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        **dict.fromkeys(TEXT),
    )


def dense_one(name: str) -> Any:
    """Return a tiny transformer; DiTPipeline takes 1000 labels and learned variances for granted."""
    return tiny(name, num_embeds_ada_norm=1000, out_channels=8) if name == DIT else tiny(name)


def routed(model: Any) -> Any:
    """Return the transformer after a transform for the way in which its pipeline calls it."""
    if type(model).__name__ == DIT:
        return moefx.transform(model, experts=4, noise=0.05, max_error=10.0)
    # FluxPipeline passes an empty dict where the model's own default is None.
    inputs = inputs_of(model)
    return moefx.transform(model, inputs, experts=4, noise=0.05, max_error=10.0)


def sample(pipe: Any) -> torch.Tensor:
    """Return the images of two steps."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    if type(pipe).__name__ == "DiTPipeline":
        images = pipe([1], generator=generator, num_inference_steps=2, output_type="np").images
    else:
        config = pipe.transformer.config
        draws = torch.Generator().manual_seed(1)
        images = pipe(
            prompt_embeds=torch.randn(1, 5, config.joint_attention_dim, generator=draws),
            pooled_prompt_embeds=torch.randn(1, config.pooled_projection_dim, generator=draws),
            height=8,
            width=8,
            num_inference_steps=2,
            generator=generator,
            output_type="np",
        ).images
    return torch.as_tensor(images)


PIPELINES = {DIT: dit_pipeline, FLUX: flux_pipeline}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_samples_as_the_dense_one_does(name: str) -> None:
    pipe = PIPELINES[name](dense_one(name))
    wanted = sample(pipe)
    routed(pipe.transformer)
    assert type(pipe.transformer).__name__ == f"Moefx{name}"
    found = sample(pipe)
    assert torch.isfinite(found).all()
    assert found.std() > 0
    assert not torch.equal(found, wanted)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_round_trip_through_a_fresh_process(name: str, tmp_path: Path) -> None:
    pipe = PIPELINES[name](routed(dense_one(name)))
    wanted = sample(pipe)
    pipe.save_pretrained(tmp_path / "pipe")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["moefx", f"Moefx{name}"]
    without = TEXT if name == FLUX else ()
    done = run_python("import moefx\n" + LOAD, tmp_path / "pipe", tmp_path / "images.pt", *without)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == f"Moefx{name}"
    assert torch.equal(torch.load(tmp_path / "images.pt", weights_only=True), wanted)


# A process without moefx: loading must fail, whichever loader is told to read which folder.
WITHOUT = """
import sys
import diffusers
for what, load in (
    ("pipeline", lambda: diffusers.DiffusionPipeline.from_pretrained(sys.argv[1])),
    ("dense class", lambda: getattr(diffusers, sys.argv[2]).from_pretrained(sys.argv[1], subfolder="transformer")),
    ("auto class", lambda: diffusers.AutoModel.from_pretrained(sys.argv[1], subfolder="transformer")),
):
    try:
        load()
    except Exception as error:
        print(what, "refused:", " ".join(str(error).split()))
    else:
        print(what, "LOADED")
assert "moefx" not in sys.modules
"""


@pytest.mark.slow
def test_a_process_without_moefx_is_refused(tmp_path: Path) -> None:
    dit_pipeline(routed(dense_one(DIT))).save_pretrained(tmp_path / "pipe")
    done = run_python(WITHOUT, tmp_path / "pipe", DIT)
    assert done.returncode == 0, done.stderr
    assert "LOADED" not in done.stdout
    pipeline, dense, auto = done.stdout.splitlines()
    assert "moefx" in pipeline
    assert "Unknown quantization type, got moefx" in dense
    assert "refused" in auto


def test_a_transformer_rewritten_inside_the_pipeline(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = dit_pipeline(dense_one(DIT))
    routed(pipe.transformer)
    pipe.save_pretrained(tmp_path / "pipe", variant="fp16", max_shard_size="100KB")
    index = json.loads((tmp_path / "pipe" / "model_index.json").read_text())
    assert index["transformer"] == ["moefx", f"Moefx{DIT}"]
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipe", variant="fp16", torch_dtype=torch.float32)
    assert same_state(again.transformer, pipe.transformer)
    assert torch.equal(sample(again), sample(pipe))


def test_saving_over_an_older_dense_pipeline(tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipe = dit_pipeline(dense_one(DIT))
    pipe.save_pretrained(tmp_path / "pipe")
    pipe.transformer = routed(pipe.transformer)
    pipe.save_pretrained(tmp_path / "pipe")
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(sample(again), sample(pipe))
    pipe.transformer = moefx.untransform(pipe.transformer)
    pipe.save_pretrained(tmp_path / "dense")
    stock = DiffusionPipeline.from_pretrained(tmp_path / "dense")
    assert type(stock.transformer).__module__.startswith("diffusers.")
    assert same_state(stock.transformer, dense_one(DIT))


def test_a_pipeline_takes_a_loaded_transformer(tmp_path: Path) -> None:
    model = routed(dense_one(FLUX))
    moefx.save(model, tmp_path / "model")
    assert torch.equal(sample(flux_pipeline(moefx.load(tmp_path / "model"))), sample(flux_pipeline(model)))
