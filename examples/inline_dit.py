"""The network of ``dit.py`` with attention and feed-forward written out in the block's own forward.

No module encloses the feed-forward network or the attention here; they exist only as data flow.
Shapes: B batch, T tokens, D width, N heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import DiT


class InlineDiTBlock(nn.Module):
    """An adaLN-zero transformer block whose linear layers are all its direct children."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.up = nn.Linear(width, int(width * mlp_ratio))
        self.down = nn.Linear(int(width * mlp_ratio), width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        B, T, D = x.shape
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)

        h = self.norm1(x) * (1 + scale_a) + shift_a
        q = self.q(h).view(B, T, self.heads, -1).transpose(1, 2)
        k = self.k(h).view(B, T, self.heads, -1).transpose(1, 2)
        v = self.v(h).view(B, T, self.heads, -1).transpose(1, 2)
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + gate_a * self.out(h.transpose(1, 2).reshape(B, T, D))

        h = self.norm2(x) * (1 + scale_m) + shift_m
        h = self.down(F.gelu(self.up(h), approximate="tanh"))
        out: Tensor = x + gate_m * h
        return out


class InlineDiT(DiT):
    """``DiT`` built from inline blocks; same inputs, outputs and options."""

    block_class = InlineDiTBlock
