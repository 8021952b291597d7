"""Makers for U-Nets and the U-ViT.

Shapes: B batch, C latent channels, H x W latent size, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import Request


def unet_size(request: Request) -> tuple[int, int]:
    """Return (H, W): 2 x 3 at the deepest level, so that every skip connection has the shape of its partner."""
    scale = 2 ** (len(request.config["block_out_channels"]) - 1)
    return 2 * scale, 3 * scale


@register_inputs("UNet2DConditionModel")
def unet_condition(request: Request) -> dict[str, Any]:
    """Cross-attention U-Net with each of its optional conditions."""
    config, batch = request.config, request.batch
    return request.default(
        sample=request.normal(batch, config["in_channels"], *unet_size(request)),
        timestep=request.steps(),
        encoder_hidden_states=request.normal(batch, request.text, _text_width(request)),
        **_class_labels(request),
        **_added(request),
        without=("encoder_attention_mask", "class_labels", "added_cond_kwargs"),
    )


def _text_width(request: Request) -> int:
    width = request.config["cross_attention_dim"]
    if request.get("encoder_hid_dim_type") in ("text_proj", "text_image_proj"):
        width = request.config["encoder_hid_dim"]
    return width if isinstance(width, int) else width[0]


def _class_labels(request: Request) -> dict[str, Tensor]:
    config, batch = request.config, request.batch
    kind = config.get("class_embed_type")
    if kind in ("projection", "simple_projection"):
        return {"class_labels": request.normal(batch, config["projection_class_embeddings_input_dim"])}
    if kind == "timestep":
        return {"class_labels": request.steps()}
    if kind == "identity":
        return {"class_labels": request.normal(batch, config["block_out_channels"][0] * 4)}
    if config.get("num_class_embeds"):
        return {"class_labels": request.integers(config["num_class_embeds"], batch)}
    return {}


def _added(request: Request) -> dict[str, dict[str, Tensor]]:
    """Return ``added_cond_kwargs`` for SDXL (text_time) and Kandinsky (image, image_hint, text_image)."""
    config, batch, kind = request.config, request.batch, request.get("addition_embed_type")
    added: dict[str, Tensor] = {}
    if kind == "text_time":
        # Six time ids (original size, crop, target size), or five for the refiner (the last is an aesthetic score).
        width, per_id = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        count = 6 if (width - 6 * per_id) % 256 == 0 or width % per_id else 5
        added["text_embeds"] = request.normal(batch, width - count * per_id)
        added["time_ids"] = request.rows([64.0, 96.0, 0.0, 0.0, 64.0, 96.0][:count])
    if kind in ("text_image", "image", "image_hint") or request.get("encoder_hid_dim_type") in (
        "image_proj",
        "text_image_proj",
    ):
        width = config["encoder_hid_dim"] if kind != "text_image" else config["cross_attention_dim"]
        added["image_embeds"] = request.normal(batch, width)
    if kind == "image_hint":
        added["hint"] = request.normal(batch, 3, *(8 * n for n in unet_size(request)))
    return {"added_cond_kwargs": added} if added else {}


@register_inputs("UVit2DModel")
def uvit(request: Request) -> dict[str, Any]:
    """Masked-token model: int64 ids [B, H, W] instead of a latent, five micro-conditions, no timestep."""
    config, batch = request.config, request.batch
    height, width = (2 * n for n in request.grid) if config["downsample"] else request.grid
    conditions = config["micro_cond_embed_dim"] // config["micro_cond_encode_dim"]
    return {
        "input_ids": request.integers(config["codebook_size"], batch, height, width),
        "encoder_hidden_states": request.normal(batch, request.text, config["encoder_hidden_size"]),
        "pooled_text_emb": request.normal(batch, config["cond_embed_dim"]),
        "micro_conds": request.rows([64.0, 96.0, 0.0, 0.0, 6.0][:conditions] + [1.0] * (conditions - 5)),
    }
