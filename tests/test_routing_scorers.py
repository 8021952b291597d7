"""Scorers, routers that read several things, scorers with memory, and the auxiliary terms, each against plain torch."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.passes.rewrite import get_pass
from moefx.routing import Experts, RoutedFFN, random_weights
from moefx.routing.recurrent import GRUCell, GRUScorer, ResidualScorer
from moefx.routing.scorers import (
    CosineScorer,
    LinearScorer,
    MLPScorer,
    NormScorer,
    RandomScorer,
    Router,
    TableRouter,
)  # fmt: skip
from moefx.routing.selectors import TopK
from moefx.routing.terms import TERMS

D, E = 6, 4


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def x_of(*lead: int, seed: int = 1) -> Tensor:
    return torch.randn(*lead, D, dtype=torch.float64, generator=draws(seed))


# ---------------------------------------------------------------------------------------------------------- scorers


def test_linear_with_an_activation_before() -> None:
    scorer = LinearScorer(D, E, bias=True, before="silu", std=1.0, generator=draws()).double()
    nn.init.normal_(scorer.bias)
    x = x_of(2, 3)
    assert torch.allclose(scorer(x), F.silu(x) @ scorer.weight.T + scorer.bias)


@pytest.mark.parametrize(("act", "function"), [("gelu", F.gelu), ("tanh", torch.tanh)])
def test_mlp(act: str, function: Any) -> None:
    scorer = MLPScorer(D, E, hidden=9, act=act, std=1.0, generator=draws()).double()
    nn.init.normal_(scorer.b_in)
    nn.init.normal_(scorer.b_out)
    x = x_of(2, 3)
    assert torch.allclose(scorer(x), function(x @ scorer.w_in.T + scorer.b_in) @ scorer.w_out.T + scorer.b_out)


def test_cosine_and_norms() -> None:
    x = x_of(5)
    scorer = CosineScorer(D, E, temperature=0.5, generator=draws()).double()
    wanted = torch.stack([F.cosine_similarity(x, p.unsqueeze(0)) for p in scorer.prototypes], -1) / 0.5
    assert torch.allclose(scorer(x), wanted)
    norms = torch.stack([x[:, 2 * i : 2 * i + 2].norm(dim=1) for i in range(3)], 1)
    assert torch.allclose(NormScorer(D, 3)(x), norms / norms.std(1, keepdim=True, unbiased=False))
    with pytest.raises(OptionError, match="divisor"):
        NormScorer(D, 4)


def test_random_scores_differ_from_call_to_call() -> None:
    torch.manual_seed(0)
    scorer, x = RandomScorer(E), x_of(500)
    one, two = scorer(x), scorer(x)
    assert one.shape == (500, E)
    assert abs(float(torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1])) < 0.1


def test_scores_are_float32_in_a_narrow_model() -> None:
    for scorer in (LinearScorer(D, E), MLPScorer(D, E, hidden=5), CosineScorer(D, E), NormScorer(D, 3)):
        assert scorer.to(torch.bfloat16)(x_of(3).bfloat16()).dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in scorer.parameters())


# ---------------------------------------------------------------------------------------------------------- routers


class Same(nn.Module):
    """Returns what it reads."""

    num_experts = 0

    def forward(self, r: Tensor) -> Tensor:
        return r


def test_a_router_joins_what_it_reads() -> None:
    x, text, condition, plain = x_of(2, 3), x_of(2, 5), x_of(2, seed=3), x_of(2, 3, seed=4)
    router = Router(Same(), ("text", "token", "condition", "unmodulated"))
    assert router.taps == ("text", "condition", "unmodulated")
    found = router(x, text, condition, plain)
    for b in range(2):
        for t in range(3):
            wanted = torch.cat([text[b].mean(0), x[b, t], condition[b], plain[b, t]])
            assert torch.allclose(found[b, t], wanted)
    with pytest.raises(InputError, match="1 taps"):
        router(x, text)
    with pytest.raises(OptionError, match="twice"):
        Router(Same(), ("token", "token"))


def test_a_router_without_tokens_decides_per_sample() -> None:
    router = Router(Same(), ("timestep",), embed={"timestep": 4}, timestep_scale=2.0)
    t = torch.tensor([3, 500])
    angles = (t.float() * 2).unsqueeze(1) * torch.tensor([1.0, 10_000**-0.5])
    wanted = torch.cat([angles.cos(), angles.sin()], 1).unsqueeze(1)
    assert torch.allclose(router(x_of(2, 7), t), wanted)
    assert router(x_of(2, 7), t[0]).shape == (1, 1, 4)


def test_a_table_over_timesteps() -> None:
    table = torch.arange(12.0).view(4, 3)
    router = TableRouter(3, entries=4, table=table)
    found = router(x_of(3, 7), torch.tensor([0.0, 749.9, 1000.0]))
    assert torch.equal(found, table[[0, 2, 3]].unsqueeze(1))
    assert router(x_of(3, 7), torch.tensor(250)).shape == (1, 1, 3)
    with pytest.raises(InputError, match="raw timesteps"):
        router(x_of(3, 7), torch.zeros(3, 8))


# ----------------------------------------------------------------------------------------------------------- memory


def test_the_cell_is_a_gru() -> None:
    cell = GRUCell(5, generator=draws()).double()
    theirs = nn.GRUCell(5, 5).double()
    theirs.load_state_dict(
        {"weight_ih": cell.w_input, "weight_hh": cell.w_state, "bias_ih": cell.b_input, "bias_hh": cell.b_state}
    )
    v, s = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    assert torch.allclose(cell(v, s), theirs(v, s), atol=1e-12)


def test_layers_hand_their_state_on() -> None:
    """Two layers of RMoE, and two of MoE++'s gating residual, written out."""
    cell, x = GRUCell(5, generator=draws()), x_of(2, 3)
    first, second = (Router(GRUScorer(D, E, cell, std=1.0, generator=draws(i))).double() for i in (1, 2))
    one, state = first(x)
    two, _ = second(x, state)
    gru = lambda v, s: cell(v, s)  # noqa: E731
    s1 = gru(x @ first.scorer.w_in.T, torch.zeros(2, 3, 5, dtype=torch.float64))
    s2 = gru(x @ second.scorer.w_in.T, s1)
    assert torch.allclose(one, s1 @ first.scorer.w_out.T)
    assert torch.allclose(two, s2 @ second.scorer.w_out.T)

    residual = [Router(ResidualScorer(LinearScorer(D, E, std=1.0, generator=draws(i)), E)).double() for i in (1, 2)]
    nn.init.normal_(residual[1].scorer.w_residual, generator=draws(5))
    z1, state = residual[0](x)
    z2, _ = residual[1](x, state)
    assert torch.equal(z1, state)
    weights = [r.scorer.scorer.weight for r in residual]
    assert torch.allclose(z1, x @ weights[0].T)
    assert torch.allclose(z2, x @ weights[1].T + z1 @ residual[1].scorer.w_residual.T)


