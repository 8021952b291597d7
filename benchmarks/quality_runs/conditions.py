"""What is compared: each table is a list of conditions, each a way to turn the trained dense model into another one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

import moefx
from benchmarks.quality_runs.settings import Setting
from examples.digits_demo.config import StageConfig
from examples.digits_demo.data import Digits
from examples.digits_demo.sparse import example_inputs
from examples.digits_demo.train import Penalty
from examples.dit import DiT
from moefx.training import DiffusionPrior


@dataclass(frozen=True)
class Start:
    """What a condition starts from: the trained dense model (its own copy), the data, and the seed."""

    dense: DiT
    data: Digits
    seed: int

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Example inputs of the model."""
        return example_inputs(self.data)

    def transformed(self, recipe: str, **options: Any) -> nn.Module:
        """Return a routed copy."""
        model: nn.Module = moefx.transform(
            copy.deepcopy(self.dense), self.inputs, recipe=recipe, seed=self.seed, **options
        )
        return model


Build = Callable[[Start], nn.Module]
Train = Callable[[nn.Module, Start, StageConfig], float]


@dataclass(frozen=True)
class Condition:
    """One row of a table.

    Args:
        name: what it is called in the table.
        build: makes the model from the dense one.
        steps: share of the setting's extra steps it is trained for; 0 judges it untrained.
        scratch: train from random weights for the dense steps instead.
        penalty: makes what is added to the loss from the model; None adds nothing.
        train: trains the model in place of the usual loop and returns the seconds it took.
    """

    name: str
    build: Build
    steps: float = 1.0
    scratch: bool = False
    penalty: Callable[[nn.Module], Penalty] | None = None
    train: Train | None = None

    def length(self, setting: Setting) -> int:
        """Return the steps that it is trained for."""
        return round(self.steps * (setting.dense if self.scratch else setting.extra).steps)


def auxiliary(model: nn.Module) -> Penalty:
    """Return the layers' own auxiliary losses."""
    return lambda model, _: moefx.aux_loss(model)


def diffusion_prior(model: nn.Module) -> Penalty:
    """Return Switch-DiT's prior loss; the model counts its timesteps from 0 to 1."""
    prior = DiffusionPrior(model, last_timestep=1.0)
    return lambda _, batch: prior(batch.t)


def dense(start: Start) -> nn.Module:
    """Return the dense model itself, copied."""
    return copy.deepcopy(start.dense)


def recipe(name: str, *more: tuple[str, dict[str, Any]], **options: Any) -> Build:
    """Return a builder that applies a recipe, and then others."""

    def build(start: Start) -> nn.Module:
        model = start.transformed(name, **options)
        for other, others in more:
            moefx.transform(model, start.inputs, recipe=other, seed=start.seed, **others)
        return model

    return build


# Experts of half the dense width, two per token: the active width of the dense network. And eight of its width.
_EQUAL: dict[str, Any] = {"experts": 16, "top_k": 2, "granularity": 2, "untie": True}
_WHOLE: dict[str, Any] = {"experts": 8, "top_k": 1}
_FURTHER = Condition("dense, trained further", dense)


def upcycle(setting: Setting) -> list[Condition]:
    """More parameters at equal active compute: what a router may read."""
    return [
        Condition("dense, not trained further", dense, steps=0),
        _FURTHER,
        Condition("copies, token router", recipe("virtual-groups", **_EQUAL), penalty=auxiliary),
        Condition(
            "copies, timestep and token router",
            recipe("virtual-groups", router_input="timestep+token", **_EQUAL),
            penalty=auxiliary,
        ),
        Condition(
            "copies, timestep router",
            recipe("virtual-groups", experts=16, top_k=2, granularity=2, router_input="timestep"),
            penalty=auxiliary,
        ),
        Condition("whole copies, token router", recipe("sparse-upcycling", **_WHOLE), penalty=auxiliary),
        Condition(
            "whole copies, timestep and token router",
            recipe("sparse-upcycling", router_input="timestep+token", **_WHOLE),
            penalty=auxiliary,
        ),
        Condition(
            "copies, experts choose tokens",
            recipe("sparse-upcycling", experts=8, selector="expert-choice", capacity=1.0),
        ),
    ]


def heads(setting: Setting) -> list[Condition]:
    """Fewer attention heads per token."""
    total = setting.model.heads
    active = sorted({round(share * total) for share in (0.9, 0.75, 0.5)} - {total}, reverse=True)
    gated = [
        Condition(
            f"{k} of {total} heads", recipe("mixture-of-heads", active_heads=k, router_std=0.02), penalty=auxiliary
        )
        for k in active
    ]
    return [_FURTHER, *gated]


def tokens(setting: Setting) -> list[Condition]:
    """Fewer tokens through every second block."""
    return [
        _FURTHER,
        *(
            Condition(
                f"{100 * share:.0f} % of the tokens in every 2nd block",
                recipe("mixture-of-depths", capacity=share, every=2, router_std=0.02),
            )
            for share in (0.7, 0.5)
        ),
    ]


def composed(setting: Setting) -> list[Condition]:
    """Two recipes in one model, against each alone."""
    active = setting.model.heads * 3 // 4
    gates = {"active_heads": active, "router_std": 0.02}
    return [
        _FURTHER,
        Condition("whole copies, token router", recipe("sparse-upcycling", **_WHOLE), penalty=auxiliary),
        Condition(f"{active} of {setting.model.heads} heads", recipe("mixture-of-heads", **gates), penalty=auxiliary),
        Condition(
            f"both: whole copies, {active} heads",
            recipe("sparse-upcycling", ("mixture-of-heads", gates), **_WHOLE),
            penalty=auxiliary,
        ),
    ]


def scratch(setting: Setting) -> list[Condition]:
    """Timesteps routed from random weights on, for as many steps as the dense model had."""

    # The model counts its timesteps from 0 to 1.
    return [
        Condition("dense, from scratch", dense, scratch=True),
        Condition("dtr", recipe("dtr", last_timestep=1.0), scratch=True),
        Condition("switch-dit", recipe("switch-dit", timesteps=1.0), scratch=True, penalty=diffusion_prior),
    ]


TABLES: dict[str, Callable[[Setting], list[Condition]]] = {
    "upcycle": upcycle,
    "heads": heads,
    "tokens": tokens,
    "composed": composed,
    "scratch": scratch,
}
