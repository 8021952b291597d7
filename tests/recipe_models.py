"""The smallest models that recipes apply to, and a recipe at its defaults on the first of them that takes it.

No list says which recipe goes with which model: a model without what a recipe needs refuses it, and the next is tried.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import moefx
from examples.dit import DiT
from examples.randomise import randomise_zeros
from moefx.errors import InputError, NothingMatched
from moefx.recipes import Recipe, build_passes
from moefx.routing.record import RoutingRecord
from tests import recipe_support as support
from tests.trace_support import tensors

Inputs = dict[str, Any]


def small_dit(depth: int = 2, side: int = 8) -> nn.Module:
    """A DiT of so many blocks and (side / 2)² tokens, with nothing at zero."""
    torch.manual_seed(0)
    return randomise_zeros(DiT(image_size=side, depth=depth, width=32, label_dropout=0.0)).eval()


def dit_inputs(batch: int, side: int = 8) -> Inputs:
    draws = torch.Generator().manual_seed(batch)
    x, y = torch.randn(batch, 1, side, side, generator=draws), torch.randint(0, 10, (batch,), generator=draws)
    return {"x": x, "t": torch.linspace(0.05, 0.95, batch) * 1000, "y": y}


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "DiT": (small_dit, dit_inputs),
    # Some leave outer blocks dense, and some need a larger grid.
    "deep DiT": (functools.partial(small_dit, side=16, depth=6), functools.partial(dit_inputs, side=16)),
    **{
        name: (functools.partial(support.dense, name), functools.partial(support.inputs, name))
        for name in (support.WAN, *support.MODELS)  # two blocks, text and video: the cheapest of them
    },
    "one token": (functools.partial(small_dit, side=2), functools.partial(dit_inputs, side=2)),
    "nine tokens": (functools.partial(small_dit, side=6, depth=6), functools.partial(dit_inputs, side=6)),
}

# For models too small for the defaults: fewer experts, fewer outer blocks that stay dense, a grid that is told.
SMALLER: dict[str, dict[str, Any]] = {
    "gamma-mod": {"dense_first": 0, "dense_last": 0},
    "mixture-of-blocks": {"group": 2, "active": 1},
    **{name: {"grid": [4, 6]} for name in ("clear", "vorta")},
    **{name: {"experts": 3, "shared": 1, "top_k": 1} for name in ("cmoe", "dense2moe", "moefx-split")},
    **{name: {"experts": 4, "top_k": 2} for name in ("moefication", "d2dmoe")},
}


@functools.cache
def calibrated(name: str) -> moefx.Calibration:
    build, inputs = MODELS[name]
    batches = [inputs(batch) for batch in (8, 9)]

    def loss(output: Any, _: Any) -> Tensor:
        return sum((t.square().mean() for t in tensors(output)), torch.zeros(()))

    return moefx.calibrate(build(), batches, loss=loss, buckets=8, samples=512, progress=False)


def apply(recipe: Recipe, name: str, **options: Any) -> nn.Module:
    """Return the model ``name`` with the recipe at its defaults, in evaluation mode."""
    build, inputs = MODELS[name]
    if any(rule.needs_calibration for rule in build_passes(recipe.passes, options)):
        options["calibration"] = calibrated(name)
    return moefx.transform(build(), inputs(2), recipe=recipe.name, verify=False, **options).eval()


def first_fit(recipe: Recipe) -> tuple[str, nn.Module]:
    """Return the first model that takes the recipe at its defaults, by name and rewritten."""
    refusals = []
    for name in MODELS:
        try:
            return name, apply(recipe, name)
        except (NothingMatched, InputError) as refusal:
            refusals.append(f"{name}: {refusal.found}")
    raise AssertionError(f"no model takes {recipe.name}: {'; '.join(refusals)}")


def stir(model: nn.Module) -> nn.Module:
    """Move every parameter, so that experts differ, routers decide and nothing is zero; return the model."""
    draws = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=draws)
            parameter.add_(noise.to(parameter) * (0.02 + 0.1 * float(parameter.std(correction=0))))
    return model


def routers(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return what may learn in each router: of a module with a record, its router, or what it holds itself."""
    found = {}
    for path, module in model.named_modules():
        if any(isinstance(child, RoutingRecord) for child in module.children()):
            inner = getattr(module, "router", None)
            found[path] = list(module.parameters(recurse=False) if inner is None else inner.parameters())
    return {path: parameters for path, parameters in found.items() if parameters}


def auxiliary(model: nn.Module) -> Tensor | float:
    """Return the auxiliary loss of what was just called; nothing where no layer has one."""
    return moefx.aux_loss(model) if any(isinstance(m, RoutingRecord) for m in model.modules()) else 0.0


def to_meta(inputs: Inputs) -> Inputs:
    return {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in inputs.items()}


def at_other_times(inputs: Inputs) -> Inputs:
    """Return the inputs at another step of a sampler."""
    times = {key: value * 0.5 for key, value in inputs.items() if key in ("t", "timestep")}
    return inputs | {key: value.to(inputs[key].dtype) for key, value in times.items()}


def alone(inputs: Inputs, batch: int) -> Inputs:
    """Return the first sample of the inputs."""
    return {k: v[:1] if isinstance(v, Tensor) and v.ndim and v.shape[0] == batch else v for k, v in inputs.items()}


def forget(model: nn.Module) -> nn.Module:
    """Return a copy without gradients."""
    model.zero_grad(set_to_none=True)
    return copy.deepcopy(model)
