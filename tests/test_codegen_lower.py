"""Finding regions by data flow, in the spellings of several tracers, and replacing them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.shape_prop import ShapeProp

from moefx import ops
from moefx.codegen import Lowering, Refusal, describe, replace
from moefx.codegen import lowerings as everything
from moefx.codegen.calls import site_of
from moefx.graph import trace
from moefx.routing import Experts, activation, random_weights
from tests.routed_toy import RoutedFFN


def lowerings(graph: fx.GraphModule) -> list[Lowering | Refusal]:
    """Return the regions of products, and what is none."""
    found = everything(graph)
    return [
        item for item in found if isinstance(item, Lowering | Refusal) and getattr(item, "kind", "region") == "region"
    ]


class _Fake(ShapeProp):
    """Record example values the way dynamo does."""

    def run_node(self, n: fx.Node) -> object:
        result = fx.Interpreter.run_node(self, n)
        n.meta["example_value"] = result
        return result


def traced(function: Callable[..., Tensor], *inputs: Tensor) -> fx.GraphModule:
    graph = make_fx(function)(*inputs)
    _Fake(graph).propagate(*inputs)
    return graph


def dynamo(model: nn.Module, x: Tensor) -> fx.GraphModule:
    """Return the graph that a torch.compile backend receives."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=keep, fullgraph=True)(x)
    return graphs[0]


def exported(model: nn.Module, x: Tensor) -> fx.GraphModule:
    return torch.export.export(model, (x,), strict=False).graph_module


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch.compiler.reset()


def moefx_trace(model: nn.Module, x: Tensor) -> object:
    return trace(model, (x,))


@pytest.mark.parametrize("capture", [dynamo, exported, moefx_trace])
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU(approximate="tanh"), lambda z: F.relu(z).square()])
def test_routed_ffn_is_one_region(capture: Callable[..., fx.GraphModule], act: Callable[[Tensor], Tensor]) -> None:
    (found,) = lowerings(capture(RoutedFFN(act=act), torch.randn(2, 9, 24)))
    assert isinstance(found, Lowering)
    up, down = found.region.linears
    assert (up.in_features, up.out_features, up.gather, up.top_k, up.bias) == (24, 40, True, 2, True)
    assert (down.in_features, down.out_features, down.gather, down.epilogue.is_identity) == (40, 24, False, True)
    assert found.region.combine is not None
    assert not found.notes
    z = torch.randn(3, 40, dtype=torch.float64)
    torch.testing.assert_close(up.epilogue.evaluate(z), act(z))


def test_gated_ffn_is_one_region() -> None:
    model = RoutedFFN(act=lambda z: F.silu(z.chunk(2, -1)[0]) * z.chunk(2, -1)[1], gated=True)
    (found,) = lowerings(dynamo(model, torch.randn(2, 9, 24)))
    assert isinstance(found, Lowering)
    assert (found.region.linears[0].halves, found.region.linears[0].out_features) == (2, 40)
    assert len(found.region.linears) == 2


@pytest.mark.parametrize("act", ["silu", "gelu"])
def test_ffn_with_two_input_weights_is_one_region(act: str) -> None:
    torch.manual_seed(0)
    weights = random_weights(24, 40, num_experts=4, gated=True)
    experts = Experts(weights, activation(act, gated=True))

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = experts

        def forward(self, x: Tensor) -> Tensor:
            gates, chosen = x[:, :4].softmax(-1).topk(2)
            return self.experts(x, chosen, gates)

    (found,) = lowerings(dynamo(Layer(), torch.randn(18, 24)))
    assert isinstance(found, Lowering)
    assert (found.region.linears[0].weights, found.region.linears[0].out_features) == (2, 40)
    assert found.region.combine is not None
    assert not found.notes


def test_keyword_spelling_of_the_facade_is_read() -> None:
    model = RoutedFFN()
    graph = fx.symbolic_trace(model)
    with torch.no_grad():
        _Fake(graph).propagate(torch.randn(2, 9, 24))
    (found,) = lowerings(graph)
    assert isinstance(found, Lowering)
    assert len(found.region.kernels) == 3


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (lambda z: z.softmax(-1), "softmax|amax"),
        (lambda z: F.layer_norm(z, (40,)), "var|norm|mean"),
        (lambda z: F.gelu(z) + torch.ones(40), "joins it with|reads the tensor|ones"),
    ],
)
def test_what_cannot_be_fused_ends_the_region_with_a_reason(act: Callable[[Tensor], Tensor], reason: str) -> None:
    import re

    first, second = lowerings(dynamo(RoutedFFN(act=act), torch.randn(2, 9, 24)))
    assert isinstance(first, Lowering)
    assert isinstance(second, Lowering)
    assert len(first.region.linears) == 1
    assert first.region.combine is None
    assert re.search(reason, first.notes[0]), first.notes
    assert second.region.combine is not None, "what follows is a region of its own"


