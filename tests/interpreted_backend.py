"""Emitted kernels reached through torch.compile, in Triton's interpreter; run by ``test_codegen_kernels.py``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moefx.codegen import backward, runtime
from moefx.routing import Experts, LinearRouter, activation, random_weights
from moefx.routing import RoutedFFN as BuildingBlock
from tests.inductor import linkable
from tests.routed_toy import RoutedFFN


def test_compiled_model_runs_the_emitted_kernels(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = RoutedFFN().eval()
    caplog.set_level(logging.INFO, logger="moefx.backend")
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options={"kernels": "triton"})
    launched: list[torch.Size] = []
    original = runtime.LoadedRegion.__call__

    def counted(self: runtime.LoadedRegion, tensors: list[torch.Tensor]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        launched.append(tensors[0].shape)
        return original(self, tensors)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.LoadedRegion, "__call__", counted)
        for batch in (2, 3):
            x = torch.randn(batch, 9, 24)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert launched == [(18, 24), (27, 24)]
    assert "replaced 1 of 1 routed regions" in caplog.text


def test_gated_routing_module_runs_the_emitted_kernels(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    weights = random_weights(24, 40, num_experts=4, gated=True)
    model = BuildingBlock(LinearRouter(24, 4), Experts(weights, activation("silu", gated=True)), top_k=2).eval()
    caplog.set_level(logging.INFO, logger="moefx.backend")
    compiled = torch.compile(model, backend="moefx", options={"kernels": "triton", "inner": "eager"})
    with torch.no_grad():
        x = torch.randn(2, 9, 24)
        torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    assert "replaced 1 of 1 routed regions" in caplog.text
    assert "gather_gated_linear_24x40" in caplog.text


def gradients(run: Callable[[torch.Tensor], torch.Tensor], model: torch.nn.Module, x: torch.Tensor) -> list[Any]:
    leaves = [x, *model.parameters()]
    return [run(x).detach(), *torch.autograd.grad(run(x).square().mean(), leaves)]


@pytest.mark.parametrize("inner", ["eager", "aot_eager", pytest.param("inductor", marks=linkable)])
def test_training_runs_the_emitted_kernels(inner: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = RoutedFFN()
    caplog.set_level(logging.INFO, logger="moefx.backend")
    options = {"kernels": "triton", "inner": inner}
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options=options)
    ran: list[int] = []
    original = backward.LoadedBackward.__call__

    def counted(self: backward.LoadedBackward, *given: Any) -> list[torch.Tensor]:
        ran.append(len(given[1]))
        return original(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward.LoadedBackward, "__call__", counted)
        for batch in (2, 3):
            x = torch.randn(batch, 9, 24, requires_grad=True)
            torch.testing.assert_close(gradients(compiled, model, x), gradients(model, model, x), atol=1e-5, rtol=1e-4)
    assert len(ran) == 2
    assert "replaced 1 of 1 routed regions by kernels, forward and backward" in caplog.text


def test_training_a_gated_module_with_frozen_experts() -> None:
    torch.manual_seed(0)
    weights = random_weights(24, 40, num_experts=4, gated=True)
    model = BuildingBlock(LinearRouter(24, 4), Experts(weights, activation("silu", gated=True)), top_k=2)
    for parameter in model.experts.parameters():
        parameter.requires_grad_(False)
    compiled = torch.compile(model, backend="moefx", options={"kernels": "triton", "inner": "aot_eager"})
    x = torch.randn(2, 9, 24, requires_grad=True)
    leaves = [x, *model.router.parameters()]
    got, want = (torch.autograd.grad(run(x).square().mean(), leaves) for run in (compiled, model))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


class Block(torch.nn.Module):
    """x + gate[b] * (routed(x) + shared(x)), as in a denoiser with a shared expert and adaLN."""

    def __init__(self) -> None:
        super().__init__()
        self.routed, self.shared = RoutedFFN(), torch.nn.Linear(24, 24)
        self.modulation = torch.nn.Linear(5, 24)
        self.scale = torch.nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        gate = self.modulation(t).unsqueeze(1)
        return x + gate * (self.routed(x) * self.scale + 0.5 * self.shared(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_follows_the_combine_is_computed_with_it(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = Block().to(dtype).eval()
    caplog.set_level(logging.INFO, logger="moefx.backend")
    options = {"kernels": "triton", "inner": "eager"}
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options=options)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    with torch.no_grad():
        for samples, tokens in ((2, 9), (3, 5)):
            x, t = torch.randn(samples, tokens, 24, dtype=dtype), torch.randn(samples, 5, dtype=dtype)
            torch.testing.assert_close(compiled(x, t), model(x, t), atol=limit, rtol=limit)
    assert "combine_add_24_top2" in caplog.text
    assert len(caplog.records) == 2, "one compilation"


class Tail(torch.nn.Module):
    """A shared expert, a layer scale, a gate per sample and the residual behind a routed FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.routed, self.shared = RoutedFFN(), torch.nn.Linear(24, 24)
        self.scale = torch.nn.Parameter(torch.randn(24))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return x + gate.unsqueeze(1) * (self.routed(x) * self.scale + 0.5 * self.shared(x))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_what_follows_a_combine_has_a_gradient(inner: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    caplog.set_level(logging.INFO, logger="moefx.backend")
    model = Tail()
    options = {"kernels": "triton", "inner": inner}
    compiled = torch.compile(model, backend="moefx", fullgraph=True, dynamic=True, options=options)
    for batch in (2, 3):
        given = [torch.randn(batch, 9, 24, requires_grad=True), torch.randn(batch, 24, requires_grad=True)]
        got, want = compiled(*given), model(*given)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
        seed, free = torch.randn_like(got), [*given, *model.parameters()]
        grads = (torch.autograd.grad(out, free, seed) for out in (got, want))
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)
    assert "combine_add_24_top2_float32" in caplog.text
