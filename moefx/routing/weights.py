"""The weights of a feed-forward network, dense or stacked over experts, as plain data.

Legend: E experts, D model width, F hidden width of the dense FFN, m of one expert, D_o output width (usually D).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from moefx.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FFNWeights:
    """``y = w_out · act(w_in x + b_in [, w_gate x + b_gate]) + b_out``.

    Dense: ``w_in``, ``w_gate`` [F, D]; ``b_in``, ``b_gate`` [F]; ``w_out`` [D_o, F]; ``b_out`` [D_o].
    Stacked: the same with a leading E, except ``b_out``: it is added once, after the experts, and so stays [D_o].
    Inside the experts it would be multiplied by their gates and counted K times.

    A neuron is row i of ``w_in``, ``w_gate``, ``b_in``, ``b_gate`` together with column i of ``w_out``. Fused
    projections are cut by whoever knows the order of the halves (diffusers: value first; FLUX.2 and LLaMA: gate first).

    Raises:
        InputError: shapes that do not belong together.
    """

    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None = None
    b_in: Tensor | None = None
    b_gate: Tensor | None = None
    b_out: Tensor | None = None

    def __post_init__(self) -> None:
        lead = self.w_in.shape[:-2]
        rows = (*lead, self.hidden)
        self._require("w_in", self.w_in.ndim in (2, 3))
        self._require("w_out", self.w_out.shape[:-2] == lead and self.w_out.shape[-1] == self.hidden)
        self._require("w_gate", self.w_gate is None or self.w_gate.shape == self.w_in.shape)
        self._require("b_in", self.b_in is None or self.b_in.shape == rows)
        self._require("b_gate", self.b_gate is None or (self.w_gate is not None and self.b_gate.shape == rows))
        self._require("b_out", self.b_out is None or self.b_out.shape == (self.out_dim,))

    def _require(self, name: str, holds: bool) -> None:
        if not holds:
            shapes = {f.name: tuple(v.shape) for f in fields(self) if (v := getattr(self, f.name)) is not None}
            raise InputError(f"FFN weights: {name} does not fit", found=str(shapes), do="see FFNWeights for the shapes")

    @property
    def num_experts(self) -> int | None:
        """E, or None for a dense FFN."""
        return self.w_in.shape[0] if self.w_in.ndim == 3 else None

    @property
    def hidden(self) -> int:
        """F of a dense FFN, m of one expert."""
        return self.w_in.shape[-2]

    @property
    def dim(self) -> int:
        """Input width D."""
        return self.w_in.shape[-1]

    @property
    def out_dim(self) -> int:
        """Output width D_o."""
        return self.w_out.shape[-2]

    def neurons(self, change: Callable[[Tensor, int], Tensor]) -> FFNWeights:
        """Return the weights with ``change(tensor, neuron_axis)`` applied to every tensor; ``b_out`` is kept."""

        def rows(tensor: Tensor | None, axis: int) -> Tensor | None:
            return None if tensor is None else change(tensor, axis)

        return replace(
            self,
            w_in=change(self.w_in, -2),
            w_gate=rows(self.w_gate, -2),
            b_in=rows(self.b_in, -1),
            b_gate=rows(self.b_gate, -1),
            w_out=change(self.w_out, -1),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> FFNWeights:
        """Return the weights with ``change`` applied to every tensor, for instance a cast."""
        return replace(self, **{f.name: change(v) for f in fields(self) if (v := getattr(self, f.name)) is not None})


def random_weights(
    dim: int,
    hidden: int,
    *,
    num_experts: int | None = None,
    out_dim: int | None = None,
    gated: bool = False,
    bias: bool = True,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> FFNWeights:
    """Return fresh weights, each uniform in ±1/√fan_in as in ``nn.Linear``; stacked if ``num_experts`` is given."""
    lead = () if num_experts is None else (num_experts,)

    def draw(*shape: int, fan_in: int) -> Tensor:
        bound = fan_in**-0.5
        return (torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1).mul(bound).to(dtype)

    return FFNWeights(
        w_in=draw(*lead, hidden, dim, fan_in=dim),
        w_gate=draw(*lead, hidden, dim, fan_in=dim) if gated else None,
        b_in=draw(*lead, hidden, fan_in=dim) if bias else None,
        b_gate=draw(*lead, hidden, fan_in=dim) if bias and gated else None,
        w_out=draw(*lead, out_dim or dim, hidden, fan_in=hidden),
        b_out=draw(out_dim or dim, fan_in=hidden) if bias else None,
    )
