"""Slices of one dense network as experts: constants for those left out, scorers without training, and the way back.

Legend: B samples, T tokens, D width, F hidden width, E slices of m neurons, K slots per token, D_o output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import PlanError
from moefx.routing.experts import DenseFFN, Experts
from moefx.routing.initialise import shards
from moefx.routing.moe import RoutedFFN
from moefx.routing.precision import KeepFloat32, at_least_float32
from moefx.routing.scorers import MLPScorer, Scorer
from moefx.routing.selectors import Selector, Threshold, best_of
from moefx.routing.weights import FFNWeights


def cut(dense: FFNWeights, order: Tensor, shared: int, experts: int) -> tuple[FFNWeights | None, FFNWeights]:
    """Return the shared network (None for none) and the stacked slices; at weight 1 their sum is the dense network.

    Args:
        dense: dense weights of width F; ``b_out`` goes to the slices, where it is hoisted and so added once.
        order: neurons ``[F]``: those of the shared network, then slice by slice.
        shared: width of the shared network, in slices.
        experts: E; ``(shared + E) · m = F``.
    """
    arranged = dense.neurons(lambda tensor, axis: tensor.detach().index_select(axis, order.to(tensor.device)))
    split = dense.hidden * shared // (shared + experts)
    first = arranged.neurons(lambda tensor, axis: tensor.narrow(axis, 0, split).clone()) if split else None
    rest = arranged.neurons(lambda tensor, axis: tensor.narrow(axis, split, tensor.shape[axis] - split))
    if first is not None:
        first = replace(first, b_out=None)
    # Its own bias: what stands in for slices left out is added to it.
    own = None if dense.b_out is None else dense.b_out.detach().clone()
    return first, replace(shards(rest, experts), b_out=own)


class OffsetExperts(KeepFloat32):
    """Experts each with a constant: ``y_t = experts(x_t) + Σ_j gates[t, j] · offset[experts[t, j]]``.

    With offset −μ_e and the sum of all μ_e in the hoisted bias, a slice that is left out is replaced by its mean output
    μ_e, at no cost worth naming.

    Args:
        experts: E stacked slices.
        offset: ``[E, D_o]``.
    """

    def __init__(self, experts: Experts, offset: Tensor) -> None:
        super().__init__()
        self.experts, self.num_experts = experts, experts.num_experts
        self.offset = nn.Parameter(offset.detach().to(torch.float32))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return ``[T, D_o]``; an index of E or more contributes nothing."""
        y: Tensor = self.experts(x_TD, experts_TK, gates_TK)
        gates_TK = gates_TK.to(at_least_float32(y))
        index = experts_TK.clamp(max=self.num_experts)
        mass = gates_TK.new_zeros(len(index), self.num_experts + 1).scatter_add(1, index, gates_TK)
        constant = mass[:, : self.num_experts] @ self.offset.to(mass.dtype)
        return (y.to(mass.dtype) + constant).to(y.dtype)


def merge(layer: RoutedFFN) -> FFNWeights:
    """Return the dense network of a split one with all its slices at weight 1, neurons in their old order: exact.

    Raises:
        PlanError: the layer was not made of slices.
    """
    order = layer._buffers.get("neurons")
    experts = layer.experts.experts if isinstance(layer.experts, OffsetExperts) else layer.experts
    if order is None or not isinstance(experts, Experts):
        raise PlanError("merge slices", found="a layer that was not split", do="pass one that the split pass made")
    parts = [layer.shared.weights()] if isinstance(layer.shared, DenseFFN) else []
    stacked = experts.weights()
    flat = stacked.neurons(lambda t, axis: torch.cat(list(t.detach().unbind(0)), dim=axis))
    parts.append(FFNWeights(**{k: v for k, v in vars(flat).items() if k != "b_out"}))
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))

    def joined(name: str, axis: int) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat([f.detach() for f in found], axis).index_select(axis, place)

    b_out = stacked.b_out
    if isinstance(layer.experts, OffsetExperts):
        constant = layer.experts.offset.detach().sum(0)
        b_out = constant if b_out is None else (b_out.detach() + constant.to(b_out.dtype))
    names = {"w_in": -2, "w_gate": -2, "b_in": -1, "b_gate": -1, "w_out": -1}
    return FFNWeights(b_out=b_out, **{name: joined(name, axis) for name, axis in names.items()})  # type: ignore[arg-type]


