"""One expert as two runs of bytes, its first and its second projection, and views of buffers that hold them.

On CPU the bits of a matrix product depend on where its operands lie relative to a cache line. So every tensor is put
where it would lie in the stack it came from, modulo 64 bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moefx.routing.experts import Experts

# b_out is added once after the experts and belongs to none of them.
_NOT_STACKED = "b_out"
_SECOND = "w_out"
LINE_bytes = 64


@dataclass(frozen=True)
class Part:
    """One tensor of an expert.

    Args:
        name: among the parameters of the experts.
        shape: without the expert axis.
        dtype: of the values.
        start: first byte in the buffer, a multiple of 64, before ``shift`` is added.
        origin: address of the stack modulo 64.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    origin: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def first(self, expert: int) -> int:
        """Return the first byte of this tensor of ``expert`` in the buffer."""
        return self.start + (self.origin + expert * self.nbytes) % LINE_bytes


@dataclass(frozen=True)
class Half:
    """The tensors of one projection of an expert, one after another."""

    parts: tuple[Part, ...]

    @classmethod
    def of(cls, tensors: dict[str, nn.Parameter]) -> Half:
        """Lay out one row of each stacked tensor."""
        parts, start = [], 0
        for name, tensor in tensors.items():
            part = Part(name, tuple(tensor.shape[1:]), tensor.dtype, start, tensor.data_ptr() % LINE_bytes)
            parts.append(part)
            start += (part.nbytes // LINE_bytes + 2) * LINE_bytes  # what is left of a line at either end
        return cls(tuple(parts))

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer that holds it for any expert."""
        return self.parts[-1].start + (self.parts[-1].nbytes // LINE_bytes + 2) * LINE_bytes

    def views(self, buffer: Tensor, expert: int) -> dict[str, Tensor]:
        """Return the tensors in a buffer of bytes that begins on a line."""
        cuts = ((part, buffer[part.first(expert) :][: part.nbytes]) for part in self.parts)
        return {part.name: cut.view(part.dtype).view(part.shape) for part, cut in cuts}


@dataclass(frozen=True)
class Layout:
    """Both halves of the experts of a layer."""

    halves: tuple[Half, Half]

    @classmethod
    def of(cls, experts: Experts) -> Layout:
        """Read the layout of the experts of a layer."""
        tensors = stacked(experts)
        second = {_SECOND: tensors.pop(_SECOND)}
        return cls((Half.of(tensors), Half.of(second)))

    @property
    def nbytes(self) -> int:
        """Bytes that one expert takes on the device."""
        return sum(half.nbytes for half in self.halves)

    @property
    def largest(self) -> int:
        """Bytes of the larger half."""
        return max(half.nbytes for half in self.halves)


def stacked(experts: Experts) -> dict[str, nn.Parameter]:
    """Return the parameters of a layer's experts that have one row per expert, by name."""
    return {name: p for name, p in experts.named_parameters(recurse=False) if name != _NOT_STACKED}