def test_a_routed_ffn_with_memory_returns_the_state() -> None:
    cell, x = GRUCell(5, generator=draws()), x_of(2, 3)
    stacked = random_weights(D, 8, num_experts=E, generator=draws(), dtype=torch.float64)
    layers = [
        RoutedFFN(Router(GRUScorer(D, E, cell, std=1.0, generator=draws(i))), Experts(stacked, F.gelu)).double()
        for i in (1, 2)
    ]
    assert all(layer.stateful for layer in layers)
    y1, state = layers[0](x)
    y2, _ = layers[1](y1, state)
    alone, _ = layers[1](y1)
    assert not torch.allclose(y2, alone)
    y2.square().sum().backward()
    assert float(layers[0].router.scorer.w_in.grad.abs().max()) > 0  # through the state


# ------------------------------------------------------------------------------------------------------------ terms


def terms(mode: str = "softmax_topk", **router: Any) -> tuple[RoutedFFN, Tensor, Tensor]:
    """Return a layer with every generic term after a call, its tokens and its probabilities."""
    names = ["entropy", "importance", "sequence_balance", "similarity"]
    stacked = random_weights(D, 8, num_experts=E, generator=draws(), dtype=torch.float64)
    layer = RoutedFFN(
        Router(LinearScorer(D, E, std=1.0, generator=draws(2))).double(),
        Experts(stacked, F.gelu),
        selector=TopK(2),
        mode=mode,
        losses={name: TERMS[name] for name in names},
        coefficients=dict.fromkeys(names, 1.0),
    )
    x = x_of(3, 5)
    layer(x)
    return layer, x, layer.router(x).softmax(-1).detach()


