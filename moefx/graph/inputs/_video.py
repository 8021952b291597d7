"""Makers for video transformers whose text is one encoder's and whose latent is [B, C, F, H, W] or [B, F, C, H, W].

Shapes: B batch, C latent channels, F latent frames, H x W latent size, T image tokens of one frame, L text tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from moefx.graph.inputs._registry import register_inputs
from moefx.graph.inputs._request import FRAMES, GRID, Request

IMAGE_TOKENS = 11
"""Tokens of an image encoder, for models which take any number."""


@register_inputs("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel")
def cogvideox(request: Request) -> dict[str, Any]:
    """Latent [B, F, C, H, W]; either rotary tables over all frames or a position table with the text in front."""
    config, batch = request.config, request.batch
    patch, patch_time = config["patch_size"], config.get("patch_size_t") or 1
    height, width, frames, text = GRID[0] * patch, GRID[1] * patch, FRAMES * patch_time, request.text
    if config["use_learned_positional_embeddings"] or not config["use_rotary_positional_embeddings"]:
        height, width, text = config["sample_height"], config["sample_width"], config["max_text_seq_length"]
        frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    given: dict[str, Any] = {
        "hidden_states": request.normal(batch, frames, config["in_channels"], height, width),
        "encoder_hidden_states": request.normal(batch, text, config["text_embed_dim"]),
        "timestep": request.float_steps(),
    }
    if config["use_rotary_positional_embeddings"]:
        tokens = frames // patch_time * (height // patch) * (width // patch)
        given["image_rotary_emb"] = request.angles(tokens, config["attention_head_dim"])
    if config.get("ofs_embed_dim"):
        given["ofs"] = request.ones(1) * 2.0
    return request.default(**given, **_face(request))


def _face(request: Request) -> dict[str, Any]:
    """Return an identity embedding and the features of several layers of an image encoder, for ConsisID."""
    config, batch = request.config, request.batch
    if not config.get("is_train_face"):
        return {}
    features = (batch, IMAGE_TOKENS, config["LFE_vit_dim"])
    return {
        "id_cond": request.normal(batch, config["LFE_id_dim"]),
        "id_vit_hidden": [request.normal(*features) for _ in range(config["LFE_num_scale"])],
    }


@register_inputs("WanTransformer3DModel", "ChronoEditTransformer3DModel")
def wan(request: Request) -> dict[str, Any]:
    """Image-to-video models of Wan 2.1 also take the tokens of a CLIP image encoder."""
    return request.default(timestep=request.float_steps())


@register_inputs("SkyReelsV2Transformer3DModel")
def skyreels(request: Request) -> dict[str, Any]:
    """Frames come in causal blocks; ``fps`` is a list of 0 (16 fps) and 1 (24 fps)."""
    config = request.config
    frames = FRAMES * max(config["num_frame_per_block"], request.patch[0])
    given: dict[str, Any] = {
        "hidden_states": request.normal(request.batch, config["in_channels"], frames, *request.size),
        "timestep": request.float_steps(),
    }
    if config["inject_sample_info"]:
        given["fps"] = [0] * request.batch
    return request.default(**given, without=("fps",))


@register_inputs("WanVACETransformer3DModel")
def wan_vace(request: Request) -> dict[str, Any]:
    """A control video of ``vace_in_channels`` channels, and one scale for each control block."""
    config = request.config
    control = (request.batch, config["vace_in_channels"], request.frames, *request.size)
    return request.default(
        timestep=request.float_steps(),
        control_hidden_states=request.normal(*control),
        control_hidden_states_scale=request.ones(len(config["vace_layers"])),
    )


@register_inputs("WanAnimateTransformer3DModel")
def wan_animate(request: Request) -> dict[str, Any]:
    """One reference frame in front; the pose covers the others, and the face video has four frames for each of them."""
    config, batch = request.config, request.batch
    frames, size = request.frames, request.size
    channels = config["in_channels"] or 2 * config["latent_channels"] + 4
    latent = config["latent_channels"] or (channels - 4) // 2
    face = config["motion_encoder_size"]
    return request.default(
        hidden_states=request.normal(batch, channels, frames + 1, *size),
        timestep=request.float_steps(),
        pose_hidden_states=request.normal(batch, latent, frames, *size),
        face_pixel_values=request.uniform(batch, 3, 4 * frames, face, face, low=-1.0),
    )


@register_inputs("WanAnimate2Transformer3DModel")
def wan_animate2(request: Request) -> dict[str, Any]:
    """The reference pass (``extract``), which fills the cache; the other pass needs that cache and flex attention."""
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    config, batch = request.config, request.batch
    condition = config["in_dim"] - config["out_dim"]
    shape = (request.frames, *request.size)
    given = {
        "hidden_states": [request.normal(config["out_dim"], *shape) for _ in range(batch)],
        "timestep": request.float_steps(),
        "encoder_hidden_states": [request.normal(request.text, config["text_dim"]) for _ in range(batch)],
        "condition_latents": [request.normal(condition, *shape) for _ in range(batch)],
        "kv_cache": WanAnimate2KVCache(config["num_layers"]),
        "kv_cache_mode": "extract",
        "seq_len": FRAMES * request.tokens,
        "offset_grid_sizes": request.place(torch.tensor([[FRAMES, *request.grid]] * batch)),
    }
    if config["use_img_emb"]:
        given["encoder_hidden_states_image"] = request.normal(batch, 257, 1280)
    return given


@register_inputs("AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel")
def anyflow(request: Request) -> dict[str, Any]:
    """Latent [B, F, C, H, W]; a start and an end time for every frame."""
    config, batch = request.config, request.batch
    given: dict[str, Any] = {}
    frames, scale = request.frames, 1
    if "chunk_partition" in request.parameters:
        # One chunk more than are kept at full resolution, so that the compressed path runs too.
        given["chunk_partition"] = [1] * (config["full_chunk_limit"] + 1)
        frames = len(given["chunk_partition"])
        scale = max(c // p for c, p in zip(config["compressed_patch_size"], config["patch_size"], strict=True))
    height, width = (n * scale for n in request.size)
    time = request.float_steps()[:, None].expand(batch, frames)
    return request.default(
        hidden_states=request.normal(batch, frames, config["in_channels"], height, width),
        timestep=time,
        r_timestep=time * 0.5,
        **given,
    )


@register_inputs("HeliosTransformer3DModel")
def helios(request: Request) -> dict[str, Any]:
    """Autoregressive: three histories of the past, of 4, 2 and 1 frames, patched ever more coarsely."""
    config, batch, size = request.config, request.batch, request.size
    given: dict[str, Any] = {"timestep": request.float_steps()}
    start = 0
    if config["has_multi_term_memory_patch"]:
        for name, frames in (("long", 4), ("mid", 2), ("short", 1)):
            latents = (batch, config["in_channels"], frames * request.patch[0], *size)
            given[f"latents_history_{name}"] = request.normal(*latents)
            given[f"indices_latents_history_{name}"] = _frames(request, start, frames)
            start += frames
    return request.default(indices_hidden_states=_frames(request, start, FRAMES), **given)


def _frames(request: Request, start: int, count: int) -> torch.Tensor:
    return request.place(torch.arange(start, start + count).repeat(request.batch, 1))


@register_inputs("AllegroTransformer3DModel")
def allegro(request: Request) -> dict[str, Any]:
    """Rotary position is given as one (cos, sin) table and one row of indices per axis: time, rows, columns."""
    config, batch = request.config, request.batch
    positions = request.positions(FRAMES, *GRID).long()
    tables = tuple(_halves(request, n, config["attention_head_dim"] // 3) for n in (FRAMES, *GRID))
    return request.default(
        timestep=request.steps(),
        attention_mask=request.mask(batch, request.frames, *request.size),
        encoder_attention_mask=request.mask(batch, request.text, dtype=torch.int64),
        image_rotary_emb=(tables, tuple(positions[None, :, axis] for axis in range(3))),
    )


def _halves(request: Request, places: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    phase = torch.outer(torch.arange(places), 10000.0 ** -(torch.arange(0, width, 2) / width)).repeat(1, 2)
    return request.place(phase.cos()), request.place(phase.sin())


@register_inputs("LatteTransformer3DModel")
def latte(request: Request) -> dict[str, Any]:
    """The number of frames is fixed by a position table; the mask would have to be a bias already, so none is made."""
    config = request.config
    shape = (request.batch, config["in_channels"], config["video_length"], *request.size)
    return request.default(
        hidden_states=request.normal(*shape), timestep=request.steps(), without=("encoder_attention_mask",)
    )


@register_inputs("MochiTransformer3DModel", "SanaVideoTransformer3DModel", "MotifVideoTransformer3DModel")
def masked(request: Request) -> dict[str, Any]:
    """A text mask on which arithmetic is done; Motif can see the tokens of an image encoder too."""
    boolean = type(request.model).__name__.startswith("Mochi")
    given: dict[str, Any] = {
        "timestep": request.float_steps(),
        "encoder_attention_mask": request.mask(
            request.batch, request.text, dtype=torch.bool if boolean else torch.int64
        ),
    }
    if request.get("image_embed_dim"):
        given["image_embeds"] = request.normal(request.batch, IMAGE_TOKENS, request.config["image_embed_dim"])
    return request.default(**given, without=("attention_mask",))


@register_inputs("CosmosTransformer3DModel")
def cosmos(request: Request) -> dict[str, Any]:
    """A padding mask of the image becomes one more channel; text is projected first in Cosmos 2.5."""
    config, batch = request.config, request.batch
    projected = config["use_crossattn_projection"]
    width = config["crossattn_proj_in_channels" if projected else "text_embed_dim"]
    given: dict[str, Any] = {
        "timestep": request.unit_steps(),
        "encoder_hidden_states": request.normal(batch, request.text, width),
    }
    if config["concat_padding_mask"]:
        given["padding_mask"] = request.zeros(1, 1, *request.size)
    return request.default(**given, without=("attention_mask",))


@register_inputs("EasyAnimateTransformer3DModel")
def easyanimate(request: Request) -> dict[str, Any]:
    """Input channels beyond those of the output are inpainting latents, beside the noisy ones."""
    config, batch = request.config, request.batch
    shape = (request.frames, *request.size)
    noisy = config["out_channels"]
    given: dict[str, Any] = {
        "hidden_states": request.normal(batch, noisy, *shape),
        "encoder_hidden_states": request.normal(batch, request.text, config["text_embed_dim"]),
        "timestep": request.float_steps(),
    }
    if config["in_channels"] > noisy:
        given["inpaint_latents"] = request.normal(batch, config["in_channels"] - noisy, *shape)
    if config.get("text_embed_dim_t5"):
        given["encoder_hidden_states_t5"] = request.normal(batch, 5, config["text_embed_dim_t5"])
    return request.default(**given)
