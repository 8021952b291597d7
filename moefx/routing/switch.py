"""Whole models as experts: one for high noise, one for low noise, chosen by the timestep (Wan 2.2, diffusers).

Legend: B samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moefx.errors import InputError

Side = Literal["high", "low"]


class TimestepSwitch(nn.Module):
    """Run ``high_noise_model`` where ``timestep ≥ boundary``, else ``low_noise_model``; called like either of them.

    Wan 2.2 takes boundary 0.875·1000 for text to video and 0.9·1000 for image to video, in the units of the timestep
    that the model receives. **That timestep comes from the scheduler after its shift**: with another ``shift`` the same
    steps fall differently on the two models (of 30 uniform ones 4 are at or above 0.9 with shift 1, 18 with shift 12),
    so a boundary belongs to a shift, and one taken from a schedule before its shift is wrong.

    Which model runs is a fact that Python needs, so a call reads the timestep: free on the CPU, one wait for the device
    elsewhere, which `fixed` avoids. A sampler crosses the boundary once, so only one model need be on the device at a
    time. A batch with timesteps on both sides, as in training, is run by both models and each sample's result taken
    from its own: twice the work, and gradients only where they belong.

    Args:
        high_noise_model: expert for ``timestep ≥ boundary``.
        low_noise_model: the other one; it may share modules with the first.
        boundary: in the units of the timestep, such as 875.0.
        argument: name of the timestep's parameter.

    Raises:
        InputError: on a call without that argument.
    """

    def __init__(
        self, high_noise_model: nn.Module, low_noise_model: nn.Module, boundary: float, *, argument: str = "timestep"
    ) -> None:
        super().__init__()
        self.high_noise_model, self.low_noise_model = high_noise_model, low_noise_model
        self.boundary, self.argument = boundary, argument
        self._fixed: Side | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, or both, that the timesteps of this call ask for."""
        if self._fixed is not None:
            return self._model(self._fixed)(*args, **kwargs)
        timestep = self._timestep(args, kwargs)
        high = (torch.as_tensor(timestep) >= self.boundary).reshape(-1)
        sides = set(high.tolist())
        if len(sides) == 1:
            return self._model("high" if sides.pop() else "low")(*args, **kwargs)
        return self._both(high, args, kwargs)

    @contextmanager
    def fixed(self, side: Side) -> Iterator[TimestepSwitch]:
        """Run one model inside the block whatever the timestep, without looking at it."""
        before, self._fixed = self._fixed, side
        try:
            yield self
        finally:
            self._fixed = before

    def side(self, timestep: float) -> Side:
        """Return which model serves ``timestep``."""
        return "high" if timestep >= self.boundary else "low"

    def _model(self, side: Side) -> nn.Module:
        return self.high_noise_model if side == "high" else self.low_noise_model

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        bound = inspect.signature(self.high_noise_model.forward).bind(*args, **kwargs).arguments
        if self.argument not in bound:
            raise InputError(
                "switch models by timestep",
                found=f"arguments {', '.join(bound)}",
                do=f"pass {self.argument!r}, or name the argument that is the timestep",
            )
        return bound[self.argument]

    def _both(self, high: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run both models on the whole batch, and take each sample's result from its own."""

        def choose(one: Any, two: Any) -> Any:
            if not isinstance(one, Tensor) or one.ndim == 0 or one.shape[0] != high.shape[0]:
                return one
            return torch.where(high.reshape(-1, *[1] * (one.ndim - 1)).to(one.device), one, two)

        return pytree.tree_map(choose, self.high_noise_model(*args, **kwargs), self.low_noise_model(*args, **kwargs))

    def extra_repr(self) -> str:
        """Describe the switch in ``print(model)``."""
        return f"boundary={self.boundary}, argument={self.argument!r}"
