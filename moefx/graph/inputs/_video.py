"""Makers for video transformers.

Shapes: B batch, C latent channels, F latent frames, H x W latent size, T image tokens of one frame, L text tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import GRID, Request


@register_inputs("CogVideoXTransformer3DModel")
def cogvideox(request: Request) -> dict[str, Any]:
    """Latent [B, F, C, H, W]; either rotary tables over all frames or a position table with the text in front."""
    config, batch = request.config, request.batch
    patch_time = config["patch_size_t"] or 1
    height, width = (n * config["patch_size"] for n in GRID)
    frames = 3 * patch_time
    tabled = config["use_learned_positional_embeddings"] or not config["use_rotary_positional_embeddings"]
    if tabled:
        height, width = config["sample_height"], config["sample_width"]
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    text = config["max_text_seq_length"] if tabled else request.text
    given: dict[str, Any] = {
        "hidden_states": request.normal(batch, frames, config["in_channels"], height, width),
        "encoder_hidden_states": request.normal(batch, text, config["text_embed_dim"]),
        "timestep": request.float_steps(),
    }
    if config["use_rotary_positional_embeddings"]:
        tokens = frames // patch_time * (height // config["patch_size"]) * (width // config["patch_size"])
        given["image_rotary_emb"] = request.angles(tokens, config["attention_head_dim"])
    if config.get("ofs_embed_dim"):
        given["ofs"] = request.ones(1) * 2.0
    return request.default(**given)


@register_inputs("WanTransformer3DModel")
def wan(request: Request) -> dict[str, Any]:
    """Image-to-video models of Wan 2.1 also take the tokens of a CLIP image encoder."""
    return request.default(timestep=request.float_steps())


@register_inputs("LTXVideoTransformer3DModel")
def ltx(request: Request) -> dict[str, Any]:
    """Latent packed to [B, F * T, C]; the three sizes are passed beside it, and the text mask becomes a bias."""
    rows, columns = GRID
    frames, batch = request.frames, request.batch
    return request.default(
        hidden_states=request.normal(batch, frames * rows * columns, request.config["in_channels"]),
        timestep=request.float_steps(),
        encoder_attention_mask=request.mask(batch, request.text, dtype=torch.int64),
        num_frames=frames,
        height=rows,
        width=columns,
    )
