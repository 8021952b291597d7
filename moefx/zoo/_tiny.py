"""Configs of the tiny denoisers: entries of each class's ``__init__`` that differ from its defaults.

Widths are chosen so that model width, FFN width, text width and head count all differ where the class allows.
"""

from __future__ import annotations

from typing import Any

TINY: dict[str, dict[str, Any]] = {
    "AuraFlowTransformer2DModel": {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 20, "caption_projection_dim": 32,
        "pos_embed_max_size": 144,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12,
        "text_embed_dim": 20, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": 7, "use_rotary_positional_embeddings": True,
    },
    "CogView4Transformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
        "text_embed_dim": 20, "time_embed_dim": 12, "condition_dim": 6, "pos_embed_max_size": 16, "sample_size": 16,
        "rope_axes_dim": (16, 16),
    },
    "DiTTransformer2DModel": {
        "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 10,
        "num_embeds_ada_norm": 11,
    },
    "FluxTransformer2DModel": {
        "in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 20, "pooled_projection_dim": 18, "axes_dims_rope": (4, 6, 6), "guidance_embeds": True,
    },
    "HunyuanDiT2DModel": {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 16,
        "hidden_size": 32, "num_layers": 4, "cross_attention_dim": 20, "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 18, "text_len": 7, "text_len_t5": 9,
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 10, "out_channels": 10, "num_attention_heads": 4, "attention_head_dim": 8,
        "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 20,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 16, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 20, "axes_dim_rope": (4, 6, 6),
        "axes_lens": (40, 16, 16), "cap_feat_dim": 20,
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 24,
        "caption_channels": 20, "sample_size": 10, "use_additional_conditions": True,
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 12, "out_channels": 3, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6),
    },
    "SD3Transformer2DModel": {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 20, "caption_projection_dim": 32, "pooled_projection_dim": 18,
        "pos_embed_max_size": 12, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    },
    "SanaTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 20, "sample_size": 8,
    },
    "UNet2DConditionModel": {
        "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 20, "attention_head_dim": 2, "sample_size": 8,
    },
    "UVit2DModel": {
        "hidden_size": 32, "cond_embed_dim": 18, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20,
        "encoder_hidden_size": 20, "vocab_size": 40, "codebook_size": 37, "in_channels": 24, "block_out_channels": 24,
        "num_res_blocks": 1, "block_num_heads": 3, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 52, "sample_size": 8,
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20,
        "freq_dim": 16, "ffn_dim": 52, "num_layers": 2, "rope_max_seq_len": 32,
    },
}  # fmt: skip
