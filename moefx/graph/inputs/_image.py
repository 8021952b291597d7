"""Makers for image transformers whose latent is [B, C, H, W].

Shapes: B batch, C latent channels, H x W latent size, T image tokens, L text tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import GRID, Request


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


@register_inputs("CogView3PlusTransformer2DModel")
def cogview3(request: Request) -> dict[str, Any]:
    """The rules by name suffice; the timestep is of the training range."""
    return request.default(timestep=request.float_steps())


@register_inputs("GlmImageTransformer2DModel")
def glm_image(request: Request) -> dict[str, Any]:
    """Each image token has a token of the autoregressive prior, which may be dropped."""
    count = request.config["prior_vq_quantizer_codebook_size"]
    return request.default(
        timestep=request.float_steps(),
        prior_token_id=request.integers(count, request.batch, request.tokens),
        prior_token_drop=request.zeros(request.batch, request.tokens, dtype=torch.bool),
    )


@register_inputs("ErnieImageTransformer2DModel")
def ernie_image(request: Request) -> dict[str, Any]:
    """Text is given with its lengths instead of a mask."""
    lengths = torch.full((request.batch,), request.text)
    return request.default(
        timestep=request.float_steps(),
        text_bth=request.normal(request.batch, request.text, request.config["text_in_dim"]),
        text_lens=request.place(lengths),
    )


@register_inputs("HunyuanImageTransformer2DModel")
def hunyuan_image(request: Request) -> dict[str, Any]:
    """A second text encoder (glyphs) and mean-flow time are options; three rotary axes mean a video latent."""
    config, batch = request.config, request.batch
    given: dict[str, Any] = {"timestep": request.float_steps()}
    sizes = [n * p for n, p in zip((3, *GRID)[-len(config["patch_size"]) :], config["patch_size"], strict=True)]
    given["hidden_states"] = request.normal(batch, config["in_channels"], *sizes)
    if config.get("use_meanflow"):
        given["timestep_r"] = request.float_steps() * 0.5
    if config.get("text_embed_2_dim"):
        given["encoder_hidden_states_2"] = request.normal(batch, 5, config["text_embed_2_dim"])
        given["encoder_attention_mask_2"] = request.mask(batch, 5)
    return request.default(**given)


@register_inputs("LuminaNextDiT2DModel")
def lumina_next(request: Request) -> dict[str, Any]:
    """The rotary table is complex, [rows, columns, head width / 2]: half its angles follow rows, half columns."""
    config = request.config
    width = config["hidden_size"] // config["num_attention_heads"] // 4
    frequencies = 10000.0 ** -(torch.arange(width) / width)
    rows, columns = request.grid
    along_rows = torch.outer(torch.arange(rows), frequencies)[:, None].expand(-1, columns, -1)
    along_columns = torch.outer(torch.arange(columns), frequencies)[None].expand(rows, -1, -1)
    angle = torch.stack([along_rows, along_columns], dim=-1).flatten(2)
    return request.default(
        timestep=request.unit_steps(),
        encoder_mask=request.mask(request.batch, request.text, dtype=torch.int64),
        image_rotary_emb=request.place(torch.polar(torch.ones_like(angle), angle)),
        # The attention layers unpack this, so it cannot be None.
        cross_attention_kwargs={},
    )


@register_inputs("OmniGenTransformer2DModel")
def omnigen(request: Request) -> dict[str, Any]:
    """A language model over text, one time token and the image; no input images here."""
    total = request.text + 1 + request.tokens
    return request.default(
        timestep=request.unit_steps(),
        input_ids=request.integers(request.config["vocab_size"], request.batch, request.text),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=request.ones(request.batch, total, total),
        position_ids=request.place(torch.arange(total).repeat(request.batch, 1)),
    )


@register_inputs("PRXTransformer2DModel")
def prx(request: Request) -> dict[str, Any]:
    """``attention_mask`` is the mask of the text."""
    mask = request.mask(request.batch, request.text)
    return request.default(timestep=request.unit_steps(), attention_mask=mask)


@register_inputs("BriaFibo2Transformer2DModel")
def bria_fibo2(request: Request) -> dict[str, Any]:
    """Text features come as one bundle for the perceiver and one for each layer that injects text."""
    config = request.config
    bundles = 1 + len(config["injection_layer_ids"])
    text = request.normal(request.batch, bundles, request.text, config["cap_feat_dim"])
    return request.default(
        timestep=request.unit_steps(), encoder_hidden_states=text, without=("encoder_attention_mask",)
    )


@register_inputs("ZImageTransformer2DModel")
def z_image(request: Request) -> dict[str, Any]:
    """Lists with one image [C, F, H, W] and one text [L, D] per sample, of lengths that may differ."""
    config, batch = request.config, request.batch
    patch, patch_time = config["all_patch_size"][0], config["all_f_patch_size"][0]
    rows, columns = (n * patch for n in GRID)
    return {
        "x": [request.normal(config["in_channels"], patch_time, rows, columns) for _ in range(batch)],
        "t": request.unit_steps(),
        "cap_feats": [request.normal(request.text, config["cap_feat_dim"]) for _ in range(batch)],
        "patch_size": patch,
        "f_patch_size": patch_time,
    }


@register_inputs("HiDreamImageTransformer2DModel")
def hidream(request: Request) -> dict[str, Any]:
    """Two text encoders, of one of which every layer is read; a square latent, since others are padded to the most."""
    config, batch = request.config, request.batch
    side = 5 * config["patch_size"]
    t5_width, llama_width = config["caption_channels"][:2]
    return request.default(
        hidden_states=request.normal(batch, config["in_channels"], side, side),
        timesteps=request.float_steps(),
        encoder_hidden_states_t5=request.normal(batch, request.text, t5_width),
        encoder_hidden_states_llama3=request.normal(max(config["llama_layers"]) + 1, batch, request.text, llama_width),
        pooled_embeds=request.normal(batch, config["text_emb_dim"]),
        without=("img_ids", "img_sizes", "hidden_states_masks"),
    )


@register_inputs("PriorTransformer")
def prior(request: Request) -> dict[str, Any]:
    """Predicts an image embedding [B, D]; without a text encoder (Shap-E) a sequence of them, [B, L, D]."""
    config, batch = request.config, request.batch
    width, length = config["embedding_dim"], config["num_embeddings"]
    given: dict[str, Any] = {
        "timestep": request.steps(),
        "proj_embedding": request.normal(batch, config["embedding_proj_dim"] or width),
    }
    if config["encoder_hid_proj_type"] is None:
        return request.default(hidden_states=request.normal(batch, length, width), **given)
    return request.default(
        hidden_states=request.normal(batch, width),
        encoder_hidden_states=request.normal(batch, length, width),
        attention_mask=request.mask(batch, length),
        **given,
    )


@register_inputs("Transformer2DModel", "DreamLiteTransformer2DModel")
def transformer_2d(request: Request) -> dict[str, Any]:
    """One class for three kinds of input: feature maps, tokens of a codebook, patches of a latent."""
    config, batch = request.config, request.batch
    given: dict[str, Any] = {}
    skip = {"encoder_attention_mask"}
    if config.get("num_vector_embeds"):
        given["hidden_states"] = request.integers(config["num_vector_embeds"], batch, config["sample_size"] ** 2)
    if not str(config["norm_type"]).startswith("ada_norm"):
        skip |= {"timestep", "class_labels"}
    if config.get("cross_attention_dim") is None:
        skip.add("encoder_hidden_states")
    return request.default(**given, without=tuple(skip))
