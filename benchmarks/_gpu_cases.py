"""The problems of ``gpu.py``: shapes of published denoisers, routings, and the floors under their times.

Shapes: ``T`` tokens, ``K`` slots, ``R = T*K`` rows, ``E`` experts, ``D`` model and ``F`` expert width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

ROUTINGS = ("balanced", "skewed", "all to one")


@dataclass(frozen=True)
class Shape:
    """Sizes of one routed FFN; ``split`` experts are slices of the dense FFN, others are copies of it."""

    model: str
    tokens: int
    width: int
    hidden: int
    experts: int
    slots: int

    @property
    def name(self) -> str:
        """A short unique name."""
        return f"{self.model} T{self.tokens} E{self.experts} k{self.slots} F{self.hidden}"

    @property
    def rows(self) -> int:
        """Routed rows, R."""
        return self.tokens * self.slots

    def flops(self, backward: bool) -> float:
        """Useful operations: two products per weight and row, three times that with the backward pass."""
        return 4.0 * self.rows * self.width * self.hidden * (3 if backward else 1)

    def bytes(self, backward: bool) -> float:
        """Least traffic of 2-byte elements: every tensor once, results expanded, then reduced, z kept in training."""
        t, d, f, r, e = self.tokens, self.width, self.hidden, self.rows, self.experts
        touched = e * (1 - (1 - 1 / e) ** r)
        reduced = r * d + t * d if self.slots > 1 else 0
        elements = t * d + touched * 2 * d * f + 2 * r * f + r * d + reduced
        if backward:
            elements += r * f + t * d + touched * f * d + 3 * r * f  # z, then dz and h from dO and z
            elements += t * d + 2 * r * f + 2 * e * f * d  # both weight gradients
            elements += r * f + touched * d * f + r * d + reduced + t * d  # gradient of x
        return 2.0 * elements


def standard_shapes() -> list[Shape]:
    """Return the shapes to time, the most telling first, so that a short run has them."""
    dit, split = ("DiT-XL/2", 1152), (("E9", 9, 3, 512), ("E18", 18, 6, 256), ("E36", 36, 9, 128))
    shapes = [Shape(dit[0], tokens, dit[1], 4608, 8, 2) for tokens in (4096, 1024, 16384, 256)]
    shapes += [Shape("FLUX", tokens, 3072, 12288, 8, 2) for tokens in (4608, 512)]
    shapes += [Shape("SD3-M", 4250, 1536, 6144, 8, 2)]
    shapes += [Shape(dit[0], 4096, dit[1], hidden, experts, slots) for _, experts, slots, hidden in split]
    shapes += [Shape(dit[0], 4096, dit[1], 4608, experts, slots) for experts, slots in ((8, 1), (16, 2), (64, 8))]
    shapes += [Shape(dit[0], 16384, dit[1], 256, 18, 6), Shape("FLUX", 4608, 3072, 1024, 12, 3)]
    return [*shapes, Shape(dit[0], 65536, dit[1], 4608, 8, 2), Shape("FLUX", 18432, 3072, 12288, 8, 2)]


def quick_shapes() -> list[Shape]:
    """Return the shape of a dry run: odd sizes, more experts than rows."""
    return [Shape("toy", 7, 24, 40, 8, 2)]


@dataclass(frozen=True)
class Case:
    """One problem: tokens, a routing that all implementations share, and stacked weights."""

    shape: Shape
    routing: str
    x: Tensor  # [T, D]
    experts: Tensor  # [T, K] int64
    gates: Tensor  # [T, K] float32
    w1: Tensor  # [E, F, D]
    w2: Tensor  # [E, D, F]

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What takes a gradient."""
        return self.x, self.gates, self.w1, self.w2

    def train(self, wanted: bool) -> Case:
        """Let the leaves take gradients, or not."""
        for leaf in self.leaves:
            leaf.requires_grad_(wanted)
        return self


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
        draw(shape.experts, shape.hidden, shape.width, scale=shape.width**-0.5),
        draw(shape.experts, shape.width, shape.hidden, scale=shape.hidden**-0.5),
    )


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches on plain work: one large product, one large copy."""

    flops_per_s: float
    bytes_per_s: float

    def floor_s(self, shape: Shape, backward: bool) -> float:
        """Return the time under which a routed FFN cannot fall."""
        return max(shape.flops(backward) / self.flops_per_s, shape.bytes(backward) / self.bytes_per_s)

    def bound(self, shape: Shape, backward: bool) -> str:
        """Return what sets the floor."""
        products = shape.flops(backward) / self.flops_per_s
        return "compute" if products >= shape.bytes(backward) / self.bytes_per_s else "memory"