def test_a_pre_activation_used_twice_is_not_fused_away() -> None:
    class Leaky(RoutedFFN):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, x.shape[-1])
            gates, experts = self.router(tokens).float().softmax(-1).topk(self.slots, -1)
            order, offsets = ops.group(experts, self.experts)
            z = ops.grouped_linear(tokens, self.w_in, self.b_in, order, offsets, self.slots)
            rows = ops.grouped_linear(F.gelu(z), self.w_out, self.b_out, None, offsets, 1)
            return ops.combine(rows, order, gates).view(x.shape) + z.sum()

    first, _ = lowerings(dynamo(Leaky(), torch.randn(2, 9, 24)))
    assert isinstance(first, Lowering)
    assert len(first.region.linears) == 1
    assert first.notes


def test_float64_is_refused() -> None:
    found = lowerings(dynamo(RoutedFFN().double(), torch.randn(2, 9, 24, dtype=torch.float64)))
    assert all(isinstance(item, Refusal) for item in found)
    assert "float64" in describe(found)


def test_replacing_keeps_the_rest_of_the_graph() -> None:
    graph = dynamo(RoutedFFN(), torch.randn(2, 9, 24))
    found = lowerings(graph)
    assert replace(graph, found) == 1
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.moefx.region.default) == 1
    assert torch.ops.moefx.grouped_linear.default not in targets
    assert torch.ops.moefx.combine.default not in targets
    assert not lowerings(graph)


def test_description_is_stable_and_names_the_kernels() -> None:
    model, x = RoutedFFN(), torch.randn(2, 9, 24)
    first = describe(lowerings(dynamo(model, x)))
    torch.compiler.reset()
    assert first == describe(lowerings(dynamo(model, x)))
    assert "gather_grouped_linear_24x40_float32" in first
    assert "combine_add_24_top2_float32" in first


class Block(nn.Module):
    """The residual, an adaLN gate and a shared expert behind a routed FFN."""

    def __init__(self, spoil: str = "") -> None:
        super().__init__()
        self.routed, self.shared, self.spoil = RoutedFFN(), nn.Linear(24, 24), spoil
        self.scale = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        routed = self.routed(x)
        shared = self.shared(x)
        if self.spoil == "norm":
            routed = F.layer_norm(routed, (24,))
        result = x + gate.unsqueeze(1) * (routed * self.scale + 0.5 * shared)
        return result + routed.sum() if self.spoil == "second reader" else result


def tail_kinds(block: Block) -> tuple[str, ...]:
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(block, backend=keep, fullgraph=True, dynamic=True)(torch.randn(2, 9, 24), torch.randn(2, 24))
    (found,) = lowerings(graphs[0])
    assert isinstance(found, Lowering)
    assert found.region.combine is not None
    return found.region.combine.operands


def test_what_follows_a_combine_is_found() -> None:
    assert tail_kinds(Block()) == ("row", "column", "row", "sample")


@pytest.mark.parametrize("spoil", ["norm", "second reader"])
def test_a_tail_ends_before_what_is_no_sum_and_where_others_read(spoil: str) -> None:
    assert tail_kinds(Block(spoil)) == ("row",)


def test_an_expression_that_is_not_zero_at_zero_stays_before_the_combine() -> None:
    """Dropped slots have zero rows; their sigmoid is a half."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 24, 24))

        def forward(self, x: Tensor) -> Tensor:
            gates, experts = x[:, :4].softmax(-1).topk(2)
            order, offsets = ops.group(experts, 4)
            return ops.combine(torch.sigmoid(ops.grouped_linear(x, self.w, None, order, offsets, 2)), order, gates)

    (found,) = lowerings(dynamo(Layer(), torch.randn(18, 24)))
    assert isinstance(found, Lowering)
    assert found.region.combine is None
    assert "not zero at zero" in found.notes[0]


def test_sites_are_named_as_in_the_model() -> None:
    node = fx.Graph().placeholder("x")
    node.meta["nn_module_stack"] = {"0": ("L['self'].__dict__['_modules']['blocks'].0", nn.Linear)}
    assert site_of(node) == "blocks.0"
