"""What a router reads, and how what it reads becomes a score for each expert.

`Router` puts a vector together from the token and taps and hands it to a scorer; `LinearRouter` is the same for the
usual case, without building the concatenation. A scorer maps ``[..., D_r]`` to logits ``[..., N]`` and computes in
float32 (float64 stays). Scorers: `LinearScorer`, `MLPScorer`, `CosineScorer`, `NormScorer` (no parameters),
`RandomScorer`; `TableRouter` is a router by itself, since it reads timesteps only, and so is `NoRouter`, which reads
nothing; `moefx.routing.recurrent` has those with memory.

Legend: B samples, T tokens, S text tokens, D width, D_r width of what is read, N experts (or tied groups).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, OptionError, nearest
from moefx.routing.losses import mean_over_tokens
from moefx.routing.precision import KeepFloat32, at_least_float32, without_autocast
from moefx.routing.router import sinusoidal

ACTS = {"gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "relu": F.relu}


class Scorer(KeepFloat32):
    """Base of the scorers: float32 parameters, and a linear map that computes in at least float32."""

    num_experts: int

    def _weight(self, *shape: int, std: float, generator: torch.Generator | None) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, generator=generator) * std if std else torch.zeros(shape))

    @staticmethod
    def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        dtype = at_least_float32(x, weight)
        return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


class LinearScorer(Scorer):
    """``l = W a(r) + b`` with an optional activation a before the map (SiLU in Switch-DiT)."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bias: bool = False,
        before: str | None = None,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.before = None if before is None else _act(before)
        self.weight = self._weight(num_experts, dim, std=std, generator=generator)
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def forward(self, r: Tensor) -> Tensor:
        """Return ``[..., N]``."""
        r = r.to(at_least_float32(r))
        return self._linear(r if self.before is None else self.before(r), self.weight, self.bias)


