"""A diffusion transformer in the style of the original DiT (Peebles & Xie, arXiv:2212.09748).

Module and parameter names follow the published checkpoints (``blocks.0.attn.qkv`` and so on).
Shapes: B batch, C channels, H and W image sides, T tokens, D width, N heads, P patch side.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    """Apply a per-sample affine map to every token."""
    return x_BTD * (1 + scale_BD.unsqueeze(1)) + shift_BD.unsqueeze(1)


def sincos_grid(width: int, side: int) -> Tensor:
    """Return fixed two-dimensional sine-cosine position embeddings [1, side * side, width]."""
    rates = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.outer(torch.arange(side, dtype=torch.float64), rates)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([axis.repeat(side, 1), axis.repeat_interleave(side, dim=0)], dim=1).float().unsqueeze(0)


def timestep_features(t_B: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Return sinusoidal features [B, width] of possibly fractional timesteps [B]."""
    exponents = torch.linspace(0, -1, width // 2 + 1, device=t_B.device)[:-1]
    rates = torch.exp(math.log(max_period) * exponents)
    angles = t_B.float().unsqueeze(1) * rates
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token: [B, C, H, W] -> [B, T, D]."""

    def __init__(self, patch: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(x).flatten(2).transpose(1, 2)
        return out


class TimestepEmbedder(nn.Module):
    """Embed timesteps: sinusoidal features, then a two-layer MLP."""

    def __init__(self, width: int, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.mlp = nn.Sequential(nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.features).to(self.mlp.get_parameter("0.weight").dtype)
        out: Tensor = self.mlp(features)
        return out


class LabelEmbedder(nn.Module):
    """Embed class labels; the last row is the null class, used in place of dropped labels for guidance."""

    def __init__(self, classes: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        self.classes, self.dropout = classes, dropout

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout > 0:
            y = torch.where(torch.rand(y.shape, device=y.device) < self.dropout, self.classes, y)
        out: Tensor = self.embedding_table(y)
        return out


class Attention(nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(B, T, D))
        return out


class Mlp(nn.Module):
    """The feed-forward network: linear, GELU (tanh form), linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class DiTBlock(nn.Module):
    """A transformer block whose norms and residual gates are set by the conditioning (adaLN-zero)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_a.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        out: Tensor = x + gate_m.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_m, scale_m))
        return out


class FinalLayer(nn.Module):
    """Modulated norm and projection of every token to the values of its patch."""

    def __init__(self, width: int, patch_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(width, patch_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        out: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return out


class DiT(nn.Module):
    """Predict noise or velocity [B, C, H, W] from noisy images [B, C, H, W], timesteps [B] and labels [B]."""

    block_class: type[nn.Module] = DiTBlock

    def __init__(
        self,
        *,
        image_size: int = 8,
        patch: int = 2,
        in_channels: int = 1,
        depth: int = 3,
        width: int = 64,
        heads: int = 4,
        classes: int = 10,
        mlp_ratio: float = 4.0,
        label_dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if image_size % patch or width % heads or width % 4:
            raise ValueError(f"image {image_size} / patch {patch} / width {width} / heads {heads} do not divide")
        self.patch, self.in_channels, self.side, self.classes = patch, in_channels, image_size // patch, classes
        self.x_embedder = PatchEmbed(patch, in_channels, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width, label_dropout)
        self.pos_embed = nn.Parameter(sincos_grid(width, self.side), requires_grad=False)
        self.blocks = nn.ModuleList([self.block_class(width, heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch * patch * in_channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier for linear layers, small normal embeddings, zero for every adaLN projection and the output."""
        for name, parameter in self.named_parameters():
            if "adaLN" in name or name.startswith("final_layer") or name.endswith(".bias"):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            elif parameter.requires_grad:
                nn.init.xavier_uniform_(parameter.flatten(1))

    def unpatchify(self, x: Tensor) -> Tensor:
        """Put patch values [B, T, P * P * C] back into an image [B, C, H, W]."""
        B, S, P, C = x.shape[0], self.side, self.patch, self.in_channels
        return x.reshape(B, S, S, P, P, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, S * P, S * P)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    @classmethod
    def xl_2(cls, **options: Any) -> DiT:
        """The largest published size: 28 blocks of width 1152 on 32 x 32 latents of 4 channels, 1000 classes."""
        sizes = {"image_size": 32, "in_channels": 4, "depth": 28, "width": 1152, "heads": 16, "classes": 1000}
        return cls(**(sizes | options))
