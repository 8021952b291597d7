"""The ends of every range: logits that are no numbers, capacity none and full, prompts without words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing import (
    DenseFFN,
    ExpertChoice,
    Experts,
    LinearRouter,
    RoutedFFN,
    TokenRouter,
    TopK,
    random_weights,
    route_tokens,
)
from moefx.routing.heads import HeadGate, QueryGate
from moefx.routing.scorers import LinearScorer, Router
from moefx.routing.segments import BlockChoice
from moefx.routing.space import SpaceExperts, word_maps
from moefx.routing.terms import TERMS
from moefx.routing.threshold import ThresholdGate
from moefx.training import aux_loss

D, E, F64 = 6, 4, torch.float64


class Given(nn.Module):
    """A router whose logits are what it is told."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.num_experts = logits, logits.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def layer(router: nn.Module, **options: Any) -> RoutedFFN:
    draws = torch.Generator().manual_seed(0)
    experts = Experts(random_weights(D, 8, num_experts=E, generator=draws, dtype=F64), F.gelu)
    shared = DenseFFN(random_weights(D, 5, generator=draws, dtype=F64), F.gelu)
    return RoutedFFN(router, experts, shared=shared, **options)


def tokens(count: int = 5) -> Tensor:
    return torch.randn(1, count, D, dtype=F64, generator=torch.Generator().manual_seed(1))


BROKEN = {"nan": [0.1, float("nan"), 0.2, 0.3], "inf": [0.1, float("inf"), 0.2, 0.3], "none": [float("-inf")] * E}


@pytest.mark.parametrize("selector", [TopK(2), ExpertChoice(2.0)], ids=["top-k", "expert choice"])
@pytest.mark.parametrize("kind", BROKEN)
def test_logits_that_are_no_numbers(kind: str, selector: Any) -> None:
    logits = torch.randn(1, 5, E, dtype=F64, generator=torch.Generator().manual_seed(2))
    logits[0, 3] = torch.tensor(BROKEN[kind], dtype=F64)
    x, alone = tokens(), [0, 1, 2, 4]
    sound = layer(Given(logits[:, alone]), selector=selector)(x[:, alone])
    only_shared = layer(Given(logits), selector=selector, non_finite="shared")
    y = only_shared(x)
    assert bool(y.isfinite().all())
    nothing = only_shared.shared(x[:, 3]) + only_shared.experts.b_out
    torch.testing.assert_close(y[:, 3], nothing, rtol=1e-10, atol=1e-12)
    if isinstance(selector, TopK):
        torch.testing.assert_close(y[:, alone], sound, rtol=1e-10, atol=1e-12)
        passed_on = layer(Given(logits), selector=selector)(x)
        assert not bool(passed_on[:, 3].isfinite().all())
        torch.testing.assert_close(passed_on[:, alone], sound, rtol=1e-10, atol=1e-12)
    with pytest.raises(InputError, match="NaN or infinity in the logits of 1 of 5 tokens"):
        layer(Given(logits), selector=selector, non_finite="raise")(x)


def test_one_expert_may_be_taken_out_and_policies_have_names() -> None:
    logits = torch.zeros(1, 5, E, dtype=F64)
    logits[..., 0] = float("-inf")
    routed = layer(Given(logits), selector=TopK(2), non_finite="raise")
    assert bool(routed(tokens()).isfinite().all())
    assert routed.record.load.tolist() == [0.0, 0.5, 0.5, 0.0]
    with pytest.raises(OptionError, match="policy"):
        layer(Given(logits), non_finite="ignore")


def test_capacity_none_and_full() -> None:
    router = LinearRouter(D, E, std=1.0, generator=torch.Generator().manual_seed(3)).double()
    x = tokens(7)
    none = layer(router, selector=ExpertChoice(0.0), mode="softmax_topk")
    nothing = none.shared(x) + none.experts.b_out
    torch.testing.assert_close(none(x), nothing, rtol=1e-10, atol=1e-12)
    assert not none.record.load.any()
    full = layer(router, selector=ExpertChoice(float(E)), mode="softmax_topk")
    w, p = full.experts.weights(), router(x).softmax(-1)
    every = [F.gelu(x @ w.w_in[e].T + w.b_in[e]) @ w.w_out[e].T for e in range(E)]
    wanted = nothing + sum(p[..., e : e + 1] * every[e] for e in range(E))
    torch.testing.assert_close(full(x), wanted, rtol=1e-10, atol=1e-12)


