"""Changing a graph: stamped nodes, refused regions, and a verifier that finds planted damage."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from moefx.errors import PlanError, VerifyError
from moefx.graph import Graph, origin_of, trace
from moefx.graph.splice import Splice, is_inplace, not_removable, unstamped
from moefx.graph.verify import check_shapes, verify_graph
from tests.trace_support import call, error


class Block(nn.Module):
    """A residual feed-forward network whose hidden layer a test may use otherwise."""

    def __init__(self, use: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.up, self.down, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        first = self.up(x)
        hidden = F.gelu(first)
        y: Tensor = self.down(hidden)
        return x + (y if self.use is None else self.use(first, hidden, y))


X = (torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0)),)


def graph_of(use: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None) -> Graph:
    torch.manual_seed(0)
    return trace(Block(use), X)


def node(graph: Graph, name: str) -> Node:
    return next(n for n in graph.fx.nodes if str(n.target) == name or getattr(n.target, "__name__", "") == name)


def region(graph: Graph) -> list[Node]:
    return [node(graph, "up"), node(graph, "gelu"), node(graph, "down")]


def test_a_replacement_computes_what_it_says() -> None:
    graph = graph_of()
    down = node(graph, "down")
    splice, (x,) = Splice(graph, "twice"), [n for n in graph.fx.nodes if n.op == "placeholder"]
    other = splice.call_module("other", (x,), around=down, val=down.meta["val"])
    total = splice.call_function(operator.mul, (other, 2), around=down)
    version = graph.version
    splice.replace(down, total, region(graph))
    assert graph.version > version
    model = graph.root
    assert error(call(graph, X), X[0] + 2 * model.other(X[0])) == 0
    assert {str(n.target) for n in graph.fx.nodes if n.op == "call_module"} == {"other"}
    verify_graph(graph, "a test")
    check_shapes(graph, "a test")


def test_new_nodes_are_stamped_and_have_shapes() -> None:
    graph = graph_of()
    down = node(graph, "down")
    splice = Splice(graph, "rule one")
    made = splice.call_function(torch.cat, ((down.args[0], down.args[0]), -1), around=down)
    assert made.meta["val"].shape == (2, 3, 32)
    assert origin_of(made).rules == ("rule one",)
    assert origin_of(made).source == origin_of(down).source
    again = Splice(graph, "rule two").call_function(F.relu, (made,), around=made)
    assert origin_of(again).rules == ("rule one", "rule two")
    assert unstamped(graph) == []


def test_facts_are_dropped_when_the_graph_changes() -> None:
    graph = graph_of()
    graph.facts["x"] = 1
    Splice(graph, "r").call_function(F.relu, (node(graph, "gelu"),), around=node(graph, "down"))
    assert graph.facts == {}


USES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "hidden used outside": lambda first, hidden, y: y + hidden.mean(),
    "first used outside": lambda first, hidden, y: y * first.sum(),
}


@pytest.mark.parametrize("name", USES)
def test_a_region_that_is_used_elsewhere_is_refused(name: str) -> None:
    graph = graph_of(USES[name])
    down = node(graph, "down")
    before = str(graph.fx)
    splice, (x,) = Splice(graph, "cut"), [n for n in graph.fx.nodes if n.op == "placeholder"]
    new = splice.call_module("other", (x,), around=down, val=down.meta["val"])
    with pytest.raises(PlanError, match="also used by") as caught:
        splice.replace(down, new, region(graph))
    assert "test_splice.py" in caught.value.found
    graph.fx.erase_node(new)
    assert str(graph.fx) == before


def test_sizes_of_intermediates_may_be_used_outside() -> None:
    graph = graph_of(lambda first, hidden, y: y.reshape(hidden.shape[0], -1, 8))
    assert not_removable({node(graph, "up"), node(graph, "gelu")}, node(graph, "down")) != ""
    sizes = {n for n in graph.fx.nodes if n.target == "size" and n.args[0] is node(graph, "gelu")}
    assert not_removable({node(graph, "up"), node(graph, "gelu"), *sizes}, node(graph, "down")) == ""


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        x.mul_(2)
        hidden = self.up(x)
        hidden.relu_()
        hidden[..., 0] = 1
        y: Tensor = self.down(hidden)
        return x + y


def test_in_place_operations_may_not_straddle_the_border() -> None:
    graph = trace(Writes(), X)
    inside = {n for n in graph.fx.nodes if n.target in ("up", "relu_", operator.setitem)}
    mul = next(n for n in graph.fx.nodes if n.target == "mul_")
    assert not_removable(inside, node(graph, "down")) == ""
    assert "in place across" in not_removable(inside | {mul}, node(graph, "down"))
    assert {n.name for n in graph.fx.nodes if is_inplace(n)} == {"mul_", "relu_", "setitem"}
    with pytest.raises(PlanError, match="in place across the region's border"):
        Splice(graph, "cut").replace(node(graph, "down"), mul, {*inside, mul, node(graph, "down")})
    assert error(call(graph, X), call(graph.root, X)) == 0


def test_outside_in_place_writes_into_the_region_are_refused() -> None:
    """A write that stays behind would otherwise be lost with the value it changes."""
    graph = trace(Writes(), X)
    inside = {node(graph, "up")}
    assert "is also used by" in not_removable(inside, node(graph, "down"))


# ---------------------------------------------------------------------------- planted damage


def drop_stamp(graph: Graph) -> None:
    del node(graph, "gelu").meta["moefx"]


def foreign_node(graph: Graph) -> None:
    with graph.fx.inserting_before(node(graph, "down")):
        graph.fx.call_function(F.relu, (node(graph, "gelu"),))


def missing_module(graph: Graph) -> None:
    node(graph, "down").target = "absent.layer"


def missing_parameter(graph: Graph) -> None:
    with graph.fx.inserting_before(node(graph, "down")):
        made = graph.fx.get_attr("absent")
    made.meta["moefx"] = origin_of(node(graph, "down"))


def wrong_order(graph: Graph) -> None:
    node(graph, "up").prepend(node(graph, "down"))


def erased_guard(graph: Graph) -> None:
    from moefx.graph import Guard

    graph.guards.append(Guard(trace(Block(), X).nodes[1], 3, "here.py:1"))


DAMAGE: dict[str, tuple[Callable[[Graph], None], str]] = {
    "stamp": (drop_stamp, "has no provenance"),
    "foreign": (foreign_node, "has no provenance"),
    "module": (missing_module, "'absent.layer' does not exist in the model"),
    "parameter": (missing_parameter, "'absent' does not exist in the model"),
    "order": (wrong_order, "used before it has been defined"),
    "guard": (erased_guard, "a guard watches an erased node: here.py:1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_verifier_finds(name: str) -> None:
    damage, message = DAMAGE[name]
    graph = graph_of()
    verify_graph(graph, "nothing")
    damage(graph)
    with pytest.raises(VerifyError) as caught:
        verify_graph(graph, "the pass under test")
    assert message in caught.value.found
    assert "after the pass under test" in caught.value.asked


def test_the_verifier_shows_the_lines_around() -> None:
    graph = graph_of()
    drop_stamp(graph)
    with pytest.raises(VerifyError) as caught:
        verify_graph(graph, "a pass")
    lines = caught.value.found.splitlines()
    assert sum(line.startswith("> gelu = ") for line in lines) == 1
    assert any("up = call_module" in line for line in lines)


@pytest.mark.parametrize("claim", [(2, 3, 17), (3, 2, 16)])
def test_wrong_shapes_are_found(claim: tuple[int, ...]) -> None:
    graph = graph_of()
    gelu = node(graph, "gelu")
    with gelu.meta["val"].fake_mode:
        gelu.meta["val"] = torch.empty(claim)
    with pytest.raises(VerifyError, match="is claimed as"):
        check_shapes(graph, "a pass")


def test_wrong_dtypes_are_found() -> None:
    graph = graph_of()
    gelu = node(graph, "gelu")
    with gelu.meta["val"].fake_mode:
        gelu.meta["val"] = torch.empty(2, 3, 16, dtype=torch.float64)
    with pytest.raises(VerifyError, match=r"torch\.float32 .* is claimed as torch\.float64"):
        check_shapes(graph, "a pass")


def test_values_and_execution_after_pruning() -> None:
    model: Any = Block(lambda first, hidden, y: y * (first.shape[1] * 0 + 1))
    graph = trace(model, X)
    names = {n.name for n in graph.fx.nodes}
    graph.prune()
    assert {n.name for n in graph.fx.nodes} == names
    wanted = [node(graph, "gelu"), node(graph, "down")]
    values = graph.values(wanted, *X)
    assert torch.equal(values[wanted[0]], F.gelu(model.up(X[0])))
    assert torch.equal(values[wanted[1]], model.down(F.gelu(model.up(X[0]))))
