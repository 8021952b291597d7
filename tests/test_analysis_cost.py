"""Costs agree with what torch counts on an executed run, and are exact polynomials in the batch."""

from __future__ import annotations

import pytest
import sympy
import torch
from analysis_support import SMALL, exported, traced
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from examples.dit import DiT
from moefx import ops
from moefx.errors import InputError
from moefx.graph import trace
from moefx.passes.analysis import analyse, cost
from moefx.passes.analysis.cost import B
from tests.routed_toy import RoutedFFN

NAMES = [
    "DiT",
    "FunctionalDiT",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "UNet2DConditionModel",
    "UVit2DModel",
    "WanTransformer3DModel",
    "CogView4Transformer2DModel",
]


def counted(model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> int:
    # The math backend, because torch does not count its fused attention on every device.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_flops_are_what_torch_counts(name: str) -> None:
    model, args, kwargs, graph = traced(name)
    assert analyse(graph).costs.flops == counted(model, args, kwargs)


@pytest.mark.parametrize("name", ["DiT", "FluxTransformer2DModel"])
def test_the_exported_graph_costs_the_same(name: str) -> None:
    ours, oracle = cost(traced(name)[3]), cost(exported(name))
    assert ours.flops == oracle.flops
    assert ours.parameters == oracle.parameters


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_counted_once(name: str) -> None:
    model, _, _, graph = traced(name)
    used = cost(graph).parameters
    assert 0 < used <= sum(p.numel() for p in model.parameters())
    if name in ("DiT", "FluxTransformer2DModel", "CogView4Transformer2DModel"):
        assert used == sum(p.numel() for p in model.parameters())


def dit_inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 3, 8, 8), torch.rand(batch), torch.zeros(batch, dtype=torch.int64)


def test_costs_are_polynomials_in_the_batch() -> None:
    model = DiT(**SMALL).eval()
    symbolic = cost(trace(model, dit_inputs(3))).in_batch()
    for batch in (2, 5):
        assert symbolic.flops.subs(B, batch) == counted(model, dit_inputs(batch), {})
        assert symbolic.bytes.subs(B, batch) == cost(trace(model, dit_inputs(batch))).bytes
    assert sympy.Poly(symbolic.flops, B).degree() == 1


def test_the_cost_of_a_site_is_the_cost_of_its_nodes() -> None:
    graph = traced("DiT")[3]
    facts = analyse(graph)
    site = next(s for s in facts.sites if s.kind == "ffn")
    tokens, width, hidden = 3 * 16, site.shapes["D"], site.shapes["F"]
    found = facts.costs.of(site.nodes)
    assert found.flops == 2 * 2 * tokens * width * hidden
    assert found.parameters == 2 * width * hidden + width + hidden


def test_a_graph_without_a_batch_says_so() -> None:
    graph = trace(nn.Linear(4, 4), (torch.randn(4),))
    with pytest.raises(InputError, match="no input with a batch"):
        cost(graph).in_batch()


def test_routed_operators_count_their_products() -> None:
    model = RoutedFFN(width=24, hidden=40, experts=4, slots=2)
    rows = 2 * 9 * 2
    router, products, combine = 2 * 18 * 24 * 4, 2 * rows * 40 * 24 * 2, 2 * rows * 24
    assert analyse(trace(model, (torch.randn(2, 9, 24),))).costs.flops == router + products + combine

    class Heads(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
            return ops.head_attention(q, k, v, gates)

    given = (torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 8), torch.rand(2, 5, 3))
    costs = analyse(trace(Heads(), given)).costs
    assert costs.flops == 4 * 2 * 3 * 5 * 7 * 8
    assert costs.bytes >= 4 * sum(t.numel() for t in given)
