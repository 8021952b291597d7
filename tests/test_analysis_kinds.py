"""One vocabulary for modules, functions, methods, operators and ATen calls."""

from __future__ import annotations

import operator
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx import zoo
from moefx.graph import Graph, trace
from moefx.graph.kinds import Op, op, param_ref, shape


class Spelled(nn.Module):
    """Runs one expression over ``x [2, 6, 8]``."""

    def __init__(self, expression: object) -> None:
        super().__init__()
        self.expression = expression
        self.linear, self.norm, self.act = nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU(approximate="tanh")
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.conv = nn.Conv1d(6, 6, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.expression(self, x)  # type: ignore[operator]


def last(expression: object, train: bool = False) -> tuple[Graph, Op]:
    model = Spelled(expression).train(train)
    graph = trace(model, (torch.randn(2, 6, 8),))
    return graph, op(graph.nodes[-1].all_input_nodes[0], graph)


def described(found: Op) -> tuple[object, ...]:
    index = tuple((i.start, i.stop, i.step) if isinstance(i, slice) else i for i in found.attrs.get("index", ()))
    params = {k: (p.fqn, p.rows, p.transposed) for k, p in found.params.items()}
    return found.kind, found.name if found.kind in ("act", "norm") else "", params, found.attrs.get("dims"), index


SAME: dict[str, list[object]] = {
    "linear": [
        lambda m, x: m.linear(x),
        lambda m, x: F.linear(x, m.linear.weight, m.linear.bias),
        lambda m, x: x @ m.linear.weight.T + m.linear.bias,
        lambda m, x: m.linear.bias + torch.matmul(x, m.linear.weight.transpose(0, 1)),
        lambda m, x: torch.einsum("btd,fd->btf", x, m.linear.weight) + m.linear.bias,
    ],
    "act": [lambda m, x: m.act(x), lambda m, x: F.gelu(x, approximate="tanh")],
    "norm": [lambda m, x: m.norm(x), lambda m, x: F.layer_norm(x, (8,), m.norm.weight, m.norm.bias)],
    "add": [lambda m, x: x + x, lambda m, x: torch.add(x, x), lambda m, x: x.add(x), lambda m, x: operator.add(x, x)],
    "slice": [
        lambda m, x: x.chunk(2, dim=-1)[1],
        lambda m, x: torch.split(x, 4, -1)[1],
        lambda m, x: x.split([4, 4], dim=2)[1],
        lambda m, x: torch.tensor_split(x, 2, dim=-1)[1],
    ],
    "permute": [
        lambda m, x: x.transpose(1, 2),
        lambda m, x: x.permute(0, 2, 1),
        lambda m, x: x.mT,
        lambda m, x: torch.swapaxes(x, -1, -2),
        lambda m, x: x.movedim(1, 2),
        lambda m, x: torch.einsum("btd->bdt", x),
    ],
    "identity": [
        lambda m, x: x.contiguous(),
        lambda m, x: x.to(torch.float64),
        lambda m, x: x.double(),
        lambda m, x: m.drop(x),
        lambda m, x: F.dropout(x, 0.0),
        lambda m, x: x.clone(),
    ],
}


@pytest.mark.parametrize("kind", SAME)
def test_spellings_of_one_operation_are_one_kind(kind: str) -> None:
    found = [last(e)[1] for e in SAME[kind]]
    assert {f.kind for f in found} == {kind}
    if kind in ("act", "slice", "permute"):
        assert len({repr(described(f)) for f in found}) == 1


@pytest.mark.parametrize("kind", SAME)
def test_aten_spellings_are_the_same_kind(kind: str) -> None:
    for expression in SAME[kind]:
        model, x = Spelled(expression).eval(), torch.randn(2, 6, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = Graph.from_export(torch.export.export(model, (x,), strict=False), model)
        found = op(graph.nodes[-1].all_input_nodes[0], graph)
        assert found.kind in (kind, "input")


def test_an_active_dropout_is_not_the_identity() -> None:
    assert last(lambda m, x: m.drop(x), train=True)[1].kind == "dropout"
    assert last(lambda m, x: F.dropout(x, 0.1, training=True))[1].attrs["p"] == 0.1


def test_pointwise_and_depthwise_convolutions_are_told_apart() -> None:
    assert last(lambda m, x: m.conv(x))[1].attrs["pointwise"]
    depth = last(lambda m, x: F.conv1d(x, m.weight[:6, None, :3], padding=1, groups=6))[1]
    assert depth.kind == "conv"


def test_sizes_are_not_data() -> None:
    graph, found = last(lambda m, x: x.new_zeros(x.shape[0], x.size(1) * 2) + x.shape[1])
    kinds = Counter(op(n, graph).kind for n in graph.nodes)
    assert kinds["size"] >= 3
    assert found.inputs[0].name.startswith("new_zeros")


def test_in_place_operations_are_marked() -> None:
    def twice(m: Spelled, x: Tensor) -> Tensor:
        x = x.clone()
        x *= 2.0
        return x.add_(1.0)

    graph, found = last(twice)
    assert found.in_place
    assert sum(op(n, graph).in_place for n in graph.nodes) == 2


def test_parameters_are_seen_through_casts_transposes_and_rows() -> None:
    graph, _ = last(lambda m, x: x @ m.weight[2:5].to(torch.float64).float().t())
    found = [param_ref(n, graph) for n in graph.nodes]
    assert any(p is not None and p.rows == (2, 5) and p.transposed for p in found)


def test_a_users_function_named_linear_is_not_a_linear() -> None:
    @torch.library.custom_op("moefx_test::linear", mutates_args=())
    def linear(x: Tensor) -> Tensor:
        return x.clone()

    @linear.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    assert last(lambda m, x: torch.ops.moefx_test.linear(x))[1].kind == "other"


def test_kinds_follow_edits_of_the_graph() -> None:
    graph, found = last(lambda m, x: F.relu(x))
    node = graph.nodes[-1].all_input_nodes[0]
    node.target = F.silu
    assert found.name == "relu"
    assert op(node, graph).name == "silu"


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "UNet2DConditionModel", "Lumina2Transformer2DModel"])
def test_nothing_of_a_real_model_is_unknown(name: str) -> None:
    graph = trace(zoo.tiny(name))
    assert {op(n, graph).name for n in graph.nodes if op(n, graph).kind in ("other", "module")} == set()
    assert all(shape(n) is not None for n in graph.nodes if op(n, graph).kind in ("linear", "add", "sdpa"))
