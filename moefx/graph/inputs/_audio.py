"""Makers for audio and other one-dimensional denoisers.

Shapes: B batch, C latent channels, A audio frames, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import Request

FRAMES = 24
"""Length A of the latent."""


@register_inputs("AceStepTransformer1DModel")
def ace_step(request: Request) -> dict[str, Any]:
    """Latent [B, A, C] beside context latents, which fill the input channels up; a start and an end time."""
    config, batch = request.config, request.batch
    channels = config["audio_acoustic_hidden_dim"]
    time = request.unit_steps()
    return request.default(
        hidden_states=request.normal(batch, FRAMES, channels),
        timestep=time,
        timestep_r=time * 0.5,
        encoder_hidden_states=request.normal(
            batch, request.text, config["encoder_hidden_size"] or config["hidden_size"]
        ),
        context_latents=request.normal(batch, FRAMES, config["in_channels"] - channels),
    )


@register_inputs("LongCatAudioDiTTransformer")
def longcat_audio(request: Request) -> dict[str, Any]:
    """Latent [B, A, C] and, for continuation, another like it."""
    config, batch = request.config, request.batch
    given: dict[str, Any] = {}
    if config["use_latent_condition"]:
        given["latent_cond"] = request.normal(batch, FRAMES, config["latent_dim"])
    return request.default(
        hidden_states=request.normal(batch, FRAMES, config["latent_dim"]),
        encoder_hidden_states=request.normal(batch, request.text, config["dit_text_dim"]),
        timestep=request.unit_steps(),
        attention_mask=request.mask(batch, FRAMES),
        **given,
    )


@register_inputs("MiniMaxMusic3Transformer1DModel")
def minimax_music(request: Request) -> dict[str, Any]:
    """Latent [B, C, A] and a condition [B, A, D] of the same length."""
    config, batch = request.config, request.batch
    return request.default(
        hidden_states=request.normal(batch, config["in_channels"], FRAMES),
        timestep=request.unit_steps(),
        encoder_hidden_states=request.normal(batch, FRAMES, config["condition_dim"]),
    )


@register_inputs("StableAudioDiTModel")
def stable_audio(request: Request) -> dict[str, Any]:
    """Latent [B, C, A]; one global token is put in front, so the rotary tables cover A + 1 places of half a head."""
    config, batch = request.config, request.batch
    return request.default(
        hidden_states=request.normal(batch, config["in_channels"], FRAMES),
        timestep=request.unit_steps(),
        encoder_hidden_states=request.normal(batch, request.text, config["cross_attention_input_dim"]),
        global_hidden_states=request.normal(batch, 1, config["global_states_input_dim"]),
        rotary_embedding=request.angles(FRAMES + 1, config["attention_head_dim"] // 2),
        without=("attention_mask", "encoder_attention_mask"),
    )


@register_inputs("StableAudio3DiTModel")
def stable_audio3(request: Request) -> dict[str, Any]:
    """Latent [B, C, A]; the inpainting condition exists only for a patch of one frame."""
    config, batch = request.config, request.batch
    given: dict[str, Any] = {}
    if config["patch_size"] == 1:
        given["local_add_cond"] = request.normal(batch, config["local_add_cond_dim"], FRAMES)
    return request.default(
        hidden_states=request.normal(batch, config["io_channels"], FRAMES),
        timestep=request.unit_steps(),
        encoder_hidden_states=request.normal(batch, request.text, config["cond_token_dim"]),
        global_hidden_states=request.normal(batch, config["global_cond_dim"]),
        **given,
    )


@register_inputs("T5FilmDecoder")
def t5_film(request: Request) -> dict[str, Any]:
    """Spectrogram [B, A, C], and the (tokens, mask) of each upstream encoder."""
    config, batch = request.config, request.batch
    encoding = (request.normal(batch, request.text, config["d_model"]), request.ones(batch, request.text))
    return {
        "encodings_and_masks": [encoding],
        "decoder_input_tokens": request.normal(batch, min(FRAMES, config["targets_length"]), config["input_dims"]),
        "decoder_noise_time": request.unit_steps(),
    }


@register_inputs("UNet1DModel")
def unet_1d(request: Request) -> dict[str, Any]:
    """Latent [B, C, A] of a length that halves at each level, as long as a convolution of the deepest level needs."""
    config, batch = request.config, request.batch
    length = 8 * 2 ** len(config["block_out_channels"])
    # The extra channels of Dance Diffusion are those of the time embedding, which the first block concatenates.
    return request.default(sample=request.normal(batch, config["in_channels"], length), timestep=request.steps())
