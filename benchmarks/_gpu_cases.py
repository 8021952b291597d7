"""The problems of ``gpu.py``: shapes of published denoisers, routings, and the floors under their times.

Shapes: ``T`` tokens, ``K`` slots, ``R = T*K`` rows, ``E`` experts, ``D`` model and ``F`` expert width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

ROUTINGS = ("balanced", "skewed", "all to one", "recorded")
FORWARD, TRAINING, BACKWARD = DIRECTIONS = ("forward", "training forward", "forward + backward")
#: Rows per expert of a layer of a DiT that was trained on digits, 16 experts, at its lowest noise level.
RECORDED = (425, 4103, 4377, 182, 1717, 1046, 3810, 724, 2110, 310, 1329, 2987, 1568, 3258, 2489, 2333)


@dataclass(frozen=True)
class Shape:
    """Sizes of one routed FFN: GELU, or with ``gated`` SwiGLU over two projections that are stacked."""

    model: str
    tokens: int
    width: int
    hidden: int
    experts: int
    slots: int
    gated: bool = False

    @property
    def name(self) -> str:
        """A short unique name."""
        gated = " gated" if self.gated else ""
        return f"{self.model} T{self.tokens} E{self.experts} k{self.slots} F{self.hidden}{gated}"

    @property
    def up(self) -> int:
        """Columns of the first projection."""
        return self.hidden * (2 if self.gated else 1)

    @property
    def rows(self) -> int:
        """Routed rows, R."""
        return self.tokens * self.slots

    def flops(self, direction: str) -> float:
        """Useful operations: two products per weight and row, three times that with the backward pass."""
        return 2.0 * self.rows * self.width * (self.up + self.hidden) * (3 if direction == BACKWARD else 1)

    def bytes(self, direction: str) -> float:
        """Least traffic of 2-byte elements: every tensor once, results expanded, then reduced, z kept in training."""
        t, d, f, u, r, e = self.tokens, self.width, self.hidden, self.up, self.rows, self.experts
        touched = e * (1 - (1 - 1 / e) ** r)
        reduced = r * d + t * d if self.slots > 1 else 0
        elements = t * d + touched * d * (u + f) + 2 * r * f + r * d + reduced
        if direction != FORWARD:
            elements += r * u
        if direction == BACKWARD:
            elements += t * d + touched * f * d + 2 * r * u + r * f  # dz and h from dO and z
            elements += t * d + r * u + r * f + e * d * (u + f)  # both weight gradients
            elements += r * u + touched * d * u + r * d + reduced + t * d  # gradient of x
        return 2.0 * elements


def standard_shapes() -> list[Shape]:
    """Return the shapes to time, the most telling first, so that a short run has them."""
    dit, split = ("DiT-XL/2", 1152), (("E9", 9, 3, 512), ("E18", 18, 6, 256), ("E36", 36, 9, 128))
    shapes = [Shape(dit[0], tokens, dit[1], 4608, 8, 2) for tokens in (4096, 1024, 16384, 256)]
    shapes += [Shape("FLUX", tokens, 3072, 12288, 8, 2) for tokens in (4608, 512)]
    shapes += [Shape("SD3-M", 4250, 1536, 6144, 8, 2)]
    shapes += [Shape(dit[0], 4096, dit[1], 3072, 8, 2, gated=True)]
    shapes += [Shape(dit[0], 4096, dit[1], hidden, experts, slots) for _, experts, slots, hidden in split]
    shapes += [Shape(dit[0], 64, dit[1], 4608, 64, 2)]  # two rows per expert: the weights are the traffic
    shapes += [Shape(dit[0], 4096, dit[1], 4608, experts, slots) for experts, slots in ((8, 1), (16, 2), (64, 8))]
    shapes += [Shape(dit[0], 16384, dit[1], 256, 18, 6), Shape("FLUX", 4608, 3072, 1024, 12, 3)]
    # The sizes of which other kernels' figures are published.
    shapes += [Shape("Qwen3-30B-A3B", 8192, 2048, 768, 128, 8, gated=True)]
    return [*shapes, Shape(dit[0], 65536, dit[1], 4608, 8, 2), Shape("FLUX", 18432, 3072, 12288, 8, 2)]


def quick_shapes() -> list[Shape]:
    """Return the shapes of a dry run: odd sizes, more experts than rows."""
    return [Shape("toy", 7, 24, 40, 8, 2), Shape("toy", 5, 16, 24, 3, 2, gated=True)]


@dataclass(frozen=True)
class Case:
    """One problem: tokens, a routing that all implementations share, and stacked weights."""

    shape: Shape
    routing: str
    x: Tensor  # [T, D]
    experts: Tensor  # [T, K] int64
    gates: Tensor  # [T, K] float32
    w1: Tensor  # [E, F, D], or [E, 2 F, D]: gate, then up
    w2: Tensor  # [E, D, F]

    def activate(self, z: Tensor) -> Tensor:
        """Return the hidden rows [., F] of the first projection's."""
        if not self.shape.gated:
            return F.gelu(z, approximate="tanh")
        gate, up = z.chunk(2, dim=-1)
        return F.silu(gate) * up

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What takes a gradient."""
        return self.x, self.gates, self.w1, self.w2

    def train(self, wanted: bool) -> Case:
        """Let the leaves take gradients, or not."""
        for leaf in self.leaves:
            leaf.requires_grad_(wanted)
        return self


Run = Callable[[], Tensor]
Build = Callable[[Case], Run]


class NotHere(Exception):
    """A peer that does not take part in a case; nothing is wrong with it."""


def draw_experts(shape: Shape, routing: str, device: torch.device) -> Tensor:
    """Return expert ids [T, K], distinct within a token, of a named load."""
    if routing == "balanced":
        token = torch.arange(shape.tokens, device=device)[:, None]
        slot = torch.arange(shape.slots, device=device)[None, :]
        return (token * shape.slots + slot) % shape.experts
    if routing == "all to one":
        return torch.arange(shape.slots, device=device).repeat(shape.tokens, 1)
    generator = torch.Generator(device).manual_seed(1)
    popularity = torch.linspace(3.0, 0.0, shape.experts, device=device)
    if routing == "recorded":  # its quantiles, for any number of experts
        loads = torch.tensor(sorted(RECORDED, reverse=True), device=device, dtype=torch.float32)
        places = torch.linspace(0, len(RECORDED) - 1, shape.experts, device=device).round().long()
        popularity = loads[places].log()
    noise = -torch.log(-torch.log(torch.rand(shape.tokens, shape.experts, device=device, generator=generator)))
    return (popularity + noise).topk(shape.slots, -1).indices


def make_case(shape: Shape, routing: str, device: torch.device, dtype: torch.dtype) -> Case:
    """Draw inputs of unit scale; the same for the same arguments."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*sizes: int, scale: float = 1.0) -> Tensor:
        return torch.empty(sizes, device=device, dtype=dtype).normal_(0, scale, generator=generator)

    gates = torch.rand(shape.tokens, shape.slots, device=device, generator=generator) + 0.1
    return Case(
        shape,
        routing,
        draw(shape.tokens, shape.width),
        draw_experts(shape, routing, device),
        gates / gates.sum(-1, keepdim=True),
        draw(shape.experts, shape.up, shape.width, scale=shape.width**-0.5),
        draw(shape.experts, shape.width, shape.hidden, scale=shape.hidden**-0.5),
    )


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches on plain work: one large product, one large copy."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, shape: Shape, direction: str) -> float:
        """Return the time under which a routed FFN cannot fall."""
        return max(shape.flops(direction) / self.flops_per_s, shape.bytes(direction) / self.bytes_per_s)

    def bound(self, shape: Shape, direction: str) -> str:
        """Return what sets the floor."""
        products = shape.flops(direction) / self.flops_per_s
        return "compute" if products >= shape.bytes(direction) / self.bytes_per_s else "memory"
