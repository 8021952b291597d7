"""Whole routed denoisers through the backend's kernels, in Triton's interpreter; run by ``test_codegen_kernels.py``."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import Tensor

import moefx
from moefx import zoo
from moefx.graph.inputs import synthesise
from moefx.routing import RoutedFFN
from tests.trace_support import QUIET, call, tensors

pytest.importorskip("diffusers")
pytestmark = [
    *[pytest.mark.filterwarnings(line) for line in (*QUIET, "ignore::moefx.errors.MoefxWarning")],
    pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning"),
]

# One block of each kind: the interpreter takes a second for each routed region.
MODELS: dict[str, dict[str, int]] = {
    "DiTTransformer2DModel": {"num_layers": 1},
    "SD3Transformer2DModel": {"num_layers": 2},  # the last one drops its text
    "FluxTransformer2DModel": {"num_layers": 1, "num_single_layers": 1},
    "UNet2DConditionModel": {},
    "WanTransformer3DModel": {"num_layers": 1},
}


def results(run: torch.nn.Module, model: torch.nn.Module, inputs: object) -> tuple[list[Tensor], list[Tensor]]:
    """Return the outputs, and the gradients of every parameter that takes part."""
    outputs = list(tensors(call(run, inputs, grad=True)))
    loss = sum((out.float().square().mean() for out in outputs), torch.zeros(()))
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, materialize_grads=True)
    return [out.detach() for out in outputs], list(grads)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_equal_eager_without_graph_breaks(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = moefx.transform(zoo.tiny(name, **MODELS[name]), experts=3, top_k=2).eval()
    with torch.no_grad():  # experts and routers that differ, as after training
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    inputs = synthesise(model, batch=1)
    routed = sum(isinstance(module, RoutedFFN) for module in model.modules())
    caplog.set_level(logging.INFO, logger="moefx.backend")
    torch.compiler.reset()
    options = {"kernels": "triton", "inner": "eager"}
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options=options)
    got, want = results(compiled, model, inputs), results(model, model, inputs)
    torch.testing.assert_close(got[0], want[0], atol=2e-5, rtol=2e-4)
    scale = max(float(grad.abs().max()) for grad in want[1])
    for one, other in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(one, other, atol=2e-5 * max(1.0, scale), rtol=1e-3)
    replaced = re.findall(r"replaced (\d+) of (\d+) routed regions by kernels, forward and backward", caplog.text)
    assert replaced == [(str(routed), str(routed))]
    assert f"{routed} of {routed} routers, {routed} of {routed} groupings" in caplog.text
