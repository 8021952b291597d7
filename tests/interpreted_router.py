"""Router and grouping kernels against float64 and stable sorting; run by ``test_codegen_kernels.py``.

What equality of a choice means: on the logits that the kernel itself computed, ranking is comparison alone, so the
chosen experts are those of a stable sort to the last index. Where scores are computed first (softmax, then a bias), two
roundings differ: no expert is left out whose exact score is higher than that of a chosen one by more than 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, fx

from moefx import ops
from moefx.codegen import lowerings, replace, routing, runtime
from moefx.codegen.router_lowering import RouterLowering
from moefx.routing.normalise import normalise, selection_scores
from moefx.routing.select import group_limited_top_k, top_k
from tests.interpreted_kernels import _poisoned_memory, experts_of  # noqa: F401
from tests.router_support import traced, within_groups

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|divide by zero|invalid value):RuntimeWarning")

MODES = ("softmax_topk_renorm", "softmax_topk", "sigmoid_topk_renorm", "sigmoid_topk", "unit", "ste", "sigmoid_ste")
MODES = (*MODES, "identity", "one_plus_tanh", "one_plus_su")


def route(mode: str, k: int, scale: float = 1.0) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Return a router: (tokens, weight, addend, bias of the selection, u) to experts, gates and logits."""

    def run(x: Tensor, weight: Tensor, addend: Tensor, bias: Tensor | None, u: Tensor | None) -> tuple[Tensor, ...]:
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        logits = torch.nn.functional.linear(x.to(wide), weight) + addend
        experts = top_k(selection_scores(logits.detach(), mode, bias), k)
        gates = normalise(logits, experts, mode, scale=scale, u=u)
        ops.group(experts.reshape(-1, k), weight.shape[0])
        return experts, gates, logits

    return run  # type: ignore[return-value]


def lowered(function: Callable[..., object], *inputs: Tensor | None) -> fx.GraphModule:
    graph = traced(function, *inputs)
    found = lowerings(graph)
    assert any(isinstance(item, RouterLowering) for item in found), found
    replace(graph, found, training=True)
    return graph


def draw(tokens: tuple[int, ...], width: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(width + experts)
    return torch.randn(*tokens, width).to(dtype), torch.randn(experts, width) / width**0.5


def check_choice(experts: Tensor, scores: Tensor) -> None:
    """No expert is left out whose score is higher than that of a chosen one by more than rounding."""
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, experts, True)
    worst = scores.masked_fill(~chosen, float("inf")).amin(-1)
    best = scores.masked_fill(chosen, float("-inf")).amax(-1)
    assert bool((worst >= best - 1e-6).all())
    assert bool((experts.sort(-1).values.diff(dim=-1) > 0).all())


