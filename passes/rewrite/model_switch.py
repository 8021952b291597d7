"""Whole models as experts: a copy of the model serves the timesteps below a boundary (Wan 2.2)."""

from __future__ import annotations

import copy
import inspect
from typing import ClassVar

from pydantic import Field
from torch import nn

from moefx.errors import InputError
from moefx.passes.rewrite.base import Contract, ModelPass, Options, register_pass
from moefx.routing.switch import ModelSwitch


class ModelSwitchOptions(Options):
    """Options of :class:`SwitchModels`."""

    boundary: float = Field(0.875, ge=0, le=1, description="share of timesteps from which on the model itself serves")
    timesteps: float = Field(1000.0, gt=0, description="raw timesteps are in [0, this); 1 if they are sigma")
    argument: str = Field("timestep", description="name of the argument that is the timestep")


@register_pass
class SwitchModels(ModelPass):
    """Let a copy of the model serve low noise."""

    name = "model-switch"
    summary = "model -> itself for high noise, and a copy of itself for low noise; exact at the start"
    child: ClassVar[str] = "model_switch"
    provides = frozenset({"model-switch"})
    preserves = frozenset({"ffn-sites", "attention-sites", "block-sites"})
    Options = ModelSwitchOptions
    options: ModelSwitchOptions

    def contract(self) -> Contract:
        """Exact: both are the dense model."""
        return Contract("exact", 0.0, "both models are the dense one")

    def around(self, module: nn.Module) -> nn.Module:
        """Return the switch with a copy of ``module``."""
        o = self.options
        known = list(inspect.signature(module.forward).parameters)
        if o.argument not in known:
            raise InputError(
                f"switch copies of {type(module).__name__} by {o.argument!r}",
                found=f"its forward takes {', '.join(known)}",
                do="name the timestep with argument=",
            )
        return ModelSwitch(copy.deepcopy(module), o.boundary * o.timesteps, argument=o.argument).train(module.training)
