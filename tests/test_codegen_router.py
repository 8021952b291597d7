"""Routers and grouping: what is read of a graph, what compilers make of the kernels, and that no host waits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moefx import ops
from moefx.codegen import Refusal, lowerings, replace, routing, store, target
from moefx.codegen.aot import MATRIX_INSTRUCTIONS, Compiled, Job, compile_all, job
from moefx.codegen.kernels.grouping import GroupingSpec
from moefx.codegen.kernels.router import RouterGradSpec
from moefx.codegen.router_lowering import RouterLowering
from moefx.codegen.spec import Kernel
from moefx.routing.select import top_k
from tests.codegen_support import needs_triton
from tests.router_support import Recorder, renormalised, standard_router, traced, within_groups


def router(function: Any, *inputs: Tensor) -> RouterLowering | Refusal:
    graph = traced(function, *inputs)
    found = [item for item in lowerings(graph) if getattr(item, "what", getattr(item, "kind", "")) == "router"]
    (only,) = found
    assert isinstance(only, RouterLowering | Refusal)
    return only


def test_steps_are_read_from_the_graph() -> None:
    spec = standard_router(8, torch.bfloat16)
    assert (spec.dtype, spec.weight_dtype, spec.width, spec.keep) == ("bfloat16", "float32", 1152, False)
    text = spec.program.text()
    assert "z1: column" in text
    assert "choose 8 by" in text
    assert text.count("row_sum") == 1, "the softmax over all, for the scores"
    assert text.count("chosen_sum") == 1, "the softmax over the chosen, for the gates"


def test_a_limit_to_groups_is_part_of_the_choice() -> None:
    spec = standard_router(64, torch.bfloat16, within_groups(8, 4, 2, 6))
    assert "within the best 4 of 8 groups by 2" in spec.program.text()
    assert spec.name != standard_router(64, torch.bfloat16, within_groups(8, 3, 2, 6)).name


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda logits: ops.group(top_k(logits, 2), 6), "no linear map"),
        (lambda logits: ops.group(top_k(F.linear(logits, torch.eye(6)).cumsum(-1), 2), 6), "cumsum"),
        (lambda logits: ops.group(F.linear(logits, torch.eye(6)).sort(-1).indices[:, :2], 6), "sorts upwards"),
    ],
)
def test_what_is_no_such_router_stays_with_its_reason(function: Any, reason: str) -> None:
    found = router(function, torch.randn(9, 6))
    assert isinstance(found, Refusal)
    assert reason in found.reason


def test_other_choices_are_not_spoken_of() -> None:
    graph = traced(lambda x: x.argmax(-1, keepdim=True), torch.randn(9, 6))
    assert lowerings(graph) == []


def kernels(experts: int) -> list[tuple[Kernel, Any]]:
    """Return a router, its gradient, and grouping, with what their ``launch`` takes."""
    spec = standard_router(experts, torch.bfloat16)
    limited = standard_router(experts, torch.bfloat16, within_groups(8, 4, 2, 8))
    odd = standard_router(60, torch.bfloat16, within_groups(10, 4, 2, 8))
    found: list[tuple[Kernel, Any]] = [(spec, None), (RouterGradSpec(spec.program, (0,)), None)]
    found += [(limited, None), (odd, None)]
    groups, flat = 1 << experts.bit_length(), ["i64", [4098]]
    counts, tiles = ["i32", [33, groups]], ["i32", [3, 39]]
    return [*found, (GroupingSpec(), (flat, counts, flat, ["i64", [experts + 1]], flat, tiles, 64))]


@needs_triton
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("device", "experts"), [("sm_80", 64), ("sm_90", 256), ("sm_100", 64), ("gfx942", 256)])
def test_kernels_fit_their_target(device: str, experts: int) -> None:
    chosen = target(device)
    jobs = []
    for spec, arguments in kernels(experts):
        made = job(spec, spec.schedule(chosen, 1024, 128), chosen)
        jobs.append(made if arguments is None else Job(spec.name, made.source, arguments, chosen))
    results = compile_all(jobs)
    for found in results:
        assert isinstance(found, Compiled), found
        assert not found.problems(chosen)
    assert isinstance(results[0], Compiled)
    wanted = MATRIX_INSTRUCTIONS[device] if device == "gfx942" else "HMMA"
    assert results[0].main.count(wanted) > 0, results[0].main.row()


def test_no_number_leaves_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Run what surrounds the launches, without the launches: it allocates and reshapes, and reads nothing."""
    monkeypatch.setenv("MOEFX_CACHE_DIR", str(tmp_path))
    launched: list[str] = []

    def load(source: str, stem: str) -> Any:
        return SimpleNamespace(launch=lambda *a: launched.append(stem), blocks_of=lambda rows: (1, rows))

    monkeypatch.setattr(store, "load", load)
    routing.clear()
    x, weight, bias = torch.randn(3, 5, 16), torch.randn(6, 16, requires_grad=True), torch.randn(6)
    graph = traced(renormalised, x, weight.detach(), bias)
    assert replace(graph, lowerings(graph), training=True) == 0, "no region of products"
    with Recorder() as seen:
        _, gates = graph(x, weight, bias)
        torch.autograd.grad(gates.sum(), weight)
        torch.ops.moefx.grouping(torch.zeros(15, 2, dtype=torch.int64), 6)
    routing.clear()
    assert len([name for name in launched if name.startswith("router_keeping")]) == 1
    assert len([name for name in launched if name.startswith("router_grad")]) == 1
    assert "grouping" in launched
    assert not seen.waiting, seen.names


def test_gates_that_a_region_reads_come_from_the_kernel() -> None:
    def layer(x: Tensor, weight: Tensor, experts: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        chosen = top_k(logits.detach(), 2)
        order, offsets = ops.group(chosen, 6)
        rows = ops.grouped_linear(x, experts, None, order, offsets, 2)
        return ops.combine(rows, order, logits.gather(-1, chosen).softmax(-1))

    graph = traced(layer, torch.randn(15, 16), torch.randn(6, 16), torch.randn(6, 8, 16))
    assert replace(graph, lowerings(graph), training=True) == 1
    names = {str(getattr(node.target, "__name__", node.target)) for node in graph.graph.nodes}
    assert not any(name in names for name in ("linear.default", "sort.stable", "gather.default", "softmax.int")), names


def test_a_lowered_graph_needs_no_values() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    x, weight, bias = torch.randn(3, 5, 16), torch.randn(6, 16), torch.randn(6)
    graph = traced(renormalised, x, weight, bias)
    replace(graph, lowerings(graph))
    with FakeTensorMode() as mode:
        experts, gates = graph(*(mode.from_tensor(t) for t in (x, weight, bias)))
    assert (experts.shape, gates.shape) == ((3, 5, 6), (3, 5, 6))
    assert isinstance(graph, fx.GraphModule)
