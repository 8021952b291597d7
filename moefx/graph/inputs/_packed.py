"""Makers for image transformers whose latent is packed to tokens [B, T, C].

Shapes: B batch, C channels of a packed latent token, T image tokens, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import GRID, Request


@register_inputs(
    "FluxTransformer2DModel",
    "ChromaTransformer2DModel",
    "OvisImageTransformer2DModel",
    "LongCatImageTransformer2DModel",
)
def flux(request: Request) -> dict[str, Any]:
    """The model scales a time of (0, 1) by 1000 itself; position ids carry no batch dimension."""
    joint = request.text + request.tokens
    given: dict[str, Any] = {"timestep": request.unit_steps()}
    if "attention_mask" in request.parameters:
        given["attention_mask"] = request.mask(request.batch, joint)
    return request.default(**given)


@register_inputs("Flux2Transformer2DModel", "Flux3Transformer2DModel")
def flux2(request: Request) -> dict[str, Any]:
    """Position ids are (frame, row, column, place in the text)."""
    rows, columns = GRID
    given: dict[str, Any] = {
        "timestep": request.unit_steps(),
        "img_ids": torch.nn.functional.pad(request.positions(1, rows, columns), (0, 1)),
        "txt_ids": request.positions(1, 1, 1, request.text),
    }
    if request.get("flow_map"):
        given["target_timestep"] = request.unit_steps() * 0.5
    return request.default(**given)


@register_inputs("BriaTransformer2DModel")
def bria(request: Request) -> dict[str, Any]:
    """The guidance scale is one for all samples: ``forward`` asks for its truth value."""
    given: dict[str, Any] = {"timestep": request.float_steps()}
    if request.get("guidance_embeds"):
        given["guidance"] = request.ones(1) * 5.0
    return request.default(**given)


@register_inputs("BriaFiboTransformer2DModel")
def bria_fibo(request: Request) -> dict[str, Any]:
    """Each block also reads one layer of the text encoder."""
    blocks = request.config["num_layers"] + request.config["num_single_layers"]
    width = request.config["text_encoder_dim"]
    return request.default(
        timestep=request.float_steps(),
        text_encoder_layers=[request.normal(request.batch, request.text, width) for _ in range(blocks)],
    )


@register_inputs("QwenImageTransformer2DModel")
def qwen_image(request: Request) -> dict[str, Any]:
    """One image per sample, spelled as (frames, rows, columns); layered models take an integer condition too."""
    shapes: list[Any] = [[(1, *GRID)] for _ in range(request.batch)]
    given: dict[str, Any] = {"timestep": request.unit_steps(), "img_shapes": shapes}
    if request.get("use_additional_t_cond"):
        given["additional_t_cond"] = request.integers(2, request.batch)
    return request.default(**given)


@register_inputs("NucleusMoEImageTransformer2DModel")
def nucleus(request: Request) -> dict[str, Any]:
    """One (frames, rows, columns) per sample, without the inner list of QwenImage."""
    return request.default(timestep=request.unit_steps(), img_shapes=[(1, *GRID)] * request.batch)


@register_inputs("QwenImage21Transformer2DModel")
def qwen_image21(request: Request) -> dict[str, Any]:
    """Text and image share one sequence: ``img_mask`` marks, after the text, one place per 2 x 2 image tokens."""
    places = request.tokens // 4
    is_image = [False] * request.text + [True] * places
    return request.default(
        timestep=request.unit_steps(),
        img_shapes=[[(1, *GRID)] for _ in range(request.batch)],
        img_mask=request.place(torch.tensor([is_image] * request.batch)),
    )


@register_inputs("Krea2Transformer2DModel")
def krea2(request: Request) -> dict[str, Any]:
    """Text comes from several layers of its encoder, [B, L, layers, D]; position ids cover text, then image."""
    config, batch = request.config, request.batch
    text = (batch, request.text, config["num_text_layers"], config["text_hidden_dim"])
    ids = torch.cat([request.zeros(request.text, 3, dtype=torch.float32), request.positions(*GRID, axes=3)])
    return {
        "hidden_states": request.normal(batch, request.tokens, config["in_channels"]),
        "encoder_hidden_states": request.normal(*text),
        "timestep": request.unit_steps(),
        "position_ids": ids,
        "encoder_attention_mask": request.mask(batch, request.text),
    }


@register_inputs("Ideogram4Transformer2DModel")
def ideogram4(request: Request) -> dict[str, Any]:
    """One sequence of text, then image; every tensor spans it, and ``indicator`` tells text (3) from image (2)."""
    config, batch = request.config, request.batch
    text, image = request.text, request.tokens
    ids = torch.cat([request.positions(text, 1, 1), request.positions(*GRID, axes=3)]).long()
    indicator = torch.tensor([[3] * text + [2] * image] * batch)
    return {
        "hidden_states": request.normal(batch, text + image, config["in_channels"]),
        "timestep": request.unit_steps(),
        "encoder_hidden_states": request.normal(batch, text + image, config["llm_features_dim"]),
        "position_ids": ids.expand(batch, -1, -1),
        "segment_ids": request.zeros(batch, text + image, dtype=torch.int64),
        "indicator": request.place(indicator),
    }
