"""Whole blocks, whole models and attention heads for ``gpu.py``: a DiT in plain torch, dense or with routed FFNs.

Shapes: ``B`` batch, ``N`` tokens of a sample, ``D`` width, ``H`` heads, ``E`` experts, ``K`` slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_peers import rehearsal_options
from torch import Tensor, nn

from moefx import ops


@dataclass(frozen=True)
class BlockShape:
    """Sizes of a transformer block; the dense one has the hidden width of all K chosen experts together."""

    name: str
    batch: int
    tokens: int
    width: int
    heads: int
    hidden: int
    experts: int
    slots: int


BLOCKS = (
    BlockShape("DiT-XL/2 block, 16 images of 256 tokens", 16, 256, 1152, 16, 4608, 8, 2),
    BlockShape("DiT-XL/2 block, 4 images of 1024 tokens", 4, 1024, 1152, 16, 4608, 8, 2),
    BlockShape("FLUX-wide block, 4608 tokens", 1, 4608, 3072, 24, 12288, 8, 2),
)
QUICK_BLOCKS = (BlockShape("toy block", 2, 9, 32, 2, 48, 4, 2),)


class DenseFFN(nn.Module):
    """An ordinary FFN of the routed one's active FLOPs."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.up = nn.Linear(shape.width, shape.hidden * shape.slots)
        self.down = nn.Linear(shape.hidden * shape.slots, shape.width)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class RoutedFFN(nn.Module):
    """Softmax top-k over E experts: router, grouping, both projections and the combine."""

    def __init__(self, shape: BlockShape) -> None:
        super().__init__()
        self.slots, self.experts = shape.slots, shape.experts
        self.router = nn.Linear(shape.width, shape.experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(shape.experts, shape.hidden, shape.width) * shape.width**-0.5)
        self.b1 = nn.Parameter(torch.zeros(shape.experts, shape.hidden))
        self.w2 = nn.Parameter(torch.randn(shape.experts, shape.width, shape.hidden) * shape.hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, N, D] to [B, N, D]."""
        gates, chosen = self.choose(x)
        order, offsets = ops.group(chosen, self.experts)
        return ops.combine(self.products(x.flatten(0, 1), order, offsets), order, gates).view(x.shape)

    def choose(self, x: Tensor) -> Any:
        """Return gates and experts [T, K]."""
        return self.router(x.flatten(0, 1)).float().softmax(-1).topk(self.slots, -1)

    def products(self, tokens: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
        """Return the routed rows [T*K, D] of tokens [T, D]."""
        hidden = F.gelu(ops.grouped_linear(tokens, self.w1, self.b1, order, offsets, self.slots), approximate="tanh")
        return ops.grouped_linear(hidden, self.w2, None, None, offsets)


class Block(nn.Module):
    """A DiT block with adaLN-zero modulation."""

    def __init__(self, shape: BlockShape, ffn: nn.Module) -> None:
        super().__init__()
        self.heads = shape.heads
        self.modulation = nn.Linear(shape.width, 6 * shape.width)
        self.qkv, self.out = nn.Linear(shape.width, 3 * shape.width), nn.Linear(shape.width, shape.width)
        self.ffn = ffn

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens [B, N, D] under a condition [B, D]."""
        s1, b1, g1, s2, b2, g2 = self.modulation(F.silu(c))[:, None].chunk(6, -1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + s1) + b1
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + g1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + g2 * self.ffn(F.layer_norm(x, x.shape[-1:]) * (1 + s2) + b2)


