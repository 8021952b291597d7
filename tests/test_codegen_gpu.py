"""Emitted kernels on a device: numbers, determinism, and replay of a captured CUDA graph with other routing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from moefx.codegen import lowerings, runtime, tune
from moefx.codegen.lower import Lowering
from moefx.codegen.targets import target_of
from tests.routed_toy import RoutedFFN
from tests.test_codegen_tune import CLASSES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator")]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 1e-2}


def compiled_on_device(dtype: torch.dtype, width: int, hidden: int) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = RoutedFFN(width, hidden, experts=8).cuda().to(dtype).eval()
    return model, torch.compile(model, backend="moefx", fullgraph=True, options={"kernels": "triton"})


def relative_error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("width", "hidden"), [(128, 512), (1152, 4608), (72, 100)])
def test_compiled_model_equals_the_dialect(dtype: torch.dtype, width: int, hidden: int) -> None:
    model, compiled = compiled_on_device(dtype, width, hidden)
    with torch.no_grad():
        for tokens in (1, 77, 1024):
            x = torch.randn(2, tokens, width, device="cuda", dtype=dtype)
            got = compiled(x)
            assert torch.equal(got, compiled(x)), "the kernels are to be deterministic"
            assert relative_error(got - x, model(x) - x) < TOLERANCE[dtype]


def test_region_replays_in_a_cuda_graph_with_other_routing() -> None:
    torch.manual_seed(0)
    model = RoutedFFN(128, 256, experts=8).cuda().bfloat16().eval()
    region = next(item for item in lowerings(_dynamo_graph(model)) if isinstance(item, Lowering))
    key = runtime.register(region.region)
    static = torch.randn(64, 128, device="cuda", dtype=torch.bfloat16)

    def forward() -> Tensor:
        from moefx import ops

        gates, experts = model.router(static).float().softmax(-1).topk(2, -1)
        order, offsets = ops.group(experts, 8)
        weights = [model.w_in, model.b_in, model.w_out, model.b_out]
        return torch.ops.moefx.region([static, offsets, order, *weights, gates], key)

    with torch.no_grad():
        forward()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = forward()
        for _ in range(3):
            static.copy_(torch.randn_like(static))
            graph.replay()
            assert relative_error(out, model(static[None])[0] - static) < 3e-2


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_every_candidate_runs_or_is_pruned(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forms of projections, few rows included, gradients and heads: on the device each agrees with torch."""
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("MOEFX_AUTOTUNE_SECONDS", "120")
    tune.clear()
    device = torch.device("cuda", torch.cuda.current_device())
    shape = replace(CLASSES[name], target=target_of(device))
    chosen = tune.decide(shape, lambda: tune.DeviceTimer(shape, device))
    tune.clear()
    assert chosen in shape.candidates()
    entry = json.loads(shape.path.read_text())
    assert len(entry["seconds"]) + len(entry["pruned"]) == len(shape.candidates())
    wrong = [reason for reason in entry["pruned"].values() if "against torch" in reason]
    assert not wrong, wrong


def _dynamo_graph(model: nn.Module) -> torch.fx.GraphModule:
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: object) -> object:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(torch.randn(1, 64, 128, device="cuda", dtype=torch.bfloat16))
    return graphs[0]
