"""Makers for image transformers whose latent is [B, C, H, W].

Shapes: B batch, C latent channels, H x W latent size, T image tokens, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import Request


@register_inputs("DiTTransformer2DModel")
def dit(request: Request) -> dict[str, Any]:
    """Class-conditional: the label table has one row per class, and one more for the dropped class."""
    return request.default(class_labels=request.integers(request.config["num_embeds_ada_norm"], request.batch))


@register_inputs("SD3Transformer2DModel", "PixArtTransformer2DModel", "CogView4Transformer2DModel")
def by_name(request: Request) -> dict[str, Any]:
    """The rules by name suffice; the timestep is of the training range."""
    return request.default(timestep=request.float_steps())


@register_inputs("AuraFlowTransformer2DModel")
def unit_time(request: Request) -> dict[str, Any]:
    """The model scales a time of (0, 1) by 1000 itself."""
    return request.default(timestep=request.unit_steps())


@register_inputs("SanaTransformer2DModel")
def sana(request: Request) -> dict[str, Any]:
    """Sana-Sprint embeds a guidance scale; its mask becomes a bias by arithmetic."""
    return request.default(encoder_attention_mask=request.mask(request.batch, request.text, dtype=torch.int64))


@register_inputs("Lumina2Transformer2DModel")
def lumina2(request: Request) -> dict[str, Any]:
    """The mask is both summed to lengths and used as an attention mask."""
    return request.default(timestep=request.unit_steps())


@register_inputs("HunyuanDiT2DModel")
def hunyuan_dit(request: Request) -> dict[str, Any]:
    """Two text encoders of fixed lengths, 2-D rotary tables of the head width, and size and style before 1.2."""
    config, batch = request.config, request.batch
    long, short = config["text_len_t5"], config["text_len"]
    given: dict[str, Any] = {
        # The time embedding is cast to the dtype of the timestep, so it must be a float.
        "timestep": request.float_steps(),
        "encoder_hidden_states": request.normal(batch, short, config["cross_attention_dim"]),
        "text_embedding_mask": request.mask(batch, short, dtype=torch.int64),
        "encoder_hidden_states_t5": request.normal(batch, long, config["cross_attention_dim_t5"]),
        "text_embedding_mask_t5": request.mask(batch, long, dtype=torch.int64),
        "image_rotary_emb": request.angles(request.tokens, config["attention_head_dim"]),
    }
    if config["use_style_cond_and_image_meta_size"]:
        height, width = (8.0 * n for n in request.size)
        given["image_meta_size"] = request.rows([height, width, height, width, 0.0, 0.0])
        given["style"] = request.zeros(batch, dtype=torch.int64)
    return request.default(**given)