def test_a_prompt_without_words() -> None:
    draws = torch.Generator().manual_seed(4)
    router = Router(LinearScorer(D + 3, E, std=1.0, generator=draws), ("token", "text")).double()
    routed, x = layer(router, selector=TopK(1)), tokens()
    silent = routed(x, torch.zeros(1, 2, 3, dtype=F64))
    torch.testing.assert_close(routed(x, torch.zeros(1, 0, 3, dtype=F64)), silent, rtol=1e-10, atol=1e-12)
    words = torch.zeros(1, 0, 3, dtype=F64)
    space = SpaceExperts(LinearScorer(3, E, std=1.0, generator=draws).double(), routed.experts).eval()
    q, k = torch.randn(1, 2, 5, 4, dtype=F64), torch.randn(1, 2, 0, 4, dtype=F64)
    found = space(x, words, word_maps(q, k, 0))
    torch.testing.assert_close(found, routed.experts.b_out.expand(1, 5, D), rtol=1e-10, atol=1e-12)


def draws() -> torch.Generator:
    return torch.Generator().manual_seed(6)


GATES: dict[str, Callable[[], nn.Module]] = {
    "heads": lambda: HeadGate(D, 4, shared=1, top_k=2, std=1.0, generator=draws()),
    "queries": lambda: QueryGate(4, shared=1, top_k=2),
    "threshold": lambda: ThresholdGate(LinearRouter(D, 3, std=1.0, bias=True, generator=draws()), 4, target=0.5),
    "blocks": lambda: BlockChoice(3, 2, (D,), std=1.0, generator=draws()),
    "tokens": lambda: TokenRouter(D, 0.5, std=1.0, losses={"selection": 1.0}, generator=draws()),
}


@pytest.mark.parametrize("tokens", [0, 1, 7])
@pytest.mark.parametrize("samples", [0, 1, 2])
@pytest.mark.parametrize("kind", GATES)
def test_gates_of_no_sample_no_token_and_one(kind: str, samples: int, tokens: int) -> None:
    gate = GATES[kind]().double().train()
    x = torch.randn(samples, tokens, D, dtype=F64, requires_grad=True)
    if kind == "tokens":
        found = route_tokens(gate, x, lambda chosen, _: 2 * chosen)  # type: ignore[arg-type]
        assert found.shape == x.shape
    else:
        found = gate(x.unsqueeze(2).expand(-1, -1, 4, -1) if kind == "queries" else x)
        assert found.shape == ((samples, 3) if kind == "blocks" else (samples, tokens, 4))
    assert bool(found.isfinite().all())
    loss = aux_loss(gate)
    assert bool(loss.isfinite())
    (found.sum() + loss).backward()
    assert all(bool(p.grad.isfinite().all()) for p in gate.parameters() if p.grad is not None)


@pytest.mark.parametrize("samples", [0, 2])
@pytest.mark.parametrize("tokens", [0, 5])
def test_every_loss_of_nothing_is_finite(samples: int, tokens: int) -> None:
    names = {name: TERMS[name] for name in ("entropy", "importance", "sequence_balance", "similarity")}
    coefficients = dict.fromkeys([*names, "balance", "z"], 1.0)
    router = LinearRouter(D, E, std=1.0, generator=draws()).double()
    routed = layer(router, losses=names, coefficients=coefficients)
    routed.train()(torch.randn(samples, tokens, D, dtype=F64))
    assert set(routed.record.terms) == set(coefficients)
    assert bool(aux_loss(routed).isfinite())
    aux_loss(routed).backward()


def test_blocks_are_chosen_without_words() -> None:
    choice = BlockChoice(3, 2, (D, 4), std=1.0, generator=draws()).double()
    x = torch.randn(2, 5, D, dtype=F64)
    silent = choice(x, torch.zeros(2, 3, 4, dtype=F64))
    torch.testing.assert_close(choice(x, torch.zeros(2, 0, 4, dtype=F64)), silent, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["heads", "queries", "threshold", "tokens"])
def test_what_is_no_number_stays_with_its_token_or_sample(kind: str) -> None:
    gate, x = GATES[kind]().double().eval(), torch.randn(2, 6, D, dtype=F64)
    x = x.unsqueeze(2).expand(-1, -1, 4, -1).clone() if kind == "queries" else x
    broken = x.clone()
    broken[0, 3] = float("nan")
    if kind == "tokens":
        sound, found = (route_tokens(gate, v, lambda chosen, _: 2 * chosen) for v in (x, broken))  # type: ignore[arg-type]
        assert torch.equal(found[1], sound[1])
        assert not bool(found[0, 3].isfinite().any())
        return
    sound, found = gate(x), gate(broken)
    others = [0, 1, 2, 4, 5]
    assert torch.equal(found[1], sound[1])
    assert torch.equal(found[0, others], sound[0, others])
