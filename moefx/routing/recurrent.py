"""Scorers with memory: what the routers of successive layers tell each other.

They take the state of the layer before (None in the first) and return ``(logits, state)``. The state passes through the
model as an ordinary tensor, so it restarts with every call of the model, that is, at every sampling step.

Legend: N experts, D_r width of what is read, R width of the recurrent state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError
from moefx.routing.precision import KeepFloat32, at_least_float32
from moefx.routing.scorers import Scorer


class ResidualScorer(Scorer):
    """``z = scorer(r) + W_g z_previous``: the gating residual of MoE++ (arXiv 2410.07348), W_g ``[N, N]``.

    The state is z itself. W_g starts at zero here, so that the first steps are those of a plain router.

    Args:
        scorer: maps what is read to logits.
        num_experts: N.
        residual: False in the first layer, which has no W_g and reads no state.
    """

    stateful = True

    def __init__(self, scorer: nn.Module, num_experts: int, *, residual: bool = True) -> None:
        super().__init__()
        self.scorer, self.num_experts = scorer, num_experts
        self.w_residual = nn.Parameter(torch.zeros(num_experts, num_experts)) if residual else None

    def forward(self, r: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits ``[..., N]`` and the same as the new state."""
        z: Tensor = self.scorer(r)
        if state is not None and self.w_residual is not None:
            z = z + self._linear(state, self.w_residual)
        return z, z


class GRUCell(KeepFloat32):
    """The cell that all layers share: ``s' = (1 − z) ⊙ n + z ⊙ s`` with torch's gate order (reset, update, new)."""

    def __init__(self, width: int, *, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.width = width
        bound = width**-0.5

        def draw(*shape: int) -> nn.Parameter:
            return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)

        self.w_input, self.w_state = draw(3 * width, width), draw(3 * width, width)
        self.b_input, self.b_state = draw(3 * width), draw(3 * width)

    def forward(self, v: Tensor, s: Tensor) -> Tensor:
        """Return the new state ``[..., R]``."""
        dtype = at_least_float32(v, self.w_input)
        from_v = F.linear(v.to(dtype), self.w_input.to(dtype), self.b_input.to(dtype)).chunk(3, -1)
        from_s = F.linear(s.to(dtype), self.w_state.to(dtype), self.b_state.to(dtype)).chunk(3, -1)
        reset, update = (from_v[0] + from_s[0]).sigmoid(), (from_v[1] + from_s[1]).sigmoid()
        new = (from_v[2] + reset * from_s[2]).tanh()
        return (1 - update) * new + update * s.to(dtype)


class GRUScorer(Scorer):
    """``s = GRU(W_1 r, s_previous)``, ``l = W_2 s`` (RMoE, arXiv 2408.06793); one cell for all layers.

    Args:
        dim: D_r.
        num_experts: N.
        cell: the cell, the same object in every layer.
        generator: source of W_1 and W_2.
    """

    stateful = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        cell: GRUCell,
        *,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.cell = num_experts, cell
        self.w_in = self._weight(cell.width, dim, std=dim**-0.5, generator=generator)
        self.w_out = self._weight(num_experts, cell.width, std=std, generator=generator)

    def forward(self, r: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return logits ``[..., N]`` and the new state ``[..., R]``."""
        v = self._linear(r, self.w_in)
        new: Tensor = self.cell(v, torch.zeros_like(v) if state is None else state)
        return self._linear(new, self.w_out), new


class FollowingRouter(nn.Module):
    """``z = z_previous``: a router without parameters that repeats the logits of the layer before.

    A selector that does not draw makes the same decision of them, so that one router decides for several layers.

    Args:
        num_experts: N.
        taps: names of what the deciding router reads besides the token; they are passed to every layer alike.
    """

    stateful = True
    reads: tuple[str, ...] = ()

    def __init__(self, num_experts: int, taps: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.num_experts, self.taps = num_experts, taps

    def forward(self, x: Tensor, *taps: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the state, which is the logits, twice.

        Raises:
            InputError: the layer is run without the one that decides.
        """
        state = taps[-1] if len(taps) > len(self.taps) else None
        if state is None:
            raise InputError(
                "route as the layer before",
                found="no state of a layer before",
                do="run the whole model, or route with state='none'",
            )
        return state, state