def test_terms() -> None:
    layer, x, p = terms()
    top = p.topk(2, -1).indices
    chosen = F.one_hot(top, E).sum(-2).double()
    found = {name: float(value.detach()) for name, value in layer.record.terms.items()}
    assert set(found) == {"balance", "z", "entropy", "importance", "sequence_balance", "similarity"}
    assert found["entropy"] == pytest.approx(float(-(p * p.log()).sum(-1).mean()))
    g = (p * chosen).reshape(-1, E)
    assert found["importance"] == pytest.approx(float(E * (p.reshape(-1, E).mean(0) * g.mean(0)).sum()))
    per_sample = [E * float((chosen[b].sum(0) / 10 * p[b].mean(0)).sum()) for b in range(3)]
    assert found["sequence_balance"] == pytest.approx(sum(per_sample) / 3)
    m, flat = chosen.reshape(-1, E), p.reshape(-1, E)
    together, mass = m.T @ m, flat.T @ flat / 15
    total = 0.0
    for i in range(E):
        for j in range(E):
            same = float(together.trace()) / E if i == j else float(together.sum() - together.trace()) / (E * E - E)
            total += float(together[i, j]) / same * float(mass[i, j])
    assert found["similarity"] == pytest.approx(total / E**2)
    with torch.no_grad():
        layer(x)
    assert set(layer.record.terms) == {"balance", "z"}  # no gradient, no further terms


def test_uniform_routing_is_the_minimum_of_entropy_times_minus_one() -> None:
    stacked = random_weights(D, 8, num_experts=E, dtype=torch.float64)
    router = Router(LinearScorer(D, E, std=0.0))
    layer = RoutedFFN(router, Experts(stacked, F.gelu), losses={"entropy": TERMS["entropy"]})
    layer(x_of(2, 3))
    assert float(layer.record.terms["entropy"].detach()) == pytest.approx(math.log(E))


# ---------------------------------------------------------------------------------------------------------- options


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("upcycle", {"selector": "group-limited", "select_groups": 3}, "select_groups = 3 must divide 8"),
    ("upcycle", {"selector": "group-limited", "select_groups": 4, "keep_groups": 1, "top_k": 3}, "of the 2 experts"),
    ("upcycle", {"selector": "interval", "intervals": [3]}, "must add up to the 8 experts"),
    ("upcycle", {"selector": "top-p", "selection_bias": True}, "shifts a ranking"),
    ("upcycle", {"selector": "best"}, "Input should be"),
    ("upcycle", {"router_input": "token+noise"}, "join by"),
    ("upcycle", {"router_input": "token+token"}, "each once"),
    ("upcycle", {"losses": {"balance": 0.1, "diversity": 1.0}}, "no such term"),
    ("upcycle", {"losses": {"contrastive": 1.0}}, "needs scorer = cosine"),
    ("upcycle", {"losses": {"predictor": 1.0}}, "needs selector = predicted"),
    ("upcycle", {"normalise": "soft"}, "weighs all experts"),
    ("upcycle", {"non_finite": "ignore"}, "no such policy"),
    ("upcycle", {"always": [8]}, "of 8 experts"),
    ("upcycle", {"untie": True, "scorer": "mlp"}, "untie goes with"),
    ("fresh-experts", {"zero_experts": 8}, "need an FFN beside them"),
    ("fresh-experts", {"losses": {"weighted_balance": 1.0}}, "needs cheap experts"),
    ("low-rank-experts", {"core": True}, "needs selector = interval"),
    ("low-rank-experts", {"granularity": 2}, "raise the rank"),
    ("low-rank-experts", {"targets": ["in", "in"]}, "twice"),
]


@pytest.mark.parametrize(("rule", "options", "reason"), REFUSED)
def test_options_that_do_not_fit_are_refused(rule: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(OptionError, match=reason):
        get_pass(rule)(**options)
