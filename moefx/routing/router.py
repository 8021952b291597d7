"""The linear router: what it reads, and how a raw timestep becomes something it can read.

Legend: B samples, T tokens, D token width, D_t tap width, E experts (or tied groups).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.precision import KeepFloat32, at_least_float32, without_autocast

MAX_PERIOD = 10_000.0


def sinusoidal(timestep: Tensor, dim: int, *, scale: float = 1.0) -> Tensor:
    """Return the sinusoidal embedding of raw timesteps: ``[cos(s·t·ω_i), sin(s·t·ω_i)]``, ω_i = 10000^(−i/(dim/2)).

    The layout of diffusers' ``Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)``, cosines first.

    Args:
        timestep: ``[...]``, any real dtype. Flow models that pass σ in [0, 1] need ``scale=1000``, as FLUX does inside.
        dim: width of the embedding, even.
        scale: s.

    Returns:
        ``[..., dim]``, float32.
    """
    if dim < 2 or dim % 2:
        raise OptionError(
            f"embed timesteps in {dim} numbers", found="an odd or too small width", do="use an even width"
        )
    index = torch.arange(dim // 2, dtype=torch.float32, device=timestep.device)
    frequencies = torch.exp(index * (-math.log(MAX_PERIOD) / (dim // 2)))
    angles = timestep.to(torch.float32).unsqueeze(-1) * scale * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class LinearRouter(KeepFloat32):
    """Logits ``l = W x + V c + b`` in float32, where x is the token and c an optional tap.

    ``W x + V c`` is the linear map of the concatenation ``[x ; c]`` without building it: c is one vector per sample.
    With V = 0 at the start a tap changes nothing until it is trained.

    Args:
        dim: D; 0 for a router that reads the tap only (one decision per sample).
        num_experts: E.
        tap_dim: D_t; 0 for no tap.
        tap: name under which the tap is declared in ``taps``.
        embed_timestep: the tap is a raw timestep ``[B]`` or ``[]``, int or float, embedded by `sinusoidal` in
            ``tap_dim`` numbers.
        timestep_scale: factor on a raw timestep before the embedding.
        bias: add b.
        std: standard deviation of W at the start; 0 for a zero router. V and b start at zero.
        keep_in_fp32: parameters stay float32 through ``.to(bfloat16)``. If False they follow the model; logits are
            float32 anyway.
        generator: source of W.
        device: as for any module; ``meta`` allocates nothing.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        tap_dim: int = 0,
        tap: str = "timestep",
        embed_timestep: bool = False,
        timestep_scale: float = 1.0,
        bias: bool = False,
        std: float = 0.02,
        keep_in_fp32: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if num_experts < 1 or dim < 0 or tap_dim < 0 or dim + tap_dim == 0:
            raise OptionError(
                f"a router from {dim} + {tap_dim} numbers to {num_experts} experts",
                found="nothing to read or nothing to choose",
                do="give dim or tap_dim, and at least one expert",
            )
        if embed_timestep and (tap_dim < 2 or tap_dim % 2):
            raise OptionError(
                "a router that embeds timesteps", found=f"tap_dim={tap_dim}", do="use an even tap_dim such as 256"
            )
        self.dim, self.num_experts, self.tap_dim = dim, num_experts, tap_dim
        self.taps: tuple[str, ...] = (tap,) if tap_dim else ()
        self.reads: tuple[str, ...] = (*(("token",) if dim else ()), *self.taps)
        self.embed_timestep, self.timestep_scale = embed_timestep, timestep_scale
        self.keep_in_fp32 = keep_in_fp32

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device))

        self.weight = zeros(num_experts, dim) if dim else None
        self.tap_weight = zeros(num_experts, tap_dim) if tap_dim else None
        self.bias = zeros(num_experts) if bias else None
        self.reset_parameters(std, generator)

    @torch.no_grad()
    def reset_parameters(self, std: float = 0.02, generator: torch.Generator | None = None) -> None:
        """Draw W from N(0, std²) and set V and b to zero."""
        for parameter in (self.weight, self.tap_weight, self.bias):
            if parameter is not None:
                parameter.zero_()
        if self.weight is not None and std > 0:
            draw = torch.randn(self.weight.shape, generator=generator, device=generator.device if generator else "cpu")
            self.weight.copy_(draw * std)

    def forward(self, x: Tensor, *taps: Tensor) -> Tensor:
        """Return the logits ``[B, ..., E]``, float32 (float64 for float64 input).

        Args:
            x: ``[B, ..., D]``; with dim = 0 it is not read.
            taps: none, or one: ``[B, D_t]`` or ``[D_t]`` for all tokens of a sample, ``[B, ..., D_t]`` per token; with
                ``embed_timestep`` without the last axis.

        Returns:
            ``[B, ..., E]``; ``[B, 1, ..., E]`` if only a per-sample tap is read.

        Raises:
            InputError: a tap is missing or too many, or widths differ.
        """
        if len(taps) != len(self.taps):
            raise InputError(
                f"route with taps {self.taps}", found=f"{len(taps)} taps", do="pass each declared tap, in order"
            )
        with without_autocast(x):
            logits = None if self.weight is None else self._linear(x, self.weight, "x")
            if self.tap_weight is not None:
                from_tap = self._linear(self._read(taps[0], x.ndim), self.tap_weight, self.taps[0])
                logits = from_tap if logits is None else logits + from_tap
            assert logits is not None  # dim + tap_dim > 0
            return logits if self.bias is None else logits + self.bias.to(logits.dtype)

    def _read(self, tap: Tensor, ndim: int) -> Tensor:
        """Return the tap as ``[B, 1, ..., D_t]``, so that it broadcasts over the tokens of its sample."""
        if self.embed_timestep:
            tap = sinusoidal(tap, self.tap_dim, scale=self.timestep_scale)
        if tap.ndim == 1:
            return tap
        missing = ndim - tap.ndim
        return tap.reshape(tap.shape[0], *([1] * missing), *tap.shape[1:]) if missing > 0 else tap

    def _linear(self, value: Tensor, weight: Tensor, name: str) -> Tensor:
        if value.shape[-1] != weight.shape[-1]:
            raise InputError(
                f"route on {name}",
                found=f"last axis {value.shape[-1]}, expected {weight.shape[-1]}",
                do="pass the tensor the router was built for",
            )
        dtype = at_least_float32(value, weight)
        return F.linear(value.to(dtype), weight.to(dtype))

    def extra_repr(self) -> str:
        """Describe the router in ``print(model)``."""
        return f"dim={self.dim}, num_experts={self.num_experts}, tap_dim={self.tap_dim}, taps={self.taps}"
