"""Tiny configs of image transformers. See `moefx.zoo._tiny`."""

from __future__ import annotations

from typing import Any

IMAGE: dict[str, dict[str, Any]] = {
    "AuraFlowTransformer2DModel": {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 2,
        "attention_head_dim": 8, "num_attention_heads": 4, "joint_attention_dim": 20, "caption_projection_dim": 32,
        "pos_embed_max_size": 144,
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 20,
        "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 5, "max_num_gist_tokens": 8,
        "gist_step": 1, "gist_min_text_len": 7, "gist_max_text_len": 16, "axes_dims": (4, 6, 6),
        "axes_lens": (32, 16, 16),
    },
    "BriaFiboTransformer2DModel": {
        "in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6), "text_encoder_dim": 18,
    },
    "BriaTransformer2DModel": {
        "in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6),
    },
    "ChromaTransformer2DModel": {
        "in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6),
        "approximator_num_channels": 8, "approximator_hidden_dim": 24, "approximator_layers": 1,
    },
    "CogView3PlusTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
        "text_embed_dim": 20, "time_embed_dim": 12, "condition_dim": 6, "pos_embed_max_size": 16, "sample_size": 16,
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
    "DreamLiteTransformer2DModel": {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 32, "num_layers": 2, "norm_num_groups": 4,
        "cross_attention_dim": 20, "qk_norm": "rms_norm", "ff_mult": 3,
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 52, "in_channels": 6,
        "out_channels": 6, "text_in_dim": 20, "rope_axes_dim": (4, 6, 6),
    },
    "Flux2Transformer2DModel": {
        "in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "timestep_guidance_channels": 18,
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "Flux3Transformer2DModel": {
        "in_channels": 12, "cond_in_channels": 10, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "timestep_channels": 18, "axes_dims_rope": (4, 4, 4, 4),
    },
    "FluxTransformer2DModel": {
        "in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "pooled_projection_dim": 18, "axes_dims_rope": (4, 6, 6),
        "guidance_embeds": True,
    },
    "GlmImageTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
        "text_embed_dim": 20, "time_embed_dim": 12, "condition_dim": 6, "prior_vq_quantizer_codebook_size": 37,
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8,
        "num_attention_heads": 4, "caption_channels": (20, 22), "text_emb_dim": 18, "axes_dims_rope": (4, 2, 2),
        "max_resolution": (16, 16), "llama_layers": (0, 1),
    },
    "HunyuanDiT2DModel": {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "patch_size": 2, "sample_size": 16,
        "hidden_size": 32, "num_layers": 4, "cross_attention_dim": 20, "cross_attention_dim_t5": 24,
        "pooled_projection_dim": 18, "text_len": 7, "text_len_t5": 9,
    },
    "HunyuanImageTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 20, "text_embed_2_dim": 18,
        "rope_axes_dim": (8, 8), "guidance_embeds": True,
    },
    "Ideogram4Transformer2DModel": {
        "in_channels": 12, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "intermediate_size": 52, "adaln_dim": 18, "llm_features_dim": 20, "mrope_section": (4, 2, 2),
    },
    "Krea2Transformer2DModel": {
        "in_channels": 12, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 52, "timestep_embed_dim": 18, "text_hidden_dim": 20,
        "num_text_layers": 3, "text_num_attention_heads": 2, "text_num_key_value_heads": 1,
        "text_intermediate_size": 28, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1,
        "axes_dims_rope": (4, 6, 6),
    },
    "LongCatImageTransformer2DModel": {
        "in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "pooled_projection_dim": 18, "axes_dims_rope": (4, 6, 6),
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 16, "in_channels": 4, "hidden_size": 48, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 3, "num_kv_heads": 1, "multiple_of": 20, "axes_dim_rope": (4, 6, 6),
        "axes_lens": (40, 16, 16), "cap_feat_dim": 20,
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 16, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4,
        "num_kv_heads": 2, "multiple_of": 20, "cross_attention_dim": 20,
    },
    "NucleusMoEImageTransformer2DModel": {
        "in_channels": 12, "out_channels": 3, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 4,
        "num_key_value_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6), "num_experts": 4,
        "moe_intermediate_dim": 28, "capacity_factors": 2.0, "dense_moe_strategy": "leave_first_block_dense",
    },
    "OmniGenTransformer2DModel": {
        "in_channels": 4, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
        "intermediate_size": 52, "num_layers": 2, "pad_token_id": 0, "vocab_size": 37, "max_position_embeddings": 64,
        "original_max_position_embeddings": 64, "pos_embed_max_size": 12, "time_step_dim": 18,
        "rope_scaling": {"long_factor": (1.0, 1.1, 1.2, 1.3), "short_factor": (1.0, 1.0, 1.0, 1.0)},
    },
    "OvisImageTransformer2DModel": {
        "in_channels": 12, "out_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6),
    },
    "PRXTransformer2DModel": {
        "in_channels": 4, "context_in_dim": 20, "hidden_size": 32, "num_heads": 2, "depth": 2, "axes_dim": (8, 8),
    },
    "PixArtTransformer2DModel": {
        "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 2, "cross_attention_dim": 24,
        "caption_channels": 20, "sample_size": 10, "use_additional_conditions": True,
    },
    "PriorTransformer": {
        "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "embedding_dim": 20, "num_embeddings": 7,
    },
    "QwenImage21Transformer2DModel": {
        "in_channels": 12, "out_channels": 12, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "context_in_dim": 20, "axes_dims_rope": (4, 6, 6),
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 12, "out_channels": 3, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 20, "axes_dims_rope": (4, 6, 6),
    },
    "SD3Transformer2DModel": {
        "sample_size": 16, "in_channels": 4, "out_channels": 4, "num_layers": 3, "attention_head_dim": 8,
        "num_attention_heads": 4, "joint_attention_dim": 20, "caption_projection_dim": 32,
        "pooled_projection_dim": 18, "pos_embed_max_size": 12, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    },
    "SanaTransformer2DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
        "caption_channels": 20, "sample_size": 8,
    },
    "Transformer2DModel": {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 32, "num_layers": 2, "norm_num_groups": 4,
        "cross_attention_dim": 20, "norm_type": "layer_norm",
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": 20, "axes_dims": (4, 6, 6), "axes_lens": (64, 16, 16),
    },
}  # fmt: skip
