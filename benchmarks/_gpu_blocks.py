"""Whole blocks, whole models and attention heads for ``gpu.py``: a DiT in plain torch, dense or with routed FFNs.

Shapes: ``B`` batch, ``N`` tokens of a sample, ``D`` width, ``H`` heads, ``E`` experts, ``K`` slots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _gpu_cases import BACKWARD, NotHere
from _gpu_peers import rehearsal_options
from torch import Tensor, nn

from moefx import ops

Makers = dict[str, Callable[[], Callable[[], Any]]]


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

    def flops(self, direction: str) -> float:
        """Useful operations of a block, dense or routed: projections, attention, FFN; three times that in training."""
        rows = self.batch * self.tokens
        products = 4 * self.width**2 + 2 * self.width * self.hidden * self.slots + 2 * self.tokens * self.width
        forward = 2.0 * rows * products + 12.0 * self.batch * self.width**2
        return forward * (3 if direction == BACKWARD else 1)


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


def model_makers(
    shape: BlockShape, depth: int, device: torch.device, dtype: torch.dtype, quick: bool, direction: str
) -> Makers:
    """Return what makes one step of a dense and of routed models, each compiled as its users would."""
    torch.manual_seed(0)
    torch.compiler.reset()
    train = direction == BACKWARD
    ways = {
        "dense, inductor": (DenseFFN, "inductor"),
        "routed, moefx": (RoutedFFN, "moefx"),
        "routed, inductor": (RoutedFFN, "inductor"),
    }
    x = torch.randn(shape.batch, shape.tokens, shape.width, device=device, dtype=dtype)
    c = torch.randn(shape.batch, shape.width, device=device, dtype=dtype)

    def make(ffn: Any, backend: str) -> Callable[[], Any]:
        model = Model(shape, ffn, depth).to(device, dtype).train(train).requires_grad_(train)
        return _step(_compiled(model, backend, quick), list(model.parameters()), x, c, train)

    return {name: partial(make, *way) for name, way in ways.items()}


def share_makers(shape: BlockShape, device: torch.device, dtype: torch.dtype, quick: bool) -> Makers:
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

    ways = {
        "layer": (layer, "moefx"),
        "products": (products, "moefx"),
        "router and grouping": (grouped, "moefx"),
        "router and grouping, inductor": (grouped, "inductor"),
    }

    def make(function: Any, backend: str) -> Callable[[], Any]:
        return _without_gradients(_compiled(function, backend, quick), x)

    return {name: partial(make, *way) for name, way in ways.items()}


def _compiled(function: Any, backend: str, quick: bool) -> Any:
    """Return what is timed; a rehearsal leaves out Inductor, which takes seconds for each."""
    if quick and backend == "inductor":
        return function
    options = rehearsal_options() if quick else None
    return torch.compile(function, fullgraph=True, dynamic=False, backend=backend, options=options)


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

    def flops(self, direction: str) -> float:
        """Useful operations where half of the heads are computed; the gradient has five products for the two."""
        forward = 2.0 * self.batch * self.tokens**2 * self.heads * self.width
        return forward * (3.5 if direction == BACKWARD else 1.0)


HEADS = (
    HeadShape("FLUX heads, 4608 tokens", 1, 4608, 24, 128),
    HeadShape("SD3 heads, 4250 tokens", 4, 4250, 24, 64),
    HeadShape("DiT heads, 1024 tokens", 8, 1024, 16, 72),
)
QUICK_HEADS = (HeadShape("toy heads", 1, 17, 2, 8),)


def head_makers(shape: HeadShape, device: torch.device, dtype: torch.dtype, quick: bool, direction: str) -> Makers:
    """Return dense attention, and attention for the chosen (query, head) pairs alone where something computes it."""
    torch.manual_seed(0)
    torch.compiler.reset()
    train = direction == BACKWARD
    sizes = (shape.batch, shape.heads, shape.tokens, shape.width)
    q, k, v = (torch.randn(sizes, device=device, dtype=dtype, requires_grad=train) for _ in range(3))
    chosen = torch.rand(shape.batch, shape.tokens, shape.heads, device=device).topk(-(-shape.heads // 2), -1).indices
    gates = torch.zeros(shape.batch, shape.tokens, shape.heads, device=device).scatter_(-1, chosen, 1.0)

    def dense() -> Callable[[], Any]:
        return _with_gradients(lambda: F.scaled_dot_product_attention(q, k, v), (q, k, v), train)

    def ours() -> Callable[[], Any]:
        leaves = [t.detach().transpose(1, 2).contiguous().requires_grad_(train) for t in (q, k, v)]
        attend = _compiled(ops.head_attention, "moefx", quick)
        return _with_gradients(lambda: attend(*leaves, gates), leaves, train)

    def packed() -> Callable[[], Any]:
        return _with_gradients(_packed(q, k, v, gates), (q, k, v), train)

    return {
        "SDPA, all heads": dense,
        "moefx, half of the heads": ours,
        "varlen_attn, heads as batch": packed,
    }


def _with_gradients(run: Callable[[], Tensor], leaves: Sequence[Tensor], train: bool) -> Callable[[], Any]:
    def call() -> Any:
        if not train:
            with torch.no_grad():
                return run()
        out = run()
        return torch.autograd.grad(out, leaves, torch.ones_like(out))

    return call


def _packed(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Callable[[], Tensor]:
    """Return attention over packed queries, one sequence for each (sample, head), if torch has it for the device.

    Raises :class:`NotHere` if it does not.
    """
    if q.device.type != "cuda":
        raise NotHere
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, tokens, width = q.shape
    wanted = gates.permute(0, 2, 1).flatten(0, 1) > 0  # [B H, N]
    rows = wanted.flatten().nonzero().squeeze(1)
    starts_q = F.pad(wanted.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    starts_k = torch.arange(batch * heads + 1, device=q.device, dtype=torch.int32) * tokens

    def run() -> Tensor:
        flat, keys, values = (t.reshape(-1, 1, width) for t in (q, k, v))
        out: Tensor = varlen_attn(flat[rows], keys, values, starts_q, starts_k, tokens, tokens)
        return out

    return run
