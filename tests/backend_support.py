"""A recipe on a tiny denoiser through ``torch.compile(backend="moefx")`` against eager, training and inference."""

from __future__ import annotations

import contextlib
import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

import moefx
from moefx import zoo
from tests import recipe_support as support
from tests.recipe_support import DIT, FLUX, SD3, UNET, WAN
from tests.trace_support import call, error, same_gradients, tensors

# One block of each kind: compiling a block takes seconds. Recipes of several blocks get the zoo's own depth.
SHALLOW: dict[str, dict[str, Any]] = {
    DIT: {"num_layers": 1},
    SD3: {"num_layers": 2},  # the last one drops its text
    FLUX: {"num_layers": 1, "num_single_layers": 1},
    UNET: {
        "block_out_channels": (16,),
        "down_block_types": ("CrossAttnDownBlock2D",),
        "up_block_types": ("CrossAttnUpBlock2D",),
        "mid_block_type": None,
    },
    WAN: {"num_layers": 1},
}
DEEP = {"gamma-mod", "mixture-of-blocks", "mixture-of-depths", "p-mod", "sparsedit", "tread", "moe++", "rmoe"}

# Small numbers of experts, so that every one gets tokens in a tiny model.
OPTIONS: dict[str, dict[str, Any]] = {
    "ant": {"experts": 2, "intervals": [2]},
    "cmoe": {"experts": 3, "shared": 1, "top_k": 1},
    "d2dmoe": {"experts": 4, "top_k": 2, "router_steps": 5, "router_hidden": 8},
    "deepseek-v3": {"experts": 8, "top_k": 3, "select_groups": 4, "keep_groups": 2},
    "dense2moe": {"experts": 3, "shared": 1, "top_k": 1, "scale": 3.0},
    "diffmoe": {"experts": 4, "every": 1},
    "dit-moe": {"experts": 4},
    "drop-upcycling": {"experts": 4},
    "dynamic-top-p": {"experts": 5, "every": 1},
    "ec-dit": {"experts": 4, "every": 1},
    "gamma-mod": {"router_std": 1.0, "dense_first": 0, "dense_last": 0},
    "lora-moe": {"rank": 3},
    "mixture-of-blocks": {"group": 2, "active": 1, "router_std": 1.0},
    "mixture-of-depths": {"capacity": 0.5, "router_std": 1.0, "every": 1},
    "moa": {"experts": 3},
    "moe++": {"experts": 7},
    "moefication": {"experts": 4, "top_k": 2, "router_steps": 5},
    "moefx-split": {"experts": 3, "shared": 1, "top_k": 1},
    "nucleus": {"experts": 8, "capacity": 3.0},
    "p-mod": {"router_std": 1.0},
    "ppap": {"rank": 3},
    "promoe": {"experts": 4, "every": 1},
    "raphael": {"space_experts": 0},
    "read-me": {"experts": 2},
    "sparse-upcycling": {"experts": 4},
    "timestep-lora": {"experts": 7, "intervals": [4, 2, 1], "rank": 3},
    "timestep-upcycling": {"experts": 4},
    "tread": {"start": 0.0, "end": 1.0},
    "virtual-groups": {},
}


@functools.cache
def _dense(name: str, deep: bool) -> nn.Module:
    return zoo.tiny(name, **({} if deep else SHALLOW[name]))


@functools.cache
def _calibration(name: str, deep: bool) -> moefx.Calibration:
    def loss(output: Any, _: Any) -> Tensor:
        return sum((leaf.square().mean() for leaf in tensors(output)), torch.zeros(()))

    given = [support.inputs(name, 2)]
    return moefx.calibrate(_dense(name, deep), given, loss=loss, buckets=2, samples=64, progress=False)


def realised(recipe: str, name: str) -> Any:
    """Return the tiny model with the recipe, its weights moved from where they start, so that no two experts agree."""
    deep = recipe in DEEP
    model = copy.deepcopy(_dense(name, deep))
    given = {"calibration": _calibration(name, deep)} if needs_calibration(recipe) else {}
    moefx.transform(model, support.inputs(name), recipe=recipe, verify=False, **given, **OPTIONS.get(recipe, {}))
    draws = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * 0.05)
    return model


def needs_calibration(recipe: str) -> bool:
    """Say whether a recipe reads what a calibration run saw."""
    return recipe in {"chess", "cmoe", "d2dmoe", "dense2moe", "lazy-neuron", "moefication", "moefx-split", "read-me"}


def step(run: Any, model: nn.Module, given: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the outputs, and the gradients of a weighted sum of them by name of the parameter.

    A compiled graph gives zeros, eager nothing, to a parameter that only auxiliary terms read: both are zeros here.
    """
    model.zero_grad(set_to_none=True)
    outputs = tensors(call(run, given, grad=True))
    draws = torch.Generator().manual_seed(5)
    sum((out * torch.randn(out.shape, generator=draws)).sum() for out in outputs).backward()  # type: ignore[union-attr]
    grads = {key: torch.zeros_like(p) if p.grad is None else p.grad for key, p in model.named_parameters()}
    assert sum(bool(grad.any()) for grad in grads.values()) > 10, "gradients reach the weights"
    return [out.detach() for out in outputs], grads


def check(recipe: str, name: str, *, training: bool, options: dict[str, str]) -> None:
    """One graph serves two batch sizes and gives eager's outputs; in training its gradients and buffers too."""
    model = realised(recipe, name).train(training)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options=options)
    eager = copy.deepcopy(model)
    with decided(model), decided(eager):
        _compare(compiled, model, eager, name, training)
    mine, theirs = dict(model.named_buffers()), dict(eager.named_buffers())
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(value, theirs[key], msg=key)


def _compare(compiled: Any, model: nn.Module, eager: nn.Module, name: str, training: bool) -> None:
    for batch in (5, 3):  # sizes that are no other size here: equal ones would share a symbol
        # Copies: other tests are given the same tensors, which must not be marked.
        given = {key: v.clone() if isinstance(v, Tensor) else v for key, v in support.inputs(name, batch).items()}
        for value in given.values():
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
                torch._dynamo.mark_dynamic(value, 0)
        with torch._dynamo.config.patch(error_on_recompile=batch == 3):
            if training:
                (found, grads), (wanted, wanted_grads) = step(compiled, model, given), step(eager, eager, given)
                same_gradients(grads, wanted_grads)
            else:
                found, wanted = tensors(call(compiled, given)), tensors(call(eager, given))
        assert error(found, wanted) < 1e-5


def decided(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which no call reads a timestep: a switch of whole models is told which one runs."""
    switch: Any = getattr(model, "model_switch", None)
    return contextlib.nullcontext() if switch is None else switch.fixed("low")
