"""Specialising a switch between whole models: each timestep's model is known, so it is called without the switch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from moefx.errors import NothingMatched
from moefx.model.install import Change, changed_clone
from moefx.routing.switch import ModelSwitch, Side


def switch_of(model: nn.Module) -> tuple[str, ModelSwitch] | None:
    """Return the model's switch and its name, if it has one."""
    return next(((n, m) for n, m in model.named_children() if isinstance(m, ModelSwitch)), None)


def model_of(model: nn.Module, side: Side) -> nn.Module:
    """Return the expert of one side; the high-noise one shares every parameter with ``model``."""
    found = switch_of(model)
    assert found is not None
    name, switch = found
    if side == "low":
        return switch.low_noise_model
    # What the switch stands around is the forward that its own one wraps.
    forward = next(c.__dict__["forward"] for c in type(model).__mro__ if "forward" in c.__dict__).__wrapped__
    return changed_clone(model, Change("", {name: None}, forward))


def variants_by_side(
    model: nn.Module, times: Sequence[float], specialise: Callable[[nn.Module, Sequence[float]], Any]
) -> tuple[list[nn.Module], dict[float, int], dict[str, str]]:
    """Return the variants of all sides, which serves which timestep, and what stays routed in them and why.

    Args:
        model: a model with a `ModelSwitch`.
        times: timesteps.
        specialise: specialises one side's model for its timesteps.
    """
    found = switch_of(model)
    assert found is not None
    variants: list[nn.Module] = []
    variant_of: dict[float, int] = {}
    left: dict[str, str] = {}
    for side in ("high", "low"):
        mine = [t for t in times if found[1].side(t) == side]
        if not mine:
            continue
        expert = model_of(model, side)
        try:
            inner = specialise(expert, mine)
        except NothingMatched:
            variant_of |= dict.fromkeys(mine, len(variants))
            variants.append(expert)
            continue
        variant_of |= {t: i + len(variants) for t, i in inner.variant_of.items()}
        variants += list(inner.variants)
        left |= inner.left
    return variants, variant_of, left
