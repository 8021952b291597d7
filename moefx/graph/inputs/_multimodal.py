"""Makers for video transformers with packed, several-encoder, channels-last or audio inputs.

Shapes: B batch, C latent channels, F latent frames, H x W latent size, T image tokens of one frame, L text tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import FRAMES, GRID, Request
from moefx.graph.inputs._video import IMAGE_TOKENS

AUDIO_TOKENS = 13
"""Length of the audio latent."""


@register_inputs("LTXVideoTransformer3DModel")
def ltx(request: Request) -> dict[str, Any]:
    """Latent packed to [B, F * T, C]; the three sizes are passed beside it, and the text mask becomes a bias."""
    return request.default(timestep=request.float_steps(), **_packed_video(request))


def _packed_video(request: Request) -> dict[str, Any]:
    rows, columns = GRID
    return {
        "hidden_states": request.normal(request.batch, FRAMES * rows * columns, request.config["in_channels"]),
        "encoder_attention_mask": request.mask(request.batch, request.text, dtype=torch.int64),
        "num_frames": FRAMES,
        "height": rows,
        "width": columns,
    }


@register_inputs("LTX2VideoTransformer3DModel")
def ltx2(request: Request) -> dict[str, Any]:
    """LTX with an audio latent [B, tokens, C] and its own text; ``sigma`` modulates the prompt of later models."""
    config, batch = request.config, request.batch
    projected = config["use_prompt_embeddings"]
    names = ("caption_channels",) * 2 if projected else ("cross_attention_dim", "audio_cross_attention_dim")
    mask = request.mask(batch, request.text, dtype=torch.int64)
    time = request.float_steps()
    return request.default(
        **_packed_video(request),
        timestep=time,
        **_prompt_time(request, time),
        audio_hidden_states=request.normal(batch, AUDIO_TOKENS, config["audio_in_channels"]),
        encoder_hidden_states=request.normal(batch, request.text, config[names[0]]),
        audio_encoder_hidden_states=request.normal(batch, request.text, config[names[1]]),
        audio_encoder_attention_mask=mask,
        audio_num_frames=AUDIO_TOKENS,
    )


def _prompt_time(request: Request, time: torch.Tensor) -> dict[str, Any]:
    modulated = request.get("cross_attn_mod") or request.get("audio_cross_attn_mod")
    return {"sigma": time} if modulated and request.get("use_prompt_adaln_single") else {}


@register_inputs("SanaWMLTX2RefinerTransformer3DModel")
def sana_refiner(request: Request) -> dict[str, Any]:
    """The video half of LTX2, with its rotary tables over the inner width given from outside."""
    config, batch = request.config, request.batch
    tokens = FRAMES * request.tokens
    return request.default(
        hidden_states=request.normal(batch, tokens, config["in_channels"]),
        timestep=request.float_steps(),
        video_rotary_emb=request.angles(tokens, config["num_attention_heads"] * config["attention_head_dim"]),
        encoder_attention_mask=request.mask(batch, request.text, dtype=torch.int64),
    )


@register_inputs("SanaWMTransformer3DModel")
def sana_wm(request: Request) -> dict[str, Any]:
    """World model: per latent frame a camera (16 numbers of its pose, 4 of its lens) and its rays."""
    config, batch = request.config, request.batch
    frames, (height, width) = request.frames, request.size
    lens = [float(width), float(width), width / 2, height / 2]
    camera = torch.cat([torch.eye(4).flatten(), torch.tensor(lens)]).repeat(batch, frames, 1)
    given: dict[str, Any] = {
        # One timestep per frame: the first frame is the given image.
        "timestep": request.float_steps()[:, None, None].expand(batch, 1, frames // request.patch[0]),
        "encoder_hidden_states": request.normal(batch, 1, request.text, config["caption_channels"]),
        "encoder_attention_mask": request.mask(batch, request.text, dtype=torch.int64),
        "camera_conditions": request.place(camera, request.dtype),
    }
    if config["use_chunk_plucker_post_attn"]:
        given["chunk_plucker"] = request.normal(batch, config["chunk_plucker_channels"], frames, height, width)
    return request.default(**given)


@register_inputs("HunyuanVideoTransformer3DModel")
def hunyuan_video(request: Request) -> dict[str, Any]:
    """The rules by name suffice; the timestep is of the training range."""
    return request.default(timestep=request.float_steps())


@register_inputs("HunyuanVideo15Transformer3DModel")
def hunyuan_video15(request: Request) -> dict[str, Any]:
    """Two text encoders and an image encoder, whose tokens are reordered by their masks."""
    config, batch = request.config, request.batch
    given: dict[str, Any] = {}
    if config.get("use_meanflow"):
        given["timestep_r"] = request.float_steps() * 0.5
    return request.default(
        timestep=request.float_steps(),
        encoder_hidden_states_2=request.normal(batch, 5, config["text_embed_2_dim"]),
        encoder_attention_mask_2=request.mask(batch, 5),
        image_embeds=request.normal(batch, IMAGE_TOKENS, config["image_embed_dim"]),
        **given,
    )


@register_inputs("HunyuanVideoFramepackTransformer3DModel")
def framepack(request: Request) -> dict[str, Any]:
    """Autoregressive: clean frames and two histories of 2 and 16 frames, patched 2x and 4x as coarsely; frame indices
    carry no batch dimension.
    """
    config, batch, size = request.config, request.batch, request.size
    given: dict[str, Any] = {"timestep": request.float_steps()}
    if config["has_image_proj"]:
        given["image_embeds"] = request.normal(batch, IMAGE_TOKENS, config["image_proj_dim"])
    start = 0
    if config["has_clean_x_embedder"]:
        for name, frames in (("latents_clean", 2), ("latents_history_2x", 2), ("latents_history_4x", 16)):
            given[name] = request.normal(batch, config["in_channels"], frames, *size)
            given[f"indices_{name}"] = request.place(torch.arange(start, start + frames))
            start += frames
    current = torch.arange(start, start + request.frames)
    return request.default(indices_latents=request.place(current), **given)


@register_inputs("Kandinsky5Transformer3DModel")
def kandinsky5(request: Request) -> dict[str, Any]:
    """Latent [B, F, H, W, C], with as many channels again, and a mask, for a condition; positions are index vectors."""
    config, batch = request.config, request.batch
    return request.default(
        hidden_states=_channels_last(request),
        encoder_hidden_states=request.normal(batch, request.text, config["in_text_dim"]),
        timestep=request.float_steps(),
        pooled_projections=request.normal(batch, config["in_text_dim2"]),
        visual_rope_pos=[request.place(torch.arange(n)) for n in (FRAMES, *GRID)],
        text_rope_pos=request.place(torch.arange(request.text)),
    )


def _channels_last(request: Request) -> torch.Tensor:
    channels = request.config["in_visual_dim"]
    if request.get("visual_cond"):
        channels = 2 * channels + 1
    return request.normal(request.batch, request.frames, *request.size, channels)


@register_inputs("Kandinsky6Transformer3DModel")
def kandinsky6(request: Request) -> dict[str, Any]:
    """Kandinsky 5 with an audio latent [B, tokens, C] and, in some models, a type for each latent frame."""
    config, batch = request.config, request.batch
    given: dict[str, Any] = {}
    if config["visual_token_type_num_embeddings"]:
        types = config["visual_token_type_num_embeddings"]
        given["visual_token_type_ids"] = request.integers(types, batch, FRAMES)
    return request.default(
        hidden_states=_channels_last(request),
        encoder_hidden_states=request.normal(batch, request.text, config["in_text_dim"]),
        pooled_projections=request.normal(batch, config["in_text_dim2"]),
        timestep=request.float_steps(),
        audio_hidden_states=request.normal(batch, AUDIO_TOKENS, config["in_audio_dim"]),
        **given,
    )


@register_inputs("Kandinsky6SRTransformer3DModel")
def kandinsky6_sr(request: Request) -> dict[str, Any]:
    """Upscaler without text; its sparse attention works on blocks of 8 x 8 tokens."""
    config = request.config
    sizes = [n * p for n, p in zip((2, 8, 16), config["patch_size"], strict=True)]
    return request.default(
        # Noisy channels, as many of the low resolution, and a mask.
        hidden_states=request.normal(request.batch, *sizes, 2 * config["in_visual_dim"] + 1),
        timestep=request.float_steps(),
    )


@register_inputs("JoyImageEditTransformer3DModel")
def joy_edit(request: Request) -> dict[str, Any]:
    """Latent [B, images, C, F, H, W]: a reference image and the one being made."""
    shape = (request.batch, 2, request.config["in_channels"], request.patch[0], *request.size)
    return request.default(hidden_states=request.normal(*shape), timestep=request.float_steps())


@register_inputs("JoyImageEditPlusTransformer3DModel")
def joy_edit_plus(request: Request) -> dict[str, Any]:
    """Latent cut into patches [B, tokens, C, patch], with the (frames, rows, columns) of each image of each sample."""
    patches = (request.batch, request.tokens, request.config["in_channels"], *request.config["patch_size"])
    return request.default(
        hidden_states=request.normal(*patches),
        timestep=request.float_steps(),
        encoder_hidden_states_mask=request.ones(request.batch, request.text),
        shape_list=[[(1, *GRID)] for _ in range(request.batch)],
    )


@register_inputs("MiniMaxH3Transformer3DModel")
def minimax_h3(request: Request) -> dict[str, Any]:
    """One sequence of text, video and audio tokens whose places are given; the timesteps are shared by the batch."""
    config, batch = request.config, request.batch
    video, audio, text = FRAMES * request.tokens, AUDIO_TOKENS, request.text
    rows = [request.positions(text, 1, 1), request.positions(FRAMES, *GRID), request.positions(audio, 1, 1)]
    place = torch.arange(text + video + audio)
    # Tags follow the order of the modulation table: text, video, audio; text is clean, so its timestep is the second.
    tags = torch.tensor([0] * text + [1] * video + [2] * audio)
    return request.default(
        hidden_states=request.normal(batch, video, config["in_channels"] * torch.Size(config["patch_size"]).numel()),
        audio_hidden_states=request.normal(batch, audio, config["audio_in_channels"]),
        encoder_hidden_states=request.normal(batch, text, config["text_dim"]),
        timestep=request.place(torch.tensor([437.0, 0.0]), request.dtype),
        timestep_indices=request.place((tags == 0).long()),
        token_tags=request.place(tags),
        position_ids=torch.cat(rows),
        video_indices=request.place(place[text : text + video]),
        audio_indices=request.place(place[text + video :]),
        text_indices=request.place(place[:text]),
    )


@register_inputs("Cosmos3OmniTransformer")
def cosmos3(request: Request) -> dict[str, Any]:
    """One packed sequence: text ids, then the patches of a list of B videos, with one time per noisy token."""
    config, batch, text = request.config, request.batch, request.text
    rows, columns = (n * config["latent_patch_size"] for n in GRID)
    per_video = FRAMES * request.tokens
    vision = torch.arange(text, text + batch * per_video)
    places = [request.positions(text, 1, 1)] + [request.positions(FRAMES, *GRID)] * batch
    return {
        "input_ids": request.integers(config["vocab_size"], text),
        "text_indexes": request.place(torch.arange(text)),
        "position_ids": torch.cat(places).T,
        "und_len": text,
        "sequence_length": text + batch * per_video,
        "vision_tokens": [request.normal(1, config["latent_channel"], FRAMES, rows, columns) for _ in range(batch)],
        "vision_token_shapes": [(FRAMES, *GRID)] * batch,
        "vision_sequence_indexes": request.place(vision),
        "vision_mse_loss_indexes": request.place(vision),
        "vision_timesteps": request.float_steps().repeat_interleave(per_video),
        "vision_noisy_frame_indexes": [request.place(torch.arange(FRAMES))] * batch,
    }
