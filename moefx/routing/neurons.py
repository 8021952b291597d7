"""Single neurons as the unit of routing: the largest per token, those above a threshold, or a subset per sample.

The masks are computed on the full hidden layer, so in eager mode nothing is saved yet but by `NeuronSubsets`; which
neurons matter, and what leaving them out costs, is the same as for a kernel that skips them.

Legend: B samples, T tokens, D width, F hidden width, m neurons of a subset, E subsets, n intervals of timesteps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.experts import DenseFFN
from moefx.routing.losses import mean_over_tokens
from moefx.routing.normalise import normalise
from moefx.routing.precision import KeepFloat32, at_least_float32
from moefx.routing.record import RoutingRecord
from moefx.routing.select import top_k
from moefx.routing.slices import timestep_row
from moefx.routing.weights import FFNWeights


class TopNeurons(DenseFFN):
    """``y = W_out (h ⊙ 1[|h_i| is among the k largest]) + b_out`` per token (The Lazy Neuron, arXiv 2210.06313).

    Exact where at most k neurons are not zero, as in many ReLU networks, and for k = F. Ties go to the lowest neuron.

    Args:
        weights: dense weights.
        act: ``act(up)`` or ``act(up, gate)``.
        k: neurons per token.
    """

    def __init__(self, weights: FFNWeights, act: Callable[..., Any], k: int) -> None:
        super().__init__(weights, act)
        if not 1 <= k <= weights.hidden:
            raise OptionError(f"keep {k} neurons", found=f"{weights.hidden} of them", do="1 <= k <= width")
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D_o]``."""
        h = _hidden(self, x)
        chosen = top_k(h.detach().abs(), self.k)
        kept = torch.zeros_like(h).scatter(-1, chosen, 1.0)
        y: Tensor = F.linear(h * kept, self.w_out, self.b_out)
        return y


class ThresholdNeurons(DenseFFN):
    """``y = W_out (h ⊙ 1[|a_i| > t_i]) + b_out`` with a the activated gate, or h where there is none (CHESS).

    CHESS (arXiv 2409.01366): ``t_i = √(τ / E[up_i²])`` keeps the neurons whose loss would change h most on average.

    Args:
        weights: dense weights.
        act: ``act(up)`` or ``act(up, gate)``.
        threshold: ``[n, F]``, a row per interval of timesteps.
        gate: the function of the gate alone, for gated weights.
        steps: timesteps are in [0, steps).
    """

    threshold: Tensor

    def __init__(
        self,
        weights: FFNWeights,
        act: Callable[..., Any],
        threshold: Tensor,
        *,
        gate: Callable[[Tensor], Tensor] | None = None,
        steps: float = 1000.0,
    ) -> None:
        super().__init__(weights, act)
        if (gate is None) != (weights.w_gate is None):
            raise OptionError("threshold a gate", found="no function of the gate alone", do="pass gate= if it is gated")
        self.gate, self.steps = gate, steps
        self.taps = ("timestep",) if len(threshold) > 1 else ()
        self.register_buffer("threshold", threshold.detach().to(torch.float32))

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Map ``[B, ..., D]`` to ``[B, ..., D_o]``."""
        h = _hidden(self, x)
        a = h if self.gate is None or self.w_gate is None else self.gate(F.linear(x, self.w_gate, self.b_gate))
        cut = timestep_row(self.threshold, taps[0] if taps else None, self.steps, x.ndim)
        kept = a.detach().to(at_least_float32(a)).abs() > cut
        y: Tensor = F.linear(h * kept.to(h.dtype), self.w_out, self.b_out)
        return y


class NeuronSubsets(KeepFloat32):
    """``y = W_out[:, I_e] h_{I_e}(x) + b_out``, one subset e of the neurons for all tokens of a sample.

    Read-ME (arXiv 2410.19123) with noise levels as domains: subsets overlap, so they are index lists into one network,
    and a neuron that all of them hold is their shared expert. The router reads the mean token; e is its first choice
    and the gate has the value 1 with the gradient of its probability.

    Args:
        router: maps ``[B, 1, D]`` to logits ``[B, 1, E]``.
        ffn: the dense network, kept whole.
        subsets: ``[E, m]``, neurons of every subset.
    """

    subsets: Tensor

    def __init__(self, router: nn.Module, ffn: DenseFFN, subsets: Tensor) -> None:
        super().__init__()
        self.router, self.ffn = router, ffn
        self.register_buffer("subsets", subsets)
        self.record = RoutingRecord(len(subsets), device=subsets.device)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[B, ..., D]`` to ``[B, ..., D_o]``."""
        rows_BTD = x.flatten(1, -2) if x.ndim > 2 else x.unsqueeze(1)
        logits = self.router(mean_over_tokens(rows_BTD, 1).unsqueeze(1))
        logits = logits.to(at_least_float32(logits))
        chosen = top_k(logits.detach(), 1)
        self.record.update(logits.reshape(-1, len(self.subsets)), chosen.reshape(-1, 1), "ste")
        gates = normalise(logits, chosen, "ste")
        w = self.ffn
        index_Bm = self.subsets[chosen.flatten()]
        up = self._product(rows_BTD, w.w_in, w.b_in, index_Bm)
        h = w.act(up) if w.w_gate is None else w.act(up, self._product(rows_BTD, w.w_gate, w.b_gate, index_Bm))
        out_BmO = w.w_out.mT[index_Bm]
        y = torch.bmm(h, out_BmO) * gates.to(h.dtype)
        y = y if w.b_out is None else y + w.b_out
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def _product(x_BTD: Tensor, weight: Tensor, bias: Tensor | None, index_Bm: Tensor) -> Tensor:
        y = torch.bmm(x_BTD, weight[index_Bm].mT)
        return y if bias is None else y + bias[index_Bm].unsqueeze(1)

    def extra_repr(self) -> str:
        """Describe the layer in ``print(model)``."""
        return f"subsets={tuple(self.subsets.shape)}"


def _hidden(ffn: DenseFFN, x: Tensor) -> Tensor:
    up = F.linear(x, ffn.w_in, ffn.b_in)
    h: Tensor = ffn.act(up) if ffn.w_gate is None else ffn.act(up, F.linear(x, ffn.w_gate, ffn.b_gate))
    return h
