"""A vision transformer for classification (Dosovitskiy et al., arXiv:2010.11929) with the layout of timm's.

Shapes: B batch, C channels, H and W image sides, T tokens (class token first), D width, N heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PatchEmbed(nn.Module):
    """Project non-overlapping patches to tokens: [B, C, H, W] -> [B, T, D]."""

    def __init__(self, patch: int, in_channels: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Self-attention with a fused projection and, optionally, normalised queries and keys."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(self.head_width) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(self.head_width) if qk_norm else nn.Identity()
        self.dropout = dropout
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).reshape(B, T, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        out: Tensor = self.proj_drop(self.proj(x.transpose(1, 2).reshape(B, T, D)))
        return out


class Mlp(nn.Module):
    """The feed-forward network, with dropout after each of its two linear layers."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, width)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop1(self.act(self.fc1(x)))
        out: Tensor = self.drop2(self.fc2(x))
        return out


class LayerScale(nn.Module):
    """Scale every channel by a learned factor that starts small (Touvron et al., arXiv:2103.17239)."""

    def __init__(self, width: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, qk_norm: bool, layer_scale: float | None, dropout: float
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, qk_norm=qk_norm, dropout=dropout)
        self.ls1 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, int(width * mlp_ratio), dropout)
        self.ls2 = nn.Identity() if layer_scale is None else LayerScale(width, layer_scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        out: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
        return out


class VisionTransformer(nn.Module):
    """Classify images [B, C, H, W] into logits [B, classes] from the final class token."""

    def __init__(
        self,
        *,
        image_size: int = 32,
        patch: int = 4,
        in_channels: int = 3,
        depth: int = 4,
        width: int = 64,
        heads: int = 4,
        classes: int = 10,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        layer_scale: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if image_size % patch or width % heads:
            raise ValueError(f"image {image_size} / patch {patch} / width {width} / heads {heads} do not divide")
        self.patch_embed = PatchEmbed(patch, in_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + (image_size // patch) ** 2, width) * 0.02)
        self.pos_drop = nn.Dropout(dropout)
        self.blocks = nn.Sequential(
            *(
                Block(width, heads, mlp_ratio, qk_norm=qk_norm, layer_scale=layer_scale, dropout=dropout)
                for _ in range(depth)
            )
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)
        self.apply(_initialise)
        nn.init.normal_(self.cls_token, std=1e-6)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the normalised tokens [B, T, D], class token first."""
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        out: Tensor = self.norm(self.blocks(self.pos_drop(x + self.pos_embed)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.forward_features(x)[:, 0])
        return out


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