@pytest.mark.parametrize(
    ("mode", "tokens", "width", "experts", "k", "bias", "dtype"),
    [
        *[(mode, (2, 19), 24, 5, 2, mode in ("softmax_topk", "sigmoid_topk"), torch.float32) for mode in MODES],
        ("softmax_topk", (1,), 7, 1, 1, False, torch.float32),
        ("softmax_topk_renorm", (2, 3, 11), 70, 67, 8, True, torch.float32),
        ("sigmoid_topk_renorm", (33,), 40, 256, 8, False, torch.float32),
        ("softmax_topk_renorm", (3, 13), 40, 8, 8, False, torch.float32),
        ("softmax_topk", (37,), 48, 8, 2, False, torch.bfloat16),
        ("sigmoid_topk_renorm", (37,), 48, 8, 2, True, torch.float16),
    ],
)
def test_router_and_its_gradient(
    mode: str, tokens: tuple[int, ...], width: int, experts: int, k: int, bias: bool, dtype: torch.dtype
) -> None:
    x, weight = draw(tokens, width, experts, dtype)
    addend = torch.randn(tokens[0], *[1] * (len(tokens) - 1), experts) if len(tokens) > 1 else torch.randn(experts)
    given = [x, weight, addend, torch.randn(experts) if bias else None, None]
    if mode == "one_plus_su":
        given[4] = torch.randn(experts)
    function = route(mode, k, 1.5)
    run = lowered(function, *given)
    leaves = [t for i, t in enumerate(given) if t is not None and i != 3]
    for leaf in leaves:
        leaf.requires_grad_()
    index, gates, logits = run(*given)
    exact = [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
    _, _, want_logits = function(*exact)
    torch.testing.assert_close(logits.double(), want_logits, atol=2e-5, rtol=1e-5)
    if not bias:
        assert torch.equal(index, top_k(logits, k)), "ranking is comparison alone"
    check_choice(index, selection_scores(want_logits.detach(), mode, exact[3]))
    want_gates = normalise(want_logits, index, mode, scale=1.5, u=exact[4])
    torch.testing.assert_close(gates.double(), want_gates, atol=1e-5, rtol=1e-5)
    seeds = [torch.randn_like(gates), torch.randn_like(logits)]
    got = torch.autograd.grad([gates, logits], leaves, seeds)
    exact_leaves = [t for i, t in enumerate(exact) if t is not None and i != 3]
    total = sum((o * s.double()).sum() for o, s in zip((want_gates, want_logits), seeds, strict=True))
    want = torch.autograd.grad(total, exact_leaves)
    for one, other in zip(got, want, strict=True):
        limit = 3e-5 if one.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(one.double(), other, atol=limit * float(other.abs().max() + 1), rtol=limit)


def choose(logits_of: Tensor, k: int) -> Tensor:
    """Return what the kernel chooses among given logits: tokens are unit vectors, the weight holds the logits."""
    tokens, experts = logits_of.shape
    x, weight = torch.eye(tokens), logits_of.T.contiguous()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        chosen = top_k(torch.nn.functional.linear(x, weight), k)
        ops.group(chosen, experts)
        return chosen

    return lowered(run, x, weight)(x, weight)  # type: ignore[no-any-return]


def test_ties_go_to_the_lowest_expert_and_infinities_are_ranked() -> None:
    inf = float("inf")
    rows = torch.tensor([[1.0, 1, 1, 1, 1], [0, -0.0, 0, -0.0, 0], [2, 3, 3, 2, 3], [-1, -2, -1, -2, -1]])
    assert torch.equal(choose(rows, 3), top_k(rows, 3))
    # Nothing but the diagonal of the unit vectors may meet an infinity, so these go in as one token.
    rows = torch.tensor([[1.0, -inf, inf, -inf, 0.0]])
    assert torch.equal(choose(rows, 5), top_k(rows, 5))
    rows = torch.tensor([[1.0, float("nan"), inf, float("nan"), 0.0]])
    assert torch.equal(choose(rows, 4), top_k(rows, 4))


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(st.integers(1, 40), st.integers(1, 70), st.data())
def test_choices_of_small_integers(tokens: int, experts: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(8, experts)))
    logits = torch.randint(-2, 3, (tokens, experts), generator=torch.Generator().manual_seed(tokens)).float()
    assert torch.equal(choose(logits, k), top_k(logits, k))


@pytest.mark.parametrize(
    ("experts", "groups", "keep", "best", "k"),
    [(12, 4, 2, 2, 3), (64, 8, 4, 2, 8), (15, 3, 1, 2, 4), (20, 5, 3, 1, 6), (6, 6, 2, 2, 2), (8, 1, 1, 3, 8)],
)
def test_a_choice_within_the_best_groups_and_its_gradient(
    experts: int, groups: int, keep: int, best: int, k: int
) -> None:
    x, weight = draw((2, 19), 24, experts, torch.float32)
    given, function = (x, weight, torch.randn(experts) / 8), within_groups(groups, keep, best, k)
    run = lowered(function, *given)
    names = {str(node.target) for node in run.graph.nodes}
    assert not any("sort" in name or "scatter" in name for name in names), "the kernel chooses the groups too"
    leaves = [given[0].requires_grad_(), given[1].requires_grad_()]
    index, gates = run(*given)
    exact = [t.detach().double() for t in given]
    free = [t.requires_grad_() for t in exact[:2]]
    want_index, _ = function(*exact)
    assert torch.equal(index, want_index), "no tie is as close as float32 rounds, with this seed"
    logits = torch.nn.functional.linear(*free)
    want = normalise(logits, index, "sigmoid_topk_renorm", scale=2.5)
    torch.testing.assert_close(gates.double(), want, atol=1e-5, rtol=1e-5)
    seed = torch.randn_like(gates)
    for one, other in zip(
        torch.autograd.grad(gates, leaves, seed), torch.autograd.grad(want, free, seed.double()), strict=True
    ):
        torch.testing.assert_close(one.double(), other, atol=3e-5, rtol=3e-5)


