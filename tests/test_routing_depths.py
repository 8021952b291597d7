"""Mixture of depths against its equation."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounter

from moefx.errors import OptionError
from moefx.routing import TokenRouter, follow, gather_rows, gather_tokens, put_tokens, route_tokens
from moefx.routing.tokens import spread

D = 6


class Block(nn.Module):
    """A block with its own skip connection that mixes tokens and reads a table per position."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor) -> torch.Tensor:
        attention = (x @ x.transpose(1, 2)).softmax(-1)
        return x + attention @ self.linear(x * rotary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_everything_at_weight_one_is_the_dense_block_to_the_bit(dtype: torch.dtype) -> None:
    block, router = Block().to(dtype), TokenRouter(D).to(dtype)
    x, table = torch.randn(2, 9, D).to(dtype), torch.randn(9, D).to(dtype)
    routed = route_tokens(router, x, lambda tokens, index: block(tokens, gather_rows(table, index)))
    assert torch.equal(routed, block(x, table))


@pytest.mark.parametrize("capacity", [0.125, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("bias", [True, False])
def test_equation(capacity: float, bias: bool) -> None:
    block, router = Block().double(), TokenRouter(D, capacity, bias=bias, std=0.7).double()
    x, table = torch.randn(3, 10, D, dtype=torch.float64), torch.randn(10, D, dtype=torch.float64)
    expected = x.clone()
    for b in range(3):
        r = x[b] @ router.weight[0] + (1 if bias else 0)
        chosen = sorted(sorted(range(10), key=lambda t: (-r[t].item(), t))[: int(capacity * 10)])
        after = block(x[b : b + 1, chosen], table[chosen])[0]
        for position, t in enumerate(chosen):
            expected[b, t] = x[b, t] + r[t] * (after[position] - x[b, t])
    ours = route_tokens(router, x, lambda tokens, index: block(tokens, gather_rows(table, index)))
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 20), st.sampled_from([0.1, 0.29, 0.5, 0.7, 1 / 3, 1.0]))
def test_the_number_of_tokens_is_the_floor(total: int, capacity: float) -> None:
    exact = {0.1: (1, 10), 0.29: (29, 100), 0.5: (1, 2), 0.7: (7, 10), 1 / 3: (1, 3), 1.0: (1, 1)}[capacity]
    router = TokenRouter(D, capacity)
    assert router.tokens(total) == total * exact[0] // exact[1]
    x = torch.randn(2, total, D)
    y = route_tokens(router, x, lambda tokens, index: tokens + 1)
    assert ((y != x).any(-1).sum(-1) == router.tokens(total)).all()


def test_selected_tokens_are_ascending_unique_and_tied_to_the_first() -> None:
    x = torch.randn(4, 12, D)
    index, weights = TokenRouter(D, 0.5, std=1.0)(x)
    assert (index.diff(dim=-1) > 0).all()
    assert index.shape == (4, 6)
    assert weights.shape == (4, 12)
    assert TokenRouter(D, 0.5)(x).tokens.tolist() == [list(range(6))] * 4


def test_no_tokens_and_capacity_below_one_token() -> None:
    def never(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        raise AssertionError

    x = torch.randn(2, 3, D)
    assert torch.equal(route_tokens(TokenRouter(D, 0.25), x, never), x)
    assert route_tokens(TokenRouter(D), x[:, :0], never).shape == (2, 0, D)


def test_the_router_learns_through_the_update() -> None:
    router = TokenRouter(D, 0.5)
    x = torch.randn(2, 8, D)
    route_tokens(router, x, lambda tokens, index: tokens * 2).square().mean().backward()
    assert router.weight.grad.abs().max() > 0
    assert router.bias.grad.abs() > 0


def test_a_sample_does_not_depend_on_its_batch() -> None:
    router, x = TokenRouter(D, 0.5, std=1.0), torch.randn(3, 8, D)
    assert torch.equal(route_tokens(router, x, lambda t, i: t * 2)[:1], route_tokens(router, x[:1], lambda t, i: t * 2))


def test_side_inputs_follow_the_tokens() -> None:
    index = torch.tensor([[0, 2], [1, 3]])
    values = torch.randn(2, 4, 3, 5)
    expected = torch.stack([values[0, [0, 2]], values[1, [1, 3]]])
    assert torch.equal(gather_tokens(values, index), expected)
    assert torch.equal(gather_tokens(values[..., 0, 0], index), expected[..., 0, 0])
    table = torch.randn(4, 7)
    assert torch.equal(gather_rows(table, index), torch.stack([table[[0, 2]], table[[1, 3]]]))


@pytest.mark.parametrize("capacity", [0.0, -1.0, 1.5])
def test_impossible_capacities_are_refused(capacity: float) -> None:
    with pytest.raises(OptionError, match="capacity"):
        TokenRouter(D, capacity)


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    router = TokenRouter(D, 0.5, std=1.0)
    counter = CompileCounter()
    router.eval()
    compiled = torch.compile(
        lambda x: route_tokens(router, x, lambda t, i: t.sin()), fullgraph=True, dynamic=True, backend=counter
    )
    for tokens in (9, 14, 23):
        x = torch.randn(2, tokens, D)
        torch.testing.assert_close(compiled(x), route_tokens(router, x, lambda t, i: t.sin()))
    assert counter.frame_count == 1


def test_tokens_are_put_back_where_they_were() -> None:
    x, index = torch.randn(3, 7, D), torch.tensor([[0, 6], [2, 3], [1, 5]])
    wanted = x.clone()
    for b in range(3):
        wanted[b, index[b]] = 9.0
    assert torch.equal(put_tokens(x, index, torch.full((3, 2, D), 9.0)), wanted)


@pytest.mark.parametrize("joint", ["", "first", "last"])
def test_what_belongs_to_tokens_follows_them(joint: str) -> None:
    others = 3 if joint else 0
    x, index = torch.randn(2, 5, D), torch.tensor([[0, 4], [1, 2]])
    rows = [
        [*i, *range(5, 5 + others)] if joint != "last" else [*range(others), *(o + others for o in i)]
        for i in index.tolist()
    ]
    table, mask = torch.randn(5 + others, 4), torch.randn(2, 1, 5 + others, 5 + others)
    got = follow(table.unsqueeze(1), index, x, (-3,), 4, joint)
    assert torch.equal(got, torch.stack([table[r].unsqueeze(1) for r in rows]))
    got = follow(mask, index, x, (-2, -1), 4, joint)
    assert torch.equal(got, torch.stack([mask[b][:, r][:, :, r] for b, r in enumerate(rows)]))


@given(st.integers(1, 70), st.integers(1, 70))
def test_ties_can_be_spread_evenly(total: int, count: int) -> None:
    order = spread(total)
    assert sorted(order.tolist()) == list(range(total))
    if count < total:
        router = TokenRouter(D, count / total, ties="spread")
        chosen = router(torch.randn(1, total, D)).tokens[0]
        gaps = torch.cat([chosen, chosen[:1] + total]).diff()
        assert gaps.max() <= 3 * total / len(chosen)


def test_forms_of_the_weight() -> None:
    x = torch.randn(2, 8, D, dtype=torch.float64)
    plain, probability = TokenRouter(D, std=1.0).double(), TokenRouter(D, std=1.0, weight="probability").double()
    squashed = TokenRouter(D, std=1.0, weight="one_plus_tanh", alpha=0.3).double()
    torch.testing.assert_close(plain(x).weights, x @ plain.weight[0] + 1)
    torch.testing.assert_close(squashed(x).weights, 1 + 0.3 * torch.tanh(x @ squashed.weight[0]))
    a, b = (x @ probability.weight.T).exp().unbind(-1)
    torch.testing.assert_close(probability(x).weights, b / (a + b))
    assert (TokenRouter(D, weight="one_plus_tanh")(x).weights == 1).all()
    assert (TokenRouter(D, weight="probability")(x).weights == 0.5).all()


def test_capacity_falls_over_the_training() -> None:
    router = TokenRouter(D, 0.5, warm_up=0.5)
    assert router.tokens(64) == 32
    counts = []
    for progress in (0.0, 0.125, 0.25, 0.5, 1.0):
        router.set_progress(progress)
        counts.append(router.tokens(64))
    assert counts == [64, 56, 48, 32, 32]


def test_cross_entropy_with_the_selection_is_recorded_in_training() -> None:
    router = TokenRouter(D, 0.5, std=1.0, losses={"selection": 0.01})
    x = torch.randn(2, 8, D)
    chosen, z = router(x).tokens, router.scores(x)
    target = torch.zeros(2, 8).scatter(1, chosen, 1.0)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(z, target)
    torch.testing.assert_close(router.record.terms["selection"], wanted)
    assert router.record.load.tolist() == [0.5, 0.5]
    router.record.terms["selection"].backward()
    assert router.weight.grad.abs().sum() > 0
