"""Tiny configs of video transformers. See `moefx.zoo._tiny`."""

from __future__ import annotations

from typing import Any

VIDEO: dict[str, dict[str, Any]] = {
    "AllegroTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "num_layers": 2,
        "cross_attention_dim": 48, "caption_channels": 20, "sample_height": 8, "sample_width": 12, "sample_frames": 3,
    },
    "AnyFlowFARTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 20,
        "freq_dim": 18, "ffn_dim": 52, "num_layers": 2, "rope_max_seq_len": 32,
    },
    "AnyFlowTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20,
        "freq_dim": 18, "ffn_dim": 52, "num_layers": 2, "rope_max_seq_len": 32,
    },
    "ChronoEditTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20,
        "freq_dim": 18, "ffn_dim": 52, "num_layers": 2, "rope_max_seq_len": 32, "image_dim": 14,
        "added_kv_proj_dim": 24,
    },
    "CogVideoXTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12,
        "text_embed_dim": 20, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": 7, "use_rotary_positional_embeddings": True,
    },
    "ConsisIDTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "time_embed_dim": 12,
        "text_embed_dim": 20, "num_layers": 2, "sample_width": 12, "sample_height": 8, "sample_frames": 9,
        "max_text_seq_length": 7, "use_rotary_positional_embeddings": True, "is_train_face": True,
        "cross_attn_interval": 1, "cross_attn_dim_head": 8, "cross_attn_num_heads": 2, "LFE_id_dim": 14,
        "LFE_vit_dim": 18, "LFE_depth": 5, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 2,
        "LFE_num_querie": 3, "LFE_output_dim": 32, "LFE_ff_mult": 2,
    },
    "Cosmos3OmniTransformer": {
        "head_dim": 16, "hidden_size": 32, "intermediate_size": 52, "latent_channel": 3, "patch_latent_dim": 12,
        "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 37,
        "rope_axes_dim": (4, 2, 2),
    },
    # A padding mask would be resized by torchvision, which moefx does not ask for.
    "CosmosTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 18, "num_layers": 2,
        "mlp_ratio": 2.0, "text_embed_dim": 20, "adaln_lora_dim": 12, "max_size": (4, 16, 16),
        "concat_padding_mask": False,
    },
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 9, "out_channels": 4, "patch_size": 2,
        "sample_width": 12, "sample_height": 8, "num_layers": 2, "mmdit_layers": 1, "time_embed_dim": 12,
        "text_embed_dim": 20, "text_embed_dim_t5": 22,
    },
    "HeliosTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 20,
        "freq_dim": 18, "ffn_dim": 52, "num_layers": 2, "rope_dim": (4, 6, 6),
    },
    "HunyuanVideo15Transformer3DModel": {
        "in_channels": 5, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_refiner_layers": 1, "text_embed_dim": 20, "text_embed_2_dim": 18, "image_embed_dim": 14,
        "rope_axes_dim": (4, 6, 6),
    },
    "HunyuanVideoFramepackTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1,
        "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 20, "pooled_projection_dim": 18,
        "rope_axes_dim": (4, 6, 6), "has_image_proj": True, "image_proj_dim": 14, "has_clean_x_embedder": True,
    },
    "HunyuanVideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_single_layers": 2, "num_refiner_layers": 1, "text_embed_dim": 20, "pooled_projection_dim": 18,
        "rope_axes_dim": (4, 6, 6),
    },
    "JoyImageEditPlusTransformer3DModel": {
        "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 20, "num_layers": 2,
        "rope_dim_list": (4, 6, 6),
    },
    "JoyImageEditTransformer3DModel": {
        "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 20, "num_layers": 2,
        "rope_dim_list": (4, 6, 6),
    },
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 18, "time_dim": 12, "out_visual_dim": 4,
        "model_dim": 32, "ff_dim": 52, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        "visual_cond": True,
    },
    "Kandinsky6SRTransformer3DModel": {
        "in_visual_dim": 6, "out_visual_dim": 10, "time_dim": 12, "model_dim": 32, "ff_dim": 52,
        "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "nabla_window": (3, 3, 3),
    },
    "Kandinsky6Transformer3DModel": {
        "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 20, "in_text_dim2": 18, "time_dim": 12,
        "model_dim": 32, "ff_dim": 52, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6),
        "in_audio_dim": 6, "out_audio_dim": 6,
    },
    "LTX2VideoTransformer3DModel": {
        "in_channels": 10, "out_channels": 10, "num_attention_heads": 4, "attention_head_dim": 8,
        "cross_attention_dim": 32, "audio_in_channels": 6, "audio_out_channels": 6, "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 6, "audio_cross_attention_dim": 24, "num_layers": 2, "caption_channels": 20,
    },
    "LTXVideoTransformer3DModel": {
        "in_channels": 10, "out_channels": 10, "num_attention_heads": 4, "attention_head_dim": 8,
        "cross_attention_dim": 32, "num_layers": 2, "caption_channels": 20,
    },
    "LatteTransformer3DModel": {
        "num_attention_heads": 3, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2,
        "cross_attention_dim": 24, "sample_size": 10, "patch_size": 2, "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
        "caption_channels": 20, "video_length": 3,
    },
    "MiniMaxH3Transformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "hidden_size": 28, "num_layers": 2,
        "num_refiner_layers": 1, "ffn_dim": 52, "in_channels": 4, "audio_in_channels": 6, "text_dim": 20,
        "freq_dim": 18, "time_embed_hidden_dim": 26, "time_embed_dim": 14, "rope_freq_dim": 2,
    },
    "MochiTransformer3DModel": {
        "num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "pooled_projection_dim": 18,
        "in_channels": 4, "text_embed_dim": 24, "time_embed_dim": 12, "max_sequence_length": 16,
    },
    "MotifVideoTransformer3DModel": {
        "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
        "num_single_layers": 2, "num_decoder_layers": 1, "text_embed_dim": 20, "image_embed_dim": 14,
        "rope_axes_dim": (4, 6, 6),
    },
    "SanaVideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
        "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
        "caption_channels": 20, "sample_size": 8, "rope_max_seq_len": 32,
    },
    "SanaWMLTX2RefinerTransformer3DModel": {
        "in_channels": 10, "out_channels": 10, "num_attention_heads": 4, "attention_head_dim": 8,
        "cross_attention_dim": 32, "audio_in_channels": 6, "audio_out_channels": 6, "audio_num_attention_heads": 4,
        "audio_attention_head_dim": 6, "audio_cross_attention_dim": 24, "num_layers": 2, "caption_channels": 20,
    },
    "SanaWMTransformer3DModel": {
        "in_channels": 6, "num_layers": 2, "hidden_size": 48, "num_attention_heads": 2, "softmax_every_n": 2,
        "linear_head_dim": 24, "chunk_plucker_channels": 10, "chunk_plucker_post_attn_blocks": 2,
        "caption_channels": 20, "mixed_precision": "fp32",
    },
    "SkyReelsV2Transformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20,
        "freq_dim": 18, "ffn_dim": 52, "num_layers": 2, "rope_max_seq_len": 32, "inject_sample_info": True,
    },
    "WanAnimate2Transformer3DModel": {
        "text_len": 9, "in_dim": 10, "dim": 24, "ffn_dim": 52, "freq_dim": 18, "text_dim": 20, "out_dim": 4,
        "num_heads": 2, "num_layers": 2,
    },
    "WanAnimateTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12, "latent_channels": 4,
        "out_channels": 4, "text_dim": 20, "freq_dim": 18, "ffn_dim": 52, "num_layers": 2, "image_dim": 14,
        "added_kv_proj_dim": 24, "rope_max_seq_len": 32, "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
        "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8,
        "face_encoder_hidden_dim": 12, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
    },
    "WanTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20,
        "freq_dim": 16, "ffn_dim": 52, "num_layers": 2, "rope_max_seq_len": 32,
    },
    "WanVACETransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 20,
        "freq_dim": 18, "ffn_dim": 52, "num_layers": 3, "rope_max_seq_len": 32, "vace_layers": (0, 2),
        "vace_in_channels": 6,
    },
}  # fmt: skip
