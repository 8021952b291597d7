"""Named denoisers, and the published configs of full-size models, for tests that build them on the meta device."""

from __future__ import annotations

from typing import Any

NAMED = (
    "AuraFlowTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "CogView4Transformer2DModel",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "HunyuanDiT2DModel",
    "LTXVideoTransformer3DModel",
    "Lumina2Transformer2DModel",
    "PixArtTransformer2DModel",
    "QwenImageTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "UNet2DConditionModel",
    "UVit2DModel",
    "WanTransformer3DModel",
)

_SDXL: dict[str, Any] = {
    "sample_size": 128, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
    "use_linear_projection": True,
}  # fmt: skip
_COGVIDEOX_5B: dict[str, Any] = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}

DEPTHS = ("num_layers", "num_single_layers", "num_hidden_layers", "num_mmdit_layers", "num_single_dit_layers")

# name: (class, entries that differ from the defaults of the class, parameters in millions)
FULL: dict[str, tuple[str, dict[str, Any], float]] = {
    "AuraFlow v0.3": ("AuraFlowTransformer2DModel", {"pos_embed_max_size": 9216}, 6820),
    "CogVideoX 2B": ("CogVideoXTransformer3DModel", {}, 1690),
    "CogVideoX 5B": ("CogVideoXTransformer3DModel", _COGVIDEOX_5B, 5570),
    "CogVideoX 5B I2V": (
        "CogVideoXTransformer3DModel",
        _COGVIDEOX_5B | {"in_channels": 32, "use_learned_positional_embeddings": True},
        5570,
    ),
    "CogVideoX 1.5 5B I2V": (
        "CogVideoXTransformer3DModel",
        _COGVIDEOX_5B
        | {"in_channels": 32, "patch_size_t": 2, "ofs_embed_dim": 512, "patch_bias": False, "sample_frames": 81,
           "sample_height": 300, "sample_width": 300},
        5570,
    ),
    "CogView4 6B": (
        "CogView4Transformer2DModel",
        {"num_layers": 28, "attention_head_dim": 128, "num_attention_heads": 32, "rope_axes_dim": (256, 256)},
        6370,
    ),
    "DiT-XL/2 256": ("DiTTransformer2DModel", {"out_channels": 8}, 750),
    "FLUX.1 schnell": ("FluxTransformer2DModel", {}, 11890),
    "FLUX.1 dev": ("FluxTransformer2DModel", {"guidance_embeds": True}, 11900),
    "HunyuanDiT v1.1": (
        "HunyuanDiT2DModel",
        {"in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408, "num_layers": 40,
         "mlp_ratio": 4.3637},
        1520,
    ),
    "LTX-Video 2B": ("LTXVideoTransformer3DModel", {}, 1920),
    "Lumina Image 2.0": ("Lumina2Transformer2DModel", {"cap_feat_dim": 2304}, 2610),
    "PixArt-alpha 1024": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "interpolation_scale": 2, "use_additional_conditions": True},
        611,
    ),
    "PixArt-sigma 512": (
        "PixArtTransformer2DModel",
        {"caption_channels": 4096, "interpolation_scale": 1, "sample_size": 64, "use_additional_conditions": False},
        611,
    ),
    "Qwen-Image 20B": ("QwenImageTransformer2DModel", {}, 20430),
    "SD 1.5": ("UNet2DConditionModel", {"cross_attention_dim": 768, "sample_size": 64}, 860),
    "SDXL": (
        "UNet2DConditionModel",
        _SDXL
        | {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
           "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
           "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
           "transformer_layers_per_block": (1, 2, 10), "projection_class_embeddings_input_dim": 2816},
        2567,
    ),
    "SDXL refiner": (
        "UNet2DConditionModel",
        _SDXL
        | {"block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280,
           "attention_head_dim": (6, 12, 24, 24), "transformer_layers_per_block": 4,
           "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
           "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
           "projection_class_embeddings_input_dim": 2560},
        2260,
    ),
    "SD3 medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 192},
        2030,
    ),
    "SD3.5 medium": (
        "SD3Transformer2DModel",
        {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536, "pos_embed_max_size": 384,
         "dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"},
        2240,
    ),
    "Sana 1.6B": ("SanaTransformer2DModel", {}, 1600),
    "aMUSEd 512": (
        "UVit2DModel",
        {"downsample": True, "upsample": True},
        608,
    ),
    "Wan 2.1 T2V 14B": ("WanTransformer3DModel", {}, 14290),
    "Wan 2.1 FLF2V 14B": (
        "WanTransformer3DModel",
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120, "pos_embed_seq_len": 514},
        16400,
    ),
    "Wan 2.2 TI2V 5B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 24, "in_channels": 48, "out_channels": 48, "ffn_dim": 14336, "num_layers": 30},
        5000,
    ),
}  # fmt: skip


def shallow(name: str, depth: int = 4) -> tuple[str, dict[str, Any]]:
    """Return the class and config of a full-size model with at most ``depth`` blocks of a kind: its widths, quickly."""
    import inspect

    import diffusers

    class_name, config, _ = FULL[name]
    known = inspect.signature(getattr(diffusers, class_name).__init__).parameters
    return class_name, config | {key: depth for key in DEPTHS if key in known}