class NeuronScorer(Scorer):
    """``s_e = |act(g_e·x + c_e) · (u_e·x + d_e)|``: the slice's own most typical neuron, no training (CMoE).

    Args:
        act: ``act(up)`` or ``act(up, gate)``.
        weights: dense weights of E neurons, one per slice.
        normalise: scale the rows to length one, as CMoE does; biases then by the same factor.
    """

    w_up: Tensor
    b_up: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None

    def __init__(self, act: Callable[..., Any], weights: FFNWeights, *, normalise: bool = True) -> None:
        super().__init__()
        self.act, self.num_experts = act, weights.hidden
        for name, row, bias in (("up", weights.w_in, weights.b_in), ("gate", weights.w_gate, weights.b_gate)):
            scale = row.float().norm(dim=1).clamp_min(1e-12) if normalise and row is not None else None
            self._keep(f"w_{name}", row, None if scale is None else scale.unsqueeze(1))
            self._keep(f"b_{name}", bias, scale)

    def _keep(self, name: str, value: Tensor | None, scale: Tensor | None) -> None:
        if value is not None:
            value = value.detach().float() if scale is None else value.detach().float() / scale
        setattr(self, name, None if value is None else nn.Parameter(value))

    def forward(self, r: Tensor) -> Tensor:
        """Return ``[..., E]``."""
        up = self._linear(r, self.w_up, self.b_up)
        h: Tensor = self.act(up) if self.w_gate is None else self.act(up, self._linear(r, self.w_gate, self.b_gate))
        return h.abs()


class AbsoluteMLPScorer(MLPScorer):
    """``s = |MLP(r)|``: predicted norms are not negative (D2DMoE, arXiv 2310.04361)."""

    def forward(self, r: Tensor) -> Tensor:
        """Return ``[..., E]``."""
        return super().forward(r).abs()


class UnitMLPScorer(MLPScorer):
    """``s = MLP(r / ‖r‖)``, as MoEfication's router reads its tokens."""

    def forward(self, r: Tensor) -> Tensor:
        """Return ``[..., E]``."""
        return super().forward(F.normalize(r.to(at_least_float32(r)), dim=-1))


def timestep_row(table: Tensor, timestep: Tensor | None, steps: float, ndim: int) -> Tensor:
    """Return ``table[⌊t · n / steps⌋]`` as ``[B, 1, ..., W]``, or the only row ``[W]``."""
    if timestep is None or len(table) == 1:
        return table[0]
    t = timestep.reshape(-1).to(at_least_float32(timestep))
    index = (t * (len(table) / steps)).floor().clamp(0, len(table) - 1).long()
    return table[index].view(-1, *[1] * (ndim - 2), table.shape[1])


class RelativeThreshold(Selector):
    """Every slice with ``s_e ≥ (1 − τ(t)) · max_e s_e`` (D2DMoE's dynamic k); s is taken as at least 0.

    τ = 1 runs them all. Scores are compared as predicted norms.

    Args:
        tau: ``[n]``, τ per interval of timesteps; n = 1 for one τ.
        steps: timesteps are in [0, steps).
        width: most slices per token; None for all.
    """

    partial = True
    tau: Tensor

    def __init__(self, tau: Tensor, *, steps: float = 1000.0, width: int | None = None) -> None:
        super().__init__()
        self.steps, self.width = steps, width
        self.taps = ("timestep",) if len(tau) > 1 else ()
        self.register_buffer("tau", tau.detach().to(torch.float32))

    def slots(self, num_experts: int) -> int:
        """Return the most slices a token can get."""
        return min(self.width or num_experts, num_experts)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., K]``, best first, then empty slots."""
        scores = scores.clamp_min(0)
        tau = timestep_row(self.tau.unsqueeze(1), taps[0] if taps else None, self.steps, x.ndim).to(scores.dtype)
        return best_of(scores, scores >= (1 - tau) * scores.amax(-1, keepdim=True), self.slots(scores.shape[-1]))


class TimestepThreshold(Threshold):
    """Every slice with ``s_e > cut_e(t)``; a cut per interval of timesteps.

    Args:
        cut: ``[n, E]``.
        steps: timesteps are in [0, steps).
        width: most slices per token; None for all.
    """

    def __init__(self, cut: Tensor, *, steps: float = 1000.0, width: int | None = None) -> None:
        super().__init__(cut.shape[1], width=width)
        self.steps = steps
        self.taps = ("timestep",) if len(cut) > 1 else ()
        self.cut = cut.detach().to(torch.float32)

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Return ``[..., K]``, best first, then empty slots."""
        cut = timestep_row(self.cut, taps[0] if taps else None, self.steps, x.ndim).to(scores.dtype)
        return best_of(scores, scores > cut, self.slots(scores.shape[-1]))


def mean_row_weights(w_in_EmD: Tensor) -> Tensor:
    """Return the mean of the normalised rows of every slice ``[E, D]``: the start of MoEfication's router."""
    return F.normalize(w_in_EmD.detach().float(), dim=-1).mean(1)
