"""Routing of whole samples: exact on copies, equal to a plain loop, trainable, compilable."""

import copy

import pytest
import torch
from torch import Tensor, nn

from moefx import zoo
from moefx.api import transform
from moefx.errors import OptionError
from moefx.graph.inputs import synthesise
from moefx.routing.router import LinearRouter
from moefx.routing.samples import ModuleExperts, RoutedSamples


class Mixing(nn.Module):
    """A gated network with a depthwise convolution between its projections."""

    def __init__(self, width: int = 6, hidden: int = 8) -> None:
        super().__init__()
        self.up = nn.Conv2d(width, 2 * hidden, 1)
        self.depth = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.down = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.depth(torch.nn.functional.silu(self.up(x))).chunk(2, dim=1)
        return self.down(value * torch.nn.functional.silu(gate))


def routed(dense: nn.Module, *, experts: int = 3, top_k: int = 2, mode: str | None = None) -> RoutedSamples:
    router = LinearRouter(6, experts, std=1.0, generator=torch.Generator().manual_seed(1))
    return RoutedSamples(router, ModuleExperts(dense, experts), axis=1, top_k=top_k, mode=mode)


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 1), (3, 2), (4, 4)])
def test_copies_are_exact(experts: int, top_k: int) -> None:
    dense = Mixing().double()
    layer = routed(dense, experts=experts, top_k=top_k)
    x = torch.randn(5, 6, 4, 3, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x), rtol=1e-12, atol=1e-14)


def test_equals_a_loop_over_samples() -> None:
    layer = routed(Mixing().double())
    for parameter in layer.experts.parameters():
        parameter.data.normal_()
    x = torch.randn(4, 6, 5, 3, dtype=torch.float64)
    logits = x.mean((2, 3)) @ layer.router.weight.double().T
    wanted = []
    for b in range(4):
        best = logits[b].topk(2).indices
        gates = logits[b, best].softmax(-1)
        total = torch.zeros_like(x[b])
        for gate, e in zip(gates, best, strict=True):
            expert = Mixing().double()
            expert.load_state_dict({n: p[e] for n, p in layer.experts.stacked.named_parameters()})
            total = total + gate * expert(x[b : b + 1])[0]
        wanted.append(total)
    torch.testing.assert_close(layer(x), torch.stack(wanted), rtol=1e-12, atol=1e-12)


def test_a_sample_does_not_depend_on_its_batch() -> None:
    layer = routed(Mixing().double())
    x = torch.randn(4, 6, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[:1], layer(x[:1]), rtol=1e-12, atol=1e-14)


def test_gradients_reach_router_and_experts() -> None:
    layer = routed(Mixing(), experts=3, top_k=1, mode="ste")
    layer(torch.randn(6, 6, 4, 4)).square().sum().backward()
    assert layer.router.weight.grad is not None
    assert layer.router.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in layer.experts.parameters())


def test_compiles_without_a_graph_break() -> None:
    layer = routed(Mixing())
    x = torch.randn(3, 6, 4, 4)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))


def test_granularity_and_shared_experts_are_refused() -> None:
    with pytest.raises(OptionError, match="whole samples"):
        RoutedSamples(LinearRouter(6, 2), ModuleExperts(Mixing(), 4), axis=1, top_k=2, granularity=2)


def test_sana_is_upcycled_by_sample() -> None:
    model = zoo.tiny("SanaTransformer2DModel").eval()
    dense = copy.deepcopy(model)
    transform(model, experts=3, top_k=1)
    inputs = synthesise(dense, batch=3, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).sample, dense(**inputs).sample, rtol=1e-4, atol=1e-5)
    assert "transformer_blocks.0.ff.experts.stacked.conv_point.weight" in model.state_dict()
