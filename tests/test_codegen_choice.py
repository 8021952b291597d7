"""Experts that choose their tokens: what is read of a graph, what is refused, what compilers make of the kernels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx import ops
from moefx.codegen import Refusal, choice, lowerings, replace, store, target
from moefx.codegen.aot import Compiled, compile_all, job
from moefx.codegen.choice_lowering import ChoiceLowering
from moefx.codegen.kernels import ChoiceGradSpec, ChoiceLayoutSpec, ChoiceSumSpec
from moefx.graph import trace
from moefx.routing import Experts, activation, random_weights
from tests.codegen_support import DEVICES, needs_triton
from tests.router_support import Recorder, traced


class Layer(nn.Module):
    """Experts over chosen tokens, with a shared expert, a gate per sample and the residual."""

    def __init__(self, gated: bool = False, act: Any = None) -> None:
        super().__init__()
        weights = random_weights(24, 40, num_experts=4, gated=gated)
        self.experts = Experts(weights, act or activation("silu" if gated else "gelu", gated=gated))
        self.shared = nn.Linear(24, 24)

    def forward(self, x: Tensor, tokens: Tensor, weights: Tensor, gate: Tensor) -> Tensor:
        routed = self.experts.by_expert(x.reshape(-1, 24), tokens, weights).view(x.shape)
        return x + gate.unsqueeze(1) * (routed + self.shared(x))


def inputs() -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    tokens = torch.stack([torch.randperm(18)[:5] for _ in range(4)])
    return torch.randn(2, 9, 24), tokens, torch.rand(4, 5), torch.randn(2, 24)


def dynamo(model: nn.Module) -> Any:
    graphs: list[Any] = []
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm.forward, fullgraph=True)(*inputs())
    return graphs[0]


def exported(model: nn.Module) -> Any:
    return torch.export.export(model, inputs(), strict=False).graph_module


def moefx_trace(model: nn.Module) -> Any:
    return trace(model, inputs())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("capture", [dynamo, exported, moefx_trace])
def test_an_ffn_over_chosen_tokens_is_one_region(capture: Callable[[nn.Module], Any], gated: bool) -> None:
    (found,) = lowerings(capture(Layer(gated)))
    assert isinstance(found, ChoiceLowering), found
    up, down = found.region.linears
    assert (up.in_features, up.out_features, up.gather, up.top_k, up.weights) == (24, 40, True, 1, 1 + gated)
    assert (down.in_features, down.out_features, down.gather, down.epilogue.is_identity) == (40, 24, False, True)
    # In a trace for dumps, whoever asks for the dtype of the sum is one more reader of it.
    assert found.spec.total.operands == (() if capture is moefx_trace else ("column", "row", "sample", "row"))
    assert (found.rows, found.experts) == (20, 4)


def test_replacing_leaves_no_batched_product() -> None:
    graph = dynamo(Layer())
    assert replace(graph, lowerings(graph)) == 1
    names = {str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes}
    assert "choice.default" in names
    assert not names & {"bmm", "index_select", "cat", "gelu", "scatter.default"}
    assert not lowerings(graph)


def by_hand(x: Tensor, w_in: Tensor, w_out: Tensor, index: Tensor, other: Tensor, spoil: str) -> Tensor:
    rows = x.index_select(0, other if spoil == "index" else index).view(4, 5, 24)
    weight = w_in if spoil == "layout" else w_in.mT
    z = torch.bmm(rows, weight)
    h = z.softmax(-1) if spoil == "softmax" else F.relu(z)
    h = h + torch.ones(4, 5, 24) if spoil == "joined" else h
    h = h.view(4, 10, 12).flip(2).reshape(4, 5, 24) if spoil == "regrouped" else h
    h = h.view(4, 12, 10).reshape(4, 5, 24).sin().view(2, 10, 24).view(4, 5, 24) if spoil == "recut" else h
    y = torch.bmm(h, w_out.mT)
    out = ops.scatter(y.flatten(0, 1), index, torch.ones(20), 18 + (spoil == "size"))
    return out + z.sum() if spoil == "second reader" else out


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        ("", ""),
        ("index", "by another index"),
        ("layout", r"stored \[E, K, N\]"),
        ("softmax", "softmax|amax"),
        ("joined", "joins the rows"),
        ("regrouped", "flip|cuts the rows|shape"),
        ("recut", "cuts the rows anew"),
        ("size", "another number"),
        ("second reader", "outside of the region"),
    ],
)
def test_what_is_no_such_ffn_stays_with_its_reason(spoil: str, reason: str) -> None:
    import re

    x, index = torch.randn(18, 24), inputs()[1].flatten()
    w = torch.randn(4, 24, 24)
    graph = traced(lambda *given: by_hand(*given, spoil), x, w, w.clone(), index, index.clone())
    found = [item for item in lowerings(graph) if isinstance(item, Refusal | ChoiceLowering)]
    if not spoil:
        assert isinstance(found[0], ChoiceLowering), found
        return
    assert all(isinstance(item, Refusal) for item in found)
    assert re.search(reason, " ".join(item.reason for item in found if isinstance(item, Refusal))), found


def test_float64_is_refused() -> None:
    wide = Layer().double()
    given = torch.randn(18, 24).double(), inputs()[1], torch.rand(4, 5).double()
    graph = traced(lambda *tensors: wide.experts.by_expert(*tensors), *given)
    assert any("float64" in item.reason for item in lowerings(graph) if isinstance(item, Refusal))


def test_no_number_leaves_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run what surrounds the launches, without the launches: it allocates and reshapes, and reads nothing."""
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    launched: list[str] = []
    monkeypatch.setattr(
        store, "load", lambda source, stem: SimpleNamespace(launch=lambda *a: launched.append(stem.split("_")[0]))
    )
    layer = Layer()
    graph = dynamo(layer)
    (found,) = lowerings(graph)
    assert isinstance(found, ChoiceLowering)
    key = choice.register(found.spec)
    x, tokens, weights, gate = inputs()
    given = [x.view(18, 24), tokens.flatten(), *layer.experts.parameters()]
    b_out = given.pop()
    w_in, b_in, w_out = (p for p in given[2:])
    given = [given[0], given[1], w_in, b_in, w_out, weights.flatten(), b_out, x, gate, x]
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in given]
    with Recorder() as seen:
        out, *_ = torch.ops.moefx.choice_train(leaves, key)
        torch.autograd.grad(out.sum(), [t for t in leaves if t.requires_grad])
    choice.clear()
    assert launched[:4] == ["choice", "gather", "grouped", "choice"]
    assert {"weight", "input"} <= set(launched)
    assert not seen.waiting, seen.names


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_fit_their_target(device: str) -> None:
    (found,) = lowerings(dynamo(Layer()))
    assert isinstance(found, ChoiceLowering)
    chosen = target(device)
    total = dataclasses.replace(found.spec.total, features=1152, dtype="bfloat16", keep=True)
    specs = [
        ChoiceLayoutSpec(),
        total,
        ChoiceSumSpec(1152, "bfloat16", weighted=False),
        ChoiceGradSpec(1152, "bfloat16"),
    ]
    for made in compile_all([job(spec, spec.schedule(chosen, 1024, 128), chosen) for spec in specs]):
        assert isinstance(made, Compiled), made
        assert not made.problems(chosen)