@hypothesis.settings(max_examples=10, deadline=None, derandomize=True)
@hypothesis.given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_ties_within_groups_go_to_the_lowest(groups: int, members: int, data: st.DataObject) -> None:
    keep, best = data.draw(st.integers(1, groups)), data.draw(st.integers(1, 3))
    k, experts = data.draw(st.integers(1, keep * members)), groups * members
    logits = torch.randint(-1, 2, (17, experts), generator=torch.Generator().manual_seed(experts)).float()

    def run(x: Tensor, weight: Tensor) -> Tensor:
        scores = torch.nn.functional.linear(x, weight)
        chosen = group_limited_top_k(scores, k, groups=groups, keep=keep, best=best)
        ops.group(chosen, experts)
        return chosen

    given = torch.eye(17), logits.T.contiguous()
    got = lowered(run, *given)(*given)
    assert torch.equal(got, group_limited_top_k(logits, k, groups=groups, keep=keep, best=best))


def test_logits_that_are_flattened_first() -> None:
    """Attention experts route [B, T, D] by logits [B * T, E]."""

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        logits = torch.nn.functional.linear(x, weight).reshape(-1, weight.shape[0])
        experts = top_k(logits.detach(), 2)
        ops.group(experts, weight.shape[0])
        return experts, normalise(logits, experts, "softmax_topk")

    given = draw((2, 19), 24, 5, torch.float32)
    leaves = [t.requires_grad_() for t in given]
    graph = lowered(run, *(t.detach() for t in given))
    for one, other in zip(graph(*leaves), run(*leaves), strict=True):
        torch.testing.assert_close(one, other)
    got, want = (torch.autograd.grad(function(*leaves)[1].square().sum(), leaves) for function in (graph, run))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_no_tokens() -> None:
    x, weight = draw((0,), 8, 4, torch.float32)
    given = (x, weight, torch.zeros(4), None, None)
    index, gates, logits = lowered(route("softmax_topk", 2), *given)(*given)
    assert (index.shape, gates.shape, logits.shape) == ((0, 2), (0, 2), (0, 4))


# ------------------------------------------------------------------------------------------------------------- grouping


def check_grouping(ids: Tensor, experts: int) -> None:
    order, offsets, position, buffer = torch.ops.moefx.grouping(ids, experts)
    want_order, want_offsets = ops.group(ids, experts)
    assert torch.equal(order, want_order)
    assert torch.equal(offsets, want_offsets)
    assert torch.equal(position[order], torch.arange(ids.numel()))
    rows = ids.numel()
    tiles = runtime.tiles_of(buffer, rows, experts, 32)
    assert torch.equal(tiles, runtime.tile_map(offsets, rows, 32))


@pytest.mark.parametrize("case", ["random", "one takes all", "half dropped"])
@pytest.mark.parametrize(("tokens", "slots", "experts"), [(350, 2, 5), (1, 1, 1), (0, 2, 3), (64, 2, 64), (50, 3, 256)])
def test_grouping_is_a_stable_sort(case: str, tokens: int, slots: int, experts: int) -> None:
    check_grouping(experts_of(case, tokens, slots, experts), experts)


def test_grouping_takes_any_integers_and_drops_what_is_no_expert() -> None:
    check_grouping(torch.tensor([[3, -1], [0, 7], [4, 3], [-5, 0]], dtype=torch.int32), 4)


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 200), st.integers(1, 3), st.integers(1, 40))
def test_grouping_of_any_shape(tokens: int, slots: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    check_grouping(torch.randint(0, experts + 1, (tokens, slots), generator=generator), experts)


# ------------------------------------------------------------------------------------------------------------ operators


def test_operators_keep_the_rules_of_torch() -> None:
    x, weight = draw((2, 9), 16, 5, torch.float32)
    graph = traced(route("softmax_topk", 2), x, weight, torch.zeros(5), None, None)
    (router,) = [item for item in lowerings(graph) if isinstance(item, RouterLowering)]
    key = routing.register(router.training_kernels[0])
    given = (x.requires_grad_(), weight.requires_grad_(), [torch.randn(5, requires_grad=True)], key)
    # Its dynamic test adds up results, an integer tensor first, in place; compiled training is tested elsewhere.
    rules = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.moefx.router, given, test_utils=rules)
    torch.library.opcheck(torch.ops.moefx.grouping, (torch.randint(0, 5, (18, 2)), 5))


def test_repeated_runs_are_bitwise_equal() -> None:
    x, weight = draw((2, 19), 24, 5, torch.float32)
    given = (x.requires_grad_(), weight.requires_grad_(), torch.zeros(5, requires_grad=True), None, None)
    run = lowered(route("softmax_topk", 2), *(None if t is None else t.detach() for t in given))

    def once() -> list[Tensor]:
        index, gates, logits = run(*given)
        return [index, gates, logits, *torch.autograd.grad(gates.sum(), given[:3])]

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))