class Model(nn.Module):
    """A stack of blocks."""

    def __init__(self, shape: BlockShape, ffn: Callable[[BlockShape], nn.Module], depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(shape, ffn(shape)) for _ in range(depth))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Map tokens [B, N, D] under a condition [B, D]."""
        for block in self.blocks:
            x = block(x, c)
        return x


def model_calls(
    shape: BlockShape, depth: int, device: torch.device, dtype: torch.dtype, quick: bool, train: bool
) -> dict[str, Callable[[], Any]]:
    """Return one step of a dense and of routed models, each compiled as its users would."""
    torch.manual_seed(0)
    torch.compiler.reset()
    ways: dict[str, tuple[Any, dict[str, Any]]] = {
        "dense, inductor": (DenseFFN, {"backend": "eager" if quick else "inductor"}),
        "routed, moefx": (RoutedFFN, {"backend": "moefx", "options": rehearsal_options() if quick else None}),
        "routed, inductor": (RoutedFFN, {"backend": "eager" if quick else "inductor"}),
    }
    x = torch.randn(shape.batch, shape.tokens, shape.width, device=device, dtype=dtype)
    c = torch.randn(shape.batch, shape.width, device=device, dtype=dtype)
    calls: dict[str, Callable[[], Any]] = {}
    for name, (ffn, options) in ways.items():
        model = Model(shape, ffn, depth).to(device, dtype).train(train).requires_grad_(train)
        compiled = torch.compile(model, fullgraph=True, dynamic=False, **options)
        calls[name] = _step(compiled, list(model.parameters()), x, c, train)
    return calls


def share_calls(
    shape: BlockShape, device: torch.device, dtype: torch.dtype, quick: bool
) -> dict[str, Callable[[], Any]]:
    """Return a routed layer, its products alone, and its router with the grouping alone, by kernels and by Inductor.

    What the layer takes beyond its products is router, grouping and combine; the products make their row tiles, which
    the layer's grouping gives them.
    """
    torch.manual_seed(0)
    torch.compiler.reset()
    layer = RoutedFFN(shape).to(device, dtype).requires_grad_(False)
    x = torch.randn(shape.batch, shape.tokens, shape.width, device=device, dtype=dtype)
    order, offsets = ops.group(layer.choose(x)[1], shape.experts)

    def grouped(x: Tensor) -> tuple[Tensor, ...]:
        gates, chosen = layer.choose(x)
        return gates, *ops.group(chosen, shape.experts)

    def products(x: Tensor) -> Tensor:
        return layer.products(x.flatten(0, 1), order, offsets)

    ours: dict[str, Any] = {"backend": "moefx", "options": rehearsal_options() if quick else None}
    peer = {"backend": "eager" if quick else "inductor"}
    ways = {
        "layer": (layer, ours),
        "products": (products, ours),
        "router and grouping": (grouped, ours),
        "router and grouping, inductor": (grouped, peer),
    }
    calls: dict[str, Callable[[], Any]] = {}
    for name, (function, options) in ways.items():
        compiled = torch.compile(function, fullgraph=True, dynamic=False, **options)
        calls[name] = _without_gradients(compiled, x)
    return calls


def _without_gradients(function: Any, x: Tensor) -> Callable[[], Any]:
    def run() -> Any:
        with torch.no_grad():
            return function(x)

    return run


def _step(model: Any, parameters: list[Tensor], x: Tensor, c: Tensor, train: bool) -> Callable[[], Any]:
    def inference() -> Tensor:
        with torch.no_grad():
            return model(x, c)

    def training() -> Any:
        return torch.autograd.grad(model(x, c).float().square().mean(), parameters)

    return training if train else inference


@dataclass(frozen=True)
class HeadShape:
    """Sizes of an attention in which every query takes half of the heads."""

    name: str
    batch: int
    tokens: int
    heads: int
    width: int


HEADS = (HeadShape("FLUX heads, 4608 tokens", 1, 4608, 24, 128), HeadShape("DiT heads, 1024 tokens", 8, 1024, 16, 72))
QUICK_HEADS = (HeadShape("toy heads", 1, 17, 2, 8),)


def head_calls(shape: HeadShape, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return dense attention, and attention for the chosen (query, head) pairs alone where something computes it."""
    torch.manual_seed(0)
    sizes = (shape.batch, shape.heads, shape.tokens, shape.width)
    q, k, v = (torch.randn(sizes, device=device, dtype=dtype) for _ in range(3))
    calls: dict[str, Callable[[], Any]] = {"SDPA, all heads": lambda: F.scaled_dot_product_attention(q, k, v)}
    chosen = torch.rand(shape.batch, shape.tokens, shape.heads, device=device).topk(shape.heads // 2, -1).indices
    gates = torch.zeros(shape.batch, shape.tokens, shape.heads, device=device).scatter_(-1, chosen, 1.0)
    if hasattr(ops, "head_attention"):
        of_tokens = [t.transpose(1, 2).contiguous() for t in (q, k, v)]
        calls["moefx, half of the heads"] = lambda: ops.head_attention(*of_tokens, gates)
    packed = _packed(q, k, v, gates)
    if packed is not None and device.type == "cuda":
        calls["varlen_attn, heads as batch"] = packed
    return calls


def _packed(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Callable[[], Any] | None:
    """Return attention over packed queries, one sequence for each (sample, head), if torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    batch, heads, tokens, width = q.shape
    wanted = gates.permute(0, 2, 1).flatten(0, 1) > 0  # [B H, N]
    rows = wanted.flatten().nonzero().squeeze(1)
    starts_q = F.pad(wanted.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    starts_k = torch.arange(batch * heads + 1, device=q.device, dtype=torch.int32) * tokens
    keys, values = (t.reshape(-1, 1, width) for t in (k, v))
    flat = q.reshape(-1, 1, width)
    return lambda: varlen_attn(flat[rows], keys, values, starts_q, starts_k, tokens, tokens)
