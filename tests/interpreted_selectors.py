"""Layers of every selector by the backend's kernels, in Triton's interpreter; run by ``test_codegen_kernels.py``."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moefx.routing import Experts, LinearRouter, RoutedFFN, activation, random_weights
from moefx.routing.by_expert import PredictedChoice
from moefx.routing.selectors import (
    Forced,
    GroupLimitedTopK,
    GumbelSigmoid,
    Multinomial,
    NoisyTopK,
    Race,
    Selector,
    Threshold,
    TopK,
    TopP,
)
from moefx.routing.slices import RelativeThreshold

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

EXPERTS, WIDTH = 6, 16
#: A selector, a mode of normalisation, and whether the layer is in training.
CASES: dict[str, tuple[Callable[[], Selector], str, bool]] = {
    "groups": (lambda: GroupLimitedTopK(2, groups=3, keep=2), "sigmoid_topk_renorm", True),
    "multinomial": (lambda: Multinomial(2), "softmax_topk", True),
    "noisy": (lambda: NoisyTopK(2, noise=0.5), "softmax_topk_renorm", True),
    "top p": (lambda: TopP(0.6), "softmax_topk_renorm", True),
    "top p, narrow": (lambda: TopP(0.6, width=3), "softmax_topk", False),
    "threshold": (lambda: Threshold(EXPERTS, width=4), "sigmoid_topk", True),
    "race": (lambda: Race(EXPERTS), "identity", False),
    "gumbel": (lambda: GumbelSigmoid(width=3), "sigmoid_ste", True),
    "predicted": (lambda: PredictedChoice(WIDTH, EXPERTS), "softmax_topk", False),
    "share of the best": (lambda: RelativeThreshold(torch.tensor([0.6])), "softmax_topk", True),
    "forced": (lambda: Forced([0, 3], TopK(1)), "softmax_topk", True),
}


def results(layer: Callable[..., Tensor], model: RoutedFFN, x: Tensor) -> list[Tensor]:
    torch.manual_seed(3)  # of the noise
    out = layer(x)
    grads = torch.autograd.grad(out.square().sum(), [x, model.router.weight, *model.experts.parameters()])  # type: ignore[list-item]
    return [out.detach(), *grads]


@pytest.mark.parametrize("name", CASES)
def test_a_compiled_layer_equals_the_eager_one(name: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    make, mode, training = CASES[name]
    experts = Experts(random_weights(WIDTH, 8, num_experts=EXPERTS), activation("gelu"))
    model = RoutedFFN(LinearRouter(WIDTH, EXPERTS, std=0.5), experts, selector=make(), mode=mode).train(training)
    eager = copy.deepcopy(model)
    caplog.set_level(logging.INFO, logger="moefx.backend")
    options = {"kernels": "triton", "inner": "eager"}
    compiled = torch.compile(model, backend="moefx", fullgraph=True, options=options)
    x = torch.randn(2, 7, WIDTH, requires_grad=True)
    got, want = results(compiled, model, x), results(eager, eager, x)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
    lowered = "0 of 1 routers" if name == "forced" else "1 of 1 routers"
    assert lowered in caplog.text, caplog.text[-1500:]
