"""What every recipe must do on real denoisers: run, learn, compile without recompiling, and survive a save.

    @pytest.mark.parametrize("name", MODELS)
    def test_on_models(name, tmp_path):
        model = realised("dit-moe", name, experts=4)
        check_runs(model, name)
        check_learns(model, name)

Each check is separate, so that a test asks for what its recipe promises. Routed layers are compiled alone, with the
very inputs they get in the model: whole denoisers take a minute each.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moefx
from moefx import zoo
from moefx.graph.inputs import synthesise
from moefx.routing.record import RoutingRecord
from tests.trace_support import QUIET, call, error, tensors

DIT, SD3, FLUX = "DiTTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
UNET, WAN = "UNet2DConditionModel", "WanTransformer3DModel"
MODELS = (DIT, SD3, FLUX, UNET, WAN)
MARKS = [pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")]


@functools.cache
def _dense(name: str) -> nn.Module:
    return zoo.tiny(name)


def dense(name: str) -> nn.Module:
    """Return a fresh copy of the tiny dense model."""
    return copy.deepcopy(_dense(name))


@functools.cache
def _inputs(name: str, batch: int) -> Any:
    return synthesise(_dense(name), batch=batch)


def inputs(name: str, batch: int = 2) -> Any:
    """Return example inputs; the timesteps differ from sample to sample where the model takes one per sample."""
    made = dict(_inputs(name, batch))
    t = made.get("timestep")
    if isinstance(t, Tensor) and t.shape == (batch,):
        # FLUX passes sigma; everything else here counts to 1000.
        spread = torch.linspace(0.05, 0.95, batch)
        made["timestep"] = (spread if name == FLUX else spread * 1000).to(t)
    return made


def realised(recipe: str, name: str, **options: Any) -> Any:
    """Return the tiny model ``name`` transformed with a recipe."""
    return moefx.transform(dense(name), recipe=recipe, inputs=_inputs(name, 2), **options)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the routed layers by name: the modules that own a record."""
    return {
        path.rpartition(".")[0]: model.get_submodule(path.rpartition(".")[0])
        for path, module in model.named_modules()
        if isinstance(module, RoutingRecord)
    }


def check_runs(model: Any, name: str, *, batches: tuple[int, ...] = (2, 3)) -> None:
    """Every planned site is there, and outputs are finite and shaped as the dense one's at other batch sizes."""
    assert len(layers(model)) == len(model.moefx.report.plan.sites) > 0
    for batch in batches:
        wanted, found = tensors(call(_dense(name), inputs(name, batch))), tensors(call(model, inputs(name, batch)))
        assert [t.shape for t in found] == [t.shape for t in wanted]
        assert all(bool(t.isfinite().all()) for t in found)


def check_equal(model: nn.Module, name: str, bound: float = 1e-5) -> None:
    """The model still computes what the dense one does, at a batch size other than the planned one."""
    assert error(call(model, inputs(name, 3)), call(_dense(name), inputs(name, 3))) <= bound


def check_learns(model: nn.Module, name: str, *, training: bool, routers: bool = True) -> None:
    """A task loss reaches routed experts, and with ``routers`` every router, in the given mode."""
    model.train(training).zero_grad(set_to_none=True)
    outputs = [t for t in tensors(call(model, inputs(name), grad=True)) if t.is_floating_point()]
    draws = torch.Generator().manual_seed(3)
    loss: Any = sum((t - torch.randn(t.shape, generator=draws).to(t)).square().mean() for t in outputs)
    loss = loss + moefx.aux_loss(model) * 0
    loss.backward()
    for path, layer in layers(model).items():
        moved = {key for key, p in layer.named_parameters() if p.grad is not None and bool((p.grad != 0).any())}
        assert any("router" not in key for key in moved), path
        if routers:
            assert any(key.startswith(("router", "inner.router")) for key in moved), path
    model.zero_grad(set_to_none=True)
    model.eval()


def check_agree(found: Tensor, wanted: Tensor, learnt: Iterable[Tensor], bound: float = 1e-10) -> None:
    """Two results over the same leaves are equal, and so are the gradients of a weighted sum of them."""
    assert found.shape == wanted.shape
    assert error(found, wanted) <= bound
    leaves = list(learnt)
    weight = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found).cos()
    ours, theirs = (torch.autograd.grad((y * weight).sum(), leaves) for y in (found, wanted))
    for one, two in zip(ours, theirs, strict=True):
        assert bool(two.any())
        assert error(one, two) <= bound


def captured(model: nn.Module, name: str, path: str, batch: int) -> tuple[Any, ...]:
    """Return the positional inputs that the layer at ``path`` gets in the model."""
    found: list[tuple[Any, ...]] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(tuple(a.clone() if isinstance(a, Tensor) else a for a in args))

    handle = model.get_submodule(path).register_forward_pre_hook(keep)
    try:
        call(model, inputs(name, batch))
    finally:
        handle.remove()
    return found[0]


def check_compiles(model: nn.Module, name: str) -> None:
    """One routed layer compiles as one graph that serves every batch size, and computes the same."""
    path, module = next(iter(layers(model).items()))
    torch._dynamo.reset()
    options = {"inner": "aot_eager"}
    compiled = torch.compile(module, fullgraph=True, backend="moefx", options=options, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3):
            args = captured(model, name, path, batch)
            with torch._dynamo.config.patch(error_on_recompile=batch > 2):
                assert error(compiled(*args), module(*args)) < 1e-5


def check_saves(model: nn.Module, name: str, folder: Path, bound: float = 0.0) -> None:
    """A saved model comes back with the same state and the same outputs (loaded weights may be aligned otherwise)."""
    moefx.save(model, folder / "model")
    again = moefx.load(folder / "model")
    mine, theirs = model.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert error(call(again, inputs(name)), call(model, inputs(name))) <= bound


def check_batch_invariant(model: nn.Module, name: str) -> None:
    """A sample alone gives what it gives next to others."""
    whole = inputs(name, 3)
    first = {k: v[:1] if isinstance(v, Tensor) and v.ndim and v.shape[0] == 3 else v for k, v in whole.items()}
    together, alone = call(model, whole), call(model, first)
    for a, b in zip(tensors(together), tensors(alone), strict=True):
        assert error(a[:1], b) < 1e-5
