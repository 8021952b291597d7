"""A diffusion transformer with no layer modules at all: parameters in dictionaries, forward in functional calls.

It has the inputs and outputs of ``dit.DiT``. Attention is spelled out with matmul and softmax.
Shapes: B batch, C channels, H and W image sides, T tokens, D width, N heads, P patch side, F hidden.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from examples.dit import sincos_grid, timestep_features

Shapes = dict[str, tuple[int, ...]]


def parameters_of(shapes: Shapes) -> nn.ParameterDict:
    """Make one parameter per name: zeros for biases and adaLN weights, scaled normal otherwise."""
    made = {}
    for name, shape in shapes.items():
        zero = len(shape) == 1 or name.startswith("ada")
        made[name] = nn.Parameter(torch.zeros(shape) if zero else torch.randn(shape) * shape[-1] ** -0.5)
    return nn.ParameterDict(made)


def block_shapes(width: int, hidden: int) -> Shapes:
    """Return the shape of every parameter of a block."""
    shapes: Shapes = {f"{name}_weight": (width, width) for name in ("q", "k", "v", "o")}
    shapes |= {"up_weight": (hidden, width), "up_bias": (hidden,)}
    shapes |= {"down_weight": (width, hidden), "down_bias": (width,)}
    return shapes | {"ada_weight": (6 * width, width), "ada_bias": (6 * width,)}


def attention(x_BTD: Tensor, p: nn.ParameterDict, heads: int) -> Tensor:
    """Self-attention with separate, bias-free projections."""
    B, T, D = x_BTD.shape
    q_BNTd = F.linear(x_BTD, p["q_weight"]).view(B, T, heads, D // heads).transpose(1, 2)
    k_BNTd = F.linear(x_BTD, p["k_weight"]).view(B, T, heads, D // heads).transpose(1, 2)
    v_BNTd = F.linear(x_BTD, p["v_weight"]).view(B, T, heads, D // heads).transpose(1, 2)
    scores_BNTT = torch.matmul(q_BNTd, k_BNTd.transpose(-2, -1)) * (D // heads) ** -0.5
    out_BNTd = torch.matmul(torch.softmax(scores_BNTT, dim=-1), v_BNTd)
    return F.linear(out_BNTd.transpose(1, 2).reshape(B, T, D), p["o_weight"])


def feed_forward(x_BTD: Tensor, p: nn.ParameterDict) -> Tensor:
    """Linear, GELU, linear."""
    hidden_BTF = F.gelu(F.linear(x_BTD, p["up_weight"], p["up_bias"]))
    return F.linear(hidden_BTF, p["down_weight"], p["down_bias"])


def normalise(x_BTD: Tensor, shift_B1D: Tensor, scale_B1D: Tensor) -> Tensor:
    """Layer norm without weights, then the affine map given by the conditioning."""
    return torch.addcmul(shift_B1D, F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6), 1 + scale_B1D)


def block(x_BTD: Tensor, c_BD: Tensor, p: nn.Module, heads: int) -> Tensor:
    """Attention and feed-forward, each gated and shifted by the conditioning."""
    assert isinstance(p, nn.ParameterDict)
    modulation_B1M = F.linear(F.silu(c_BD), p["ada_weight"], p["ada_bias"]).unsqueeze(1)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation_B1M.chunk(6, dim=-1)
    x_BTD = x_BTD + gate_a * attention(normalise(x_BTD, shift_a, scale_a), p, heads)
    return x_BTD + gate_m * feed_forward(normalise(x_BTD, shift_m, scale_m), p)


class FunctionalDiT(nn.Module):
    """Predict noise or velocity [B, C, H, W] from noisy images [B, C, H, W], timesteps [B] and labels [B]."""

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
    ) -> None:
        super().__init__()
        if image_size % patch or width % heads or width % 4:
            raise ValueError(f"image {image_size} / patch {patch} / width {width} / heads {heads} do not divide")
        self.patch, self.in_channels, self.width, self.heads = patch, in_channels, width, heads
        values = patch * patch * in_channels
        self.outer = parameters_of(
            {
                "patch_weight": (width, values),
                "patch_bias": (width,),
                "label_weight": (classes + 1, width),
                "time_in_weight": (width, 4 * width),
                "time_in_bias": (width,),
                "time_out_weight": (width, width),
                "time_out_bias": (width,),
                "ada_weight": (2 * width, width),
                "ada_bias": (2 * width,),
                "final_weight": (values, width),
                "final_bias": (values,),
            }
        )
        shapes = block_shapes(width, int(width * mlp_ratio))
        self.blocks = nn.ModuleList([parameters_of(shapes) for _ in range(depth)])
        self.register_buffer("position", sincos_grid(width, image_size // patch), persistent=False)
        self.position: Tensor

    def condition(self, t_B: Tensor, y_B: Tensor) -> Tensor:
        """Return the sum of the timestep and label embeddings [B, D]."""
        p = self.outer
        features = timestep_features(t_B, 4 * self.width).to(p["time_in_weight"].dtype)
        hidden = F.silu(F.linear(features, p["time_in_weight"], p["time_in_bias"]))
        return F.linear(hidden, p["time_out_weight"], p["time_out_bias"]) + F.embedding(y_B, p["label_weight"])

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        p, size = self.outer, x.shape[-2:]
        patches_BTV = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        h_BTD = F.linear(patches_BTV, p["patch_weight"], p["patch_bias"]) + self.position
        c_BD = self.condition(t, y)
        for parameters in self.blocks:
            h_BTD = block(h_BTD, c_BD, parameters, self.heads)
        shift, scale = F.linear(F.silu(c_BD), p["ada_weight"], p["ada_bias"]).unsqueeze(1).chunk(2, dim=-1)
        values_BTV = F.linear(normalise(h_BTD, shift, scale), p["final_weight"], p["final_bias"])
        return F.fold(values_BTV.transpose(1, 2), size, self.patch, stride=self.patch)
