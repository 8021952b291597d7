"""Makers for U-Nets and the U-ViT.

Shapes: B batch, C latent channels, H x W latent size, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import FRAMES, GRID, Request


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
        width, per_id = config["projection_class_embeddings_input_dim"], config["addition_time_embed_dim"]
        # Six time ids (original size, crop, target size); the SDXL refiner has five, the last an aesthetic score,
        # and is told by what is left for the pooled text: always the 1280 of its text encoder.
        count = 5 if width - 5 * per_id == 1280 else 6
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


@register_inputs("UNet2DModel")
def unet(request: Request) -> dict[str, Any]:
    """Unconditional or class-conditional U-Net."""
    return request.default(
        sample=request.normal(request.batch, request.config["in_channels"], *unet_size(request)),
        timestep=request.steps(),
        **_class_labels(request),
        without=("class_labels",),
    )


@register_inputs("UNet3DConditionModel", "UNetMotionModel")
def unet_3d(request: Request) -> dict[str, Any]:
    """Latent [B, C, F, H, W]; temporal layers mix frames. AnimateDiff repeats the text for each frame itself."""
    config, batch = request.config, request.batch
    texts = batch * FRAMES if type(request.model).__name__ == "UNetMotionModel" else batch
    return request.default(
        sample=request.normal(batch, config["in_channels"], FRAMES, *unet_size(request)),
        timestep=request.steps(),
        encoder_hidden_states=request.normal(texts, request.text, _text_width(request)),
        **_added(request),
        without=("class_labels", "added_cond_kwargs"),
    )


@register_inputs("UNetSpatioTemporalConditionModel")
def unet_spatio_temporal(request: Request) -> dict[str, Any]:
    """Stable Video Diffusion: latent [B, F, C, H, W], one image token as text, and three numbers about the video."""
    config, batch = request.config, request.batch
    numbers = config["projection_class_embeddings_input_dim"] // config["addition_time_embed_dim"]
    return request.default(
        sample=request.normal(batch, FRAMES, config["in_channels"], *unet_size(request)),
        timestep=request.steps(),
        encoder_hidden_states=request.normal(batch, 1, _text_width(request)),
        added_time_ids=request.rows(([6.0, 127.0, 0.02] + [1.0] * numbers)[:numbers]),
    )


@register_inputs("I2VGenXLUNet")
def i2vgen(request: Request) -> dict[str, Any]:
    """Latent [B, C, F, H, W] beside the latents and the embedding of an image."""
    config, batch = request.config, request.batch
    shape = (batch, config["in_channels"], FRAMES, *unet_size(request))
    return request.default(
        sample=request.normal(*shape),
        timestep=request.steps(),
        fps=request.integers(30, batch, low=8),
        image_latents=request.normal(*shape),
        image_embeddings=request.normal(batch, config["cross_attention_dim"]),
        encoder_hidden_states=request.normal(batch, request.text, config["cross_attention_dim"]),
    )


@register_inputs("DreamLiteUNetModel")
def dreamlite(request: Request) -> dict[str, Any]:
    """The conditions of UNet2DConditionModel."""
    return unet_condition(request)


@register_inputs("AudioLDM2UNet2DConditionModel")
def audioldm2(request: Request) -> dict[str, Any]:
    """Two texts of their own widths: each transformer layer attends to none, to the first or to the second."""
    config, batch = request.config, request.batch
    widths = [w for w in _flat(config["cross_attention_dim"]) if w is not None]
    first, second = widths[0], next((w for w in widths if w != widths[0]), widths[0])
    return request.default(
        sample=request.normal(batch, config["in_channels"], *unet_size(request)),
        timestep=request.steps(),
        encoder_hidden_states=request.normal(batch, request.text, first),
        encoder_hidden_states_1=request.normal(batch, 5, second),
        **_class_labels(request),
        without=("class_labels", "encoder_attention_mask", "attention_mask"),
    )


def _flat(value: Any) -> list[Any]:
    return [w for v in value for w in _flat(v)] if isinstance(value, (list, tuple)) else [value]


@register_inputs("Kandinsky3UNet")
def kandinsky3(request: Request) -> dict[str, Any]:
    """The text mask becomes a bias by arithmetic."""
    config, batch = request.config, request.batch
    return request.default(
        sample=request.normal(batch, config["in_channels"], *unet_size(request)),
        timestep=request.steps(),
        encoder_hidden_states=request.normal(batch, request.text, config["encoder_hid_dim"]),
        encoder_attention_mask=request.mask(batch, request.text, dtype=request.dtype),
    )


@register_inputs("StableCascadeUNet")
def stable_cascade(request: Request) -> dict[str, Any]:
    """Stage C sees CLIP text and image; stage B the latent of stage C (``effnet``) and pixels."""
    config, batch = request.config, request.batch
    height, width = (n * config["patch_size"] for n in unet_size(request))
    given: dict[str, Any] = {
        "sample": request.normal(batch, config["in_channels"], height, width),
        "timestep_ratio": request.unit_steps(),
        "clip_text_pooled": request.normal(batch, 1, config["clip_text_pooled_in_channels"]),
    }
    if config["clip_text_in_channels"] and config["clip_image_in_channels"]:
        given["clip_text"] = request.normal(batch, request.text, config["clip_text_in_channels"])
        given["clip_img"] = request.normal(batch, 1, config["clip_image_in_channels"])
    if config["effnet_in_channels"]:
        given["effnet"] = request.normal(batch, config["effnet_in_channels"], height // 2, width // 2)
    if config["pixel_mapper_in_channels"]:
        given["pixels"] = request.normal(batch, config["pixel_mapper_in_channels"], 8, 8)
    return request.default(**given, without=("sca", "crp"))


@register_inputs("UniDiffuserModel")
def unidiffuser(request: Request) -> dict[str, Any]:
    """Image latent, image embedding and text, each noisy, with a time for the image and a time for the text."""
    config, batch = request.config, request.batch
    size = config["sample_size"]
    return request.default(
        latent_image_embeds=request.normal(batch, config["in_channels"], size, size),
        image_embeds=request.normal(batch, 1, config["clip_img_dim"]),
        prompt_embeds=request.normal(batch, config["num_text_tokens"], config["text_dim"]),
        timestep_img=request.steps(),
        timestep_text=request.steps(),
        without=("encoder_hidden_states",),
    )


@register_inputs("TransformerTemporalModel")
def transformer_temporal(request: Request) -> dict[str, Any]:
    """Feature maps [B * F, C, H, W]; attention is over frames, so the text repeats for each of the B * H * W pixels."""
    config, batch = request.config, request.batch
    rows, columns = GRID
    given: dict[str, Any] = {}
    if config["cross_attention_dim"]:
        pixels = batch * rows * columns
        given["encoder_hidden_states"] = request.normal(pixels, request.text, config["cross_attention_dim"])
    return request.default(
        hidden_states=request.normal(batch * FRAMES, config["in_channels"], rows, columns),
        num_frames=FRAMES,
        **given,
        without=("encoder_hidden_states", "timestep", "class_labels"),
    )
