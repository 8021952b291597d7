"""Tiny configs of U-Nets, audio models and one-dimensional models. See `moefx.zoo._tiny`."""

from __future__ import annotations

from typing import Any

OTHER: dict[str, dict[str, Any]] = {
    "AceStepTransformer1DModel": {
        "hidden_size": 32, "intermediate_size": 52, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "in_channels": 18, "audio_acoustic_hidden_dim": 6,
        "encoder_hidden_size": 20, "sliding_window": 4,
    },
    "AudioLDM2UNet2DConditionModel": {
        "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": ((None, 20, 22), (None, 20, 22)), "attention_head_dim": 2, "sample_size": 8,
    },
    "DreamLiteUNetModel": {
        "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 20,
        "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"),
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteCrossAttnNoSelfAttnUpBlock2D"),
        "attention_head_dim": 2, "ff_mult": 3, "sample_size": 8,
    },
    "I2VGenXLUNet": {
        "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 20, "attention_head_dim": 2, "sample_size": 8,
    },
    "Kandinsky3UNet": {
        "in_channels": 4, "time_embedding_dim": 24, "groups": 4, "attention_head_dim": 4, "layers_per_block": 2,
        "block_out_channels": (16, 32), "cross_attention_dim": 20, "encoder_hid_dim": 22,
    },
    "LongCatAudioDiTTransformer": {
        "dit_dim": 32, "dit_depth": 2, "dit_heads": 4, "dit_text_dim": 20, "latent_dim": 6,
    },
    "MiniMaxMusic3Transformer1DModel": {
        "in_channels": 6, "condition_dim": 20, "num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 8,
        "ff_inner_dim": 52, "rotary_dim": 4, "fourier_embedding_dim": 18,
    },
    "RFD4ProteinaTransformer": {
        "nlayers": 2, "token_dim": 24, "nheads": 2, "dim_cond": 16, "pair_repr_dim": 12, "latent_dim": 6,
        "token_type_emb_dim": 10, "cath_emb_dim": 4, "t_emb_dim": 14, "seq_sep_dim": 8, "tri_mult_c": 10,
        "num_sequence_classes": 11,
    },
    "StableAudio3DiTModel": {
        "io_channels": 6, "embed_dim": 32, "depth": 2, "num_heads": 4, "cond_token_dim": 20, "global_cond_dim": 18,
        "local_add_cond_dim": 7, "timestep_features_dim": 14, "num_memory_tokens": 3,
    },
    "StableAudioDiTModel": {
        "sample_size": 24, "in_channels": 6, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
        "num_key_value_attention_heads": 2, "out_channels": 6, "cross_attention_dim": 16, "time_proj_dim": 14,
        "global_states_input_dim": 18, "cross_attention_input_dim": 20,
    },
    "StableCascadeUNet": {
        "in_channels": 4, "out_channels": 4, "timestep_ratio_embedding_dim": 8, "conditioning_dim": 20,
        "block_out_channels": (16, 32), "num_attention_heads": (2, 4), "down_num_layers_per_block": (1, 1),
        "up_num_layers_per_block": (1, 1), "clip_text_in_channels": 14, "clip_text_pooled_in_channels": 18,
        "clip_image_in_channels": 22, "effnet_in_channels": 6, "dropout": (0.0, 0.0),
    },
    "T5FilmDecoder": {
        "input_dims": 6, "targets_length": 24, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 6, "d_ff": 52,
    },
    "TransformerTemporalModel": {
        "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 32, "num_layers": 2, "norm_num_groups": 4,
    },
    "UNet1DModel": {
        "in_channels": 4, "out_channels": 4, "extra_in_channels": 64, "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock1DNoSkip", "AttnDownBlock1D"),
        "up_block_types": ("AttnUpBlock1D", "UpBlock1DNoSkip"), "sample_size": 32,
    },
    "UNet2DConditionModel": {
        "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 20, "attention_head_dim": 2, "sample_size": 8,
    },
    "UNet2DModel": {
        "block_out_channels": (16, 32), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "norm_num_groups": 4,
        "attention_head_dim": 8, "num_class_embeds": 11, "sample_size": 8,
    },
    "UNet3DConditionModel": {
        "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 20, "attention_head_dim": 8, "sample_size": 8,
    },
    "UNetMotionModel": {
        "block_out_channels": (16, 32), "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 20, "num_attention_heads": 2, "motion_num_attention_heads": 2, "sample_size": 8,
    },
    "UNetSpatioTemporalConditionModel": {
        "in_channels": 8, "out_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "addition_time_embed_dim": 6,
        "projection_class_embeddings_input_dim": 18, "cross_attention_dim": 20, "num_attention_heads": (2, 4),
        "sample_size": 8,
    },
    "UVit2DModel": {
        "hidden_size": 32, "cond_embed_dim": 18, "micro_cond_encode_dim": 4, "micro_cond_embed_dim": 20,
        "encoder_hidden_size": 20, "vocab_size": 40, "codebook_size": 37, "in_channels": 24, "block_out_channels": 24,
        "num_res_blocks": 1, "block_num_heads": 3, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 52, "sample_size": 8,
    },
    "UniDiffuserModel": {
        "text_dim": 20, "clip_img_dim": 14, "num_text_tokens": 7, "num_attention_heads": 4, "attention_head_dim": 8,
        "in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_size": 10, "patch_size": 2,
        "activation_fn": "gelu", "num_embeds_ada_norm": 1000, "norm_type": "layer_norm", "use_patch_pos_embed": False,
        "ff_final_dropout": True, "use_data_type_embedding": True,
    },
}  # fmt: skip
