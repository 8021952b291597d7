"""Whole models as experts: one for high noise, one for low noise, chosen by the timestep (Wan 2.2, diffusers).

Legend: B samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moefx.errors import InputError

Side = Literal["high", "low"]


class _Switch(nn.Module):
    """What both switches have in common: the boundary, and which of two callables runs."""

    def __init__(self, boundary: float, argument: str) -> None:
        super().__init__()
        self.boundary, self.argument = boundary, argument
        self._fixed: Side | None = None

    @contextmanager
    def fixed(self, side: Side) -> Iterator[Self]:
        """Run one model inside the block whatever the timestep, without looking at it."""
        before, self._fixed = self._fixed, side
        try:
            yield self
        finally:
            self._fixed = before

    def side(self, timestep: float) -> Side:
        """Return which model serves ``timestep``."""
        return "high" if timestep >= self.boundary else "low"

    def _run(
        self, high: Callable[..., Any], low: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run the model, or both, that the timesteps of this call ask for."""
        if self._fixed is not None:
            return (high if self._fixed == "high" else low)(*args, **kwargs)
        is_high = (torch.as_tensor(self._timestep(high, args, kwargs)) >= self.boundary).reshape(-1)
        sides = set(is_high.tolist())
        if len(sides) == 1:
            return (high if sides.pop() else low)(*args, **kwargs)

        def choose(one: Any, two: Any) -> Any:
            if not isinstance(one, Tensor) or one.ndim == 0 or one.shape[0] != is_high.shape[0]:
                return one
            return torch.where(is_high.reshape(-1, *[1] * (one.ndim - 1)).to(one.device), one, two)

        return pytree.tree_map(choose, high(*args, **kwargs), low(*args, **kwargs))

    def _timestep(self, model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        bound = inspect.signature(getattr(model, "forward", model)).bind(*args, **kwargs).arguments
        if self.argument not in bound:
            raise InputError(
                "switch models by timestep",
                found=f"arguments {', '.join(bound)}",
                do=f"pass {self.argument!r}, or name the argument that is the timestep",
            )
        return bound[self.argument]

    def extra_repr(self) -> str:
        """Describe the switch in ``print(model)``."""
        return f"boundary={self.boundary}, argument={self.argument!r}"


class TimestepSwitch(_Switch):
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
        super().__init__(boundary, argument)
        self.high_noise_model, self.low_noise_model = high_noise_model, low_noise_model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, or both, that the timesteps of this call ask for."""
        return self._run(self.high_noise_model, self.low_noise_model, args, kwargs)


class ModelSwitch(_Switch):
    """A `TimestepSwitch` that lives inside its own high-noise model, which so stays what pipelines know.

    Args:
        low_noise_model: the other expert.
        boundary: in the units of the timestep.
        argument: name of the timestep's parameter.
    """

    def __init__(self, low_noise_model: nn.Module, boundary: float, *, argument: str = "timestep") -> None:
        super().__init__(boundary, argument)
        self.low_noise_model = low_noise_model

    def forward(self, high: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run ``high``, the forward of the model around this one, or the low-noise model, or both."""
        return self._run(high, self.low_noise_model, args, kwargs)
