"""Statistics of one feed-forward network, and a uniform sample of what enters it.

Legend: N tokens, D width, F hidden width, D_o output width, S sampled tokens, G groups: branches, modalities, buckets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moefx.errors import InputError
from moefx.passes.calibration.moments import Moments
from moefx.routing.weights import FFNWeights

MOMENTS = ("hidden", "magnitude", "usage", "up", "taylor", "output")


@dataclass
class Sample:
    """A uniform sample without replacement: the S tokens of largest random ``key``, so that two samples merge.

    ``x [S, D]`` is what enters the network and its router, ``group [S]`` where the token came from, ``key [S]`` the
    draw.
    """

    x: Tensor
    group: Tensor
    key: Tensor

    @staticmethod
    def empty(dim: int) -> Sample:
        """Return a sample of nothing."""
        return Sample(torch.zeros(0, dim), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.float64))

    def merged(self, other: Sample, size: int) -> Sample:
        """Return a uniform sample of both parts' tokens, at most ``size``."""
        key = torch.cat([self.key, other.key])
        kept = key.sort(descending=True, stable=True).indices[:size]
        return Sample(torch.cat([self.x, other.x])[kept], torch.cat([self.group, other.group])[kept], key[kept])


@dataclass
class LayerStatistics:
    """What one network did on the calibration data.

    Every statistic is kept per group, so that a pass can take the mean or the maximum over noise levels and branches.
    What is not a sum over tokens (quantiles, co-activation, outputs of experts) comes from the sample: memory stays
    S · D and never F². Second moments of ``usage``, ``magnitude`` and ``taylor`` are those of their values per token.

    Attributes:
        name: of the site.
        role: the stream it belongs to: main, context, refiner, side.
        sizes: (D, F, D_o).
        gated: whether there is a gate besides the up projection.
        size: S, the most tokens kept.
        modalities: the kinds of tokens that are told apart: the role, or ``("main", "text")`` in a joint sequence.
        hidden: moments of h.
        magnitude: of |h|.
        usage: of 1[h is among the token's ``active`` largest |h|].
        up: of the up projection of a gated network (the factor that the activated gate multiplies), else of h.
        taylor: of |∂L/∂h · h|; count 0 without a loss.
        output: of the network's output, without its bias.
        sample: tokens.
    """

    name: str
    role: str
    sizes: tuple[int, int, int]
    gated: bool
    groups: int
    size: int
    active: int = 10
    moments: dict[str, Moments] = field(default_factory=dict)
    sample: Sample = field(default_factory=lambda: Sample.empty(0))
    modalities: tuple[str, ...] = ("main",)

    def __post_init__(self) -> None:
        dim, hidden, out = self.sizes
        if not self.moments:
            widths = {name: out if name == "output" else hidden for name in MOMENTS}
            self.moments = {name: Moments.empty(self.groups, width) for name, width in widths.items()}
            self.sample = Sample.empty(dim)

    def __getattr__(self, name: str) -> Moments:
        if name in MOMENTS:
            return self.moments[name]
        raise AttributeError(name)

    @property
    def count(self) -> int:
        """Number of tokens seen."""
        return int(self.moments["hidden"].count.sum())

    def add(
        self,
        x_ND: Tensor,
        group_N: Tensor,
        weights: FFNWeights,
        act: Callable[..., Any],
        draws: torch.Generator,
        gradient_NO: Tensor | None = None,
    ) -> None:
        """Add tokens.

        Args:
            x_ND: what enters the network.
            group_N: group of each token.
            weights: dense weights; the hidden layer is computed from them, in float32 at least.
            act: ``act(up)`` or ``act(up, gate)``.
            draws: CPU generator of the sample's keys.
            gradient_NO: ∂L/∂output, if there is a loss.
        """
        up, h = hidden(weights, act, x_ND)
        self._add("hidden", h, group_N)
        self._add("magnitude", h.abs(), group_N)
        self._add("usage", markers(h, self.active), group_N)
        self._add("up", up if self.gated else h, group_N)
        self._add("output", h @ weights.w_out.to(h.dtype).mT, group_N)
        if gradient_NO is not None:
            self._add("taylor", (gradient_NO.to(h.dtype) @ weights.w_out.to(h.dtype) * h).abs(), group_N)
        key = torch.rand(len(x_ND), generator=draws, dtype=torch.float64)
        # Before anything is copied: most tokens of a long run do not enter the sample.
        kept = key.sort(descending=True, stable=True).indices[: self.size]
        at = kept.to(x_ND.device)
        part = Sample(x_ND.detach()[at].float().cpu(), group_N[at].cpu(), key[kept])
        self.sample = self.sample.merged(part, self.size)

    def _add(self, name: str, values: Tensor, group_N: Tensor) -> None:
        self.moments[name] = self.moments[name].merged(Moments.of(values, group_N, self.groups))

    def merged(self, other: LayerStatistics) -> LayerStatistics:
        """Return the statistics of both parts together.

        Raises:
            InputError: they are of different networks.
        """
        mine, theirs = (
            (part.name, part.sizes, part.gated, part.groups, part.active, part.modalities) for part in (self, other)
        )
        if mine != theirs:
            raise InputError(f"merge statistics of {self.name}", found=f"{theirs}, not {mine}", do="merge like layers")
        return LayerStatistics(
            self.name,
            self.role,
            self.sizes,
            self.gated,
            self.groups,
            self.size,
            self.active,
            {name: self.moments[name].merged(other.moments[name]) for name in MOMENTS},
            self.sample.merged(other.sample, self.size),
            self.modalities,
        )


def hidden(weights: FFNWeights, act: Callable[..., Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the up projection and the hidden layer ``[..., F]`` of tokens, in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = weights.map(lambda tensor: tensor.detach().to(x.device, dtype))
    x = x.detach().to(dtype)
    up = F.linear(x, wide.w_in, wide.b_in)
    if wide.w_gate is None:
        return up, act(up)
    return up, act(up, F.linear(x, wide.w_gate, wide.b_gate))


def markers(h_NF: Tensor, active: int) -> Tensor:
    """Return 1 where a neuron is among the ``active`` of largest |h| of its token, else 0 (CMoE, arXiv 2502.04416)."""
    chosen = h_NF.abs().topk(min(active, h_NF.shape[-1]), dim=-1).indices
    return torch.zeros_like(h_NF).scatter_(-1, chosen, 1.0)