class MLPScorer(Scorer):
    """``l = W_b a(W_a r + b_a) + b_b`` (MoDE: GELU; MoE++: tanh)."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        hidden: int,
        act: str = "gelu",
        bias: bool = True,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.act = num_experts, _act(act)
        self.w_in = self._weight(hidden, dim, std=std, generator=generator)
        self.w_out = self._weight(num_experts, hidden, std=std, generator=generator)
        self.b_in = nn.Parameter(torch.zeros(hidden)) if bias else None
        self.b_out = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def forward(self, r: Tensor) -> Tensor:
        """Return ``[..., N]``."""
        return self._linear(self.act(self._linear(r, self.w_in, self.b_in)), self.w_out, self.b_out)


class CosineScorer(Scorer):
    """``l_i = cos(r, p_i) / τ`` with learnt prototypes p ``[N, D_r]`` (ProMoE, arXiv 2510.24711: τ = 1)."""

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        temperature: float = 1.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.temperature = num_experts, temperature
        # A cosine with the zero vector has no direction to learn from.
        self.prototypes = self._weight(num_experts, dim, std=std or 0.02, generator=generator)

    def forward(self, r: Tensor) -> Tensor:
        """Return ``[..., N]``."""
        dtype = at_least_float32(r, self.prototypes)
        logits = self._linear(F.normalize(r.to(dtype), dim=-1), F.normalize(self.prototypes.to(dtype), dim=-1))
        return logits / self.temperature


class NormScorer(Scorer):
    """``l_i = ‖r_i‖ / std(‖r‖)`` of N equal slices r_i of what is read: a statistic, no parameters."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        if dim % num_experts:
            raise OptionError(f"norms of {num_experts} slices", found=f"{dim} numbers", do="use a divisor")
        self.num_experts = num_experts

    def forward(self, r: Tensor) -> Tensor:
        """Return ``[..., N]``."""
        slices = r.to(at_least_float32(r)).reshape(*r.shape[:-1], self.num_experts, r.shape[-1] // self.num_experts)
        norms: Tensor = torch.linalg.vector_norm(slices, dim=-1)
        return norms / norms.std(-1, keepdim=True, unbiased=False).clamp_min(1e-6)


class RandomScorer(Scorer):
    """Standard normal scores drawn anew on each call from torch's generator (THOR's routing without a router)."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, r: Tensor) -> Tensor:
        """Return ``[..., N]``."""
        return torch.randn((*r.shape[:-1], self.num_experts), dtype=at_least_float32(r), device=r.device)


class Router(KeepFloat32):
    """``logits = scorer(r)``, r the concatenation of what is read, per token if any part of it is.

    Args:
        scorer: maps ``[..., D_r]`` to ``[..., N]``.
        reads: parts in order: ``token``, or names of taps. A tap is one vector per sample ``[B, D]``, a sequence
            ``[B, S, D]`` under the name ``text`` (its mean is read), one vector per token ``[B, T, D]``, or with a
            width in ``embed`` a raw timestep ``[B]`` or ``[]``.
        embed: width of the sinusoid that a raw timestep becomes, by tap.
        timestep_scale: factor on a raw timestep.
    """

    def __init__(
        self,
        scorer: nn.Module,
        reads: Sequence[str] = ("token",),
        *,
        embed: Mapping[str, int] | None = None,
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if not reads or len(set(reads)) < len(reads):
            raise OptionError(
                f"a router that reads {tuple(reads)}", found="nothing, or a part twice", do="name each once"
            )
        self.scorer, self.reads = scorer, tuple(reads)
        self.embed, self.timestep_scale = dict(embed or {}), timestep_scale
        self.num_experts = int(scorer.num_experts)  # type: ignore[arg-type]
        self.taps = tuple(name for name in self.reads if name != "token")
        self.stateful = bool(getattr(scorer, "stateful", False))

    def forward(self, x: Tensor, *taps: Tensor) -> Any:
        """Return logits ``[B, ..., N]``, ``[B, 1, ..., N]`` if no part is per token; with memory also the new state.

        Raises:
            InputError: a tap is missing or too many.
        """
        if not len(self.taps) <= len(taps) <= len(self.taps) + self.stateful:
            raise InputError(
                f"route with taps {self.taps}", found=f"{len(taps)} taps", do="pass each declared tap, in order"
            )
        with without_autocast(x):
            values = dict(zip(self.taps, taps, strict=False)) | {"token": x}
            r = join([self._part(name, values[name], x.ndim) for name in self.reads])
            state = taps[len(self.taps)] if len(taps) > len(self.taps) else None
            return self.scorer(r, state) if self.stateful else self.scorer(r)

    def _part(self, name: str, value: Tensor, ndim: int) -> Tensor:
        if name in self.embed:
            value = sinusoidal(value.reshape(-1), self.embed[name], scale=self.timestep_scale)
        if name == "text":
            value = mean_over_tokens(value.to(at_least_float32(value)), 1)
        while value.ndim < ndim:
            value = value.unsqueeze(-2)
        return value

    def extra_repr(self) -> str:
        """Describe the router in ``print(model)``."""
        return f"reads={self.reads}"


class TableRouter(KeepFloat32):
    """Free logits per timestep interval, ``table[⌊t·n/steps⌋]`` ``[n, N]``: routing that can be written down.

    Args:
        num_experts: N.
        entries: n intervals of equal length.
        steps: timesteps are in [0, steps).
        table: start ``[n, N]``; zeros by default.
    """

    taps = reads = ("timestep",)

    def __init__(self, num_experts: int, *, entries: int, steps: float = 1000.0, table: Tensor | None = None) -> None:
        super().__init__()
        self.num_experts, self.entries, self.steps = num_experts, entries, steps
        self.table = nn.Parameter(torch.zeros(entries, num_experts) if table is None else table.to(torch.float32))

    def index(self, timestep: Tensor) -> Tensor:
        """Return the interval of each raw timestep."""
        if timestep.ndim > 1:
            raise InputError(
                "look a timestep up in a table",
                found=f"a timestep of shape {tuple(timestep.shape)}",
                do="pass raw timesteps [B], not an embedding",
            )
        t = timestep.reshape(-1).to(at_least_float32(timestep))
        return (t * (self.entries / self.steps)).floor().clamp(0, self.entries - 1).long()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        """Return ``[B, 1, ..., N]``, or ``[1, ...]`` for one timestep of the whole batch."""
        logits = self.table[self.index(timestep)]
        return logits.view(logits.shape[0], *[1] * (x.ndim - 2), self.num_experts)

    def extra_repr(self) -> str:
        """Describe the router in ``print(model)``."""
        return f"entries={self.entries}, num_experts={self.num_experts}"


class NoRouter(KeepFloat32):
    """Logits of zero, one row per sample: for selectors by rule whose gates are 1, such as intervals of timesteps."""

    taps = reads = ()

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros ``[B, 1, ..., N]``."""
        shape = (x.shape[0], *[1] * (x.ndim - 2), self.num_experts)
        return torch.zeros(shape, dtype=at_least_float32(x), device=x.device)


def join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along the last axis in at least float32 after broadcasting the others; one part stays as it is."""
    if len(parts) == 1:
        return parts[0]
    lead = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))  # type: ignore[no-untyped-call]
    dtype = at_least_float32(*parts)
    return torch.cat([part.to(dtype).expand(*lead, -1) for part in parts], -1)


def _act(name: str) -> Any:
    if name not in ACTS:
        raise OptionError(f"activation {name!r} in a router", found="no such activation", do=nearest(name, ACTS))
    return ACTS[name]
