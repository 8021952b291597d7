"""What holds for every selector: shapes, dtypes, ties, empty slots, one expert, one token, no token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefx.routing import DenseFFN, Experts, LinearRouter, RoutedFFN, initialise, random_weights
from moefx.routing.by_expert import ExpertChoice, to_token_choice
from moefx.routing.normalise import normalise
from moefx.routing.selectors import (
    All,
    Forced,
    GroupLimitedTopK,
    GumbelSigmoid,
    Multinomial,
    NoisyTopK,
    Race,
    Selector,
    Threshold,
    TopK,
    TopP,
)  # fmt: skip

D, HIDDEN = 6, 10
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 6e-3}
MODES = ("softmax_topk", "softmax_topk_renorm", "sigmoid_topk", "sigmoid_topk_renorm", "unit", "ste", "identity")


def selectors(experts: int) -> dict[str, Selector]:
    """One of each kind over that many experts."""
    return {
        "top-k": TopK(min(2, experts)),
        "group-limited": GroupLimitedTopK(1, groups=experts, keep=1),
        "multinomial": Multinomial(min(2, experts)),
        "noisy": NoisyTopK(1, noise=1.0),
        "top-p": TopP(0.5),
        "threshold": Threshold(experts, cut=0.1, width=2),
        "race": Race(experts, mean_k=1.0),
        "gumbel": GumbelSigmoid(),
        "all": All(),
        "forced": Forced([experts - 1], TopK(1)),
        "expert choice": ExpertChoice(1.0),
        "expert choice, batch": ExpertChoice(1.3, pool="batch"),
        "expert choice, fixed": ExpertChoice(0.7, pool=3),
    }


KINDS = tuple(selectors(2))


def layer(kind: str, experts: int, dtype: torch.dtype, mode: str, std: float) -> RoutedFFN:
    draws = torch.Generator().manual_seed(experts)
    weights = random_weights(D, HIDDEN, num_experts=experts, generator=draws, dtype=dtype)
    router = LinearRouter(D, experts, std=std, generator=draws)
    return RoutedFFN(router, Experts(weights, F.gelu), selector=selectors(experts)[kind], mode=mode)


def by_hand(model: RoutedFFN, x: Tensor, experts_TK: Tensor, gates_TK: Tensor) -> Tensor:
    """Sum the experts in float64, whatever the layer's dtype."""
    w = model.experts.weights().map(lambda t: t.double())
    flat = x.double().reshape(-1, D)
    every = torch.einsum("tef,edf->ted", F.gelu(torch.einsum("td,efd->tef", flat, w.w_in) + w.b_in), w.w_out)
    gates = torch.zeros(flat.shape[0], w.w_in.shape[0] + 1, dtype=torch.float64)
    gates = gates.scatter_add(1, experts_TK.clamp(max=w.w_in.shape[0]), gates_TK.double())[:, :-1]
    return ((gates.unsqueeze(-1) * every).sum(1) + w.b_out).reshape(x.shape)


@settings(max_examples=120)
@given(st.data())
def test_a_decision_is_sound_and_the_layer_is_its_sum(data: st.DataObject) -> None:
    kind, mode = data.draw(st.sampled_from(KINDS)), data.draw(st.sampled_from(MODES))
    dtype, training = data.draw(st.sampled_from(list(DTYPES))), data.draw(st.booleans())
    batch, count = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 7))
    experts, std = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([0.0, 1.0, 50.0]))
    model = layer(kind, experts, dtype, mode, std).train(training)
    x = torch.randn(batch, count, D, generator=torch.Generator().manual_seed(5)).to(dtype)
    torch.manual_seed(3)
    routing = model.route(x)
    torch.manual_seed(3)
    model = layer(kind, experts, dtype, mode, std).train(training)  # the averages of a race move
    with torch.no_grad():
        y = model(x)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    tokens = batch * count
    assert routing.experts.shape == routing.gates.shape == (tokens, routing.experts.shape[1])
    real = routing.experts < experts
    assert bool((routing.experts >= 0).all())
    assert not routing.gates[~real].any()
    for row in routing.experts.tolist():
        chosen = [e for e in row if e < experts]
        assert len(set(chosen)) == len(chosen)
    if mode.endswith("renorm") and tokens:
        mass = routing.gates.sum(-1)
        assert torch.allclose(mass, real.any(-1).to(mass), atol=1e-5)
    if tokens:
        wanted = by_hand(model, x, routing.experts, routing.gates).detach()
        assert float((y.double() - wanted).norm()) <= DTYPES[dtype] * float(wanted.norm())
    load = model.record.load
    assert float(load.sum()) == pytest.approx(1.0 if bool(real.any()) else 0.0, abs=1e-5)


@settings(max_examples=30)
@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_a_single_expert_is_the_dense_ffn_where_it_is_chosen(kind: str, batch: int, count: int, training: bool) -> None:
    dense = random_weights(D, HIDDEN, bias=False, generator=torch.Generator().manual_seed(1))
    router = LinearRouter(D, 1, generator=torch.Generator().manual_seed(2))
    selector = selectors(1)[kind]
    model = RoutedFFN(router, Experts(initialise.copies(dense, 1), F.gelu), selector=selector, mode="unit")
    x = torch.randn(batch, count, D, generator=torch.Generator().manual_seed(5))
    model.train(training)
    with torch.no_grad():
        torch.manual_seed(3)
        chosen = (model.route(x).experts == 0).any(-1).view(batch, count)
        torch.manual_seed(3)
        y, wanted = model(x), DenseFFN(dense, F.gelu)(x)
    if kind != "race" or not training:  # a second call of a race in training finds the same winners
        assert torch.equal(y[~chosen], torch.zeros_like(y[~chosen]))
    assert torch.allclose(y[chosen], wanted[chosen], atol=1e-6)
    if kind in ("top-k", "top-p", "all", "forced", "group-limited", "noisy", "multinomial", "expert choice"):
        assert bool(chosen.all())


def test_ties_go_to_the_lowest_index() -> None:
    zero, x = torch.zeros(1, 4, 3), torch.zeros(1, 4, D)
    for selector, wanted in ((TopK(2), [0, 1]), (TopP(0.5), [0, 1, 3]), (Forced([1], TopK(1)), [1, 0])):
        assert selector(zero, x)[0].tolist() == [wanted] * 4
    assert ExpertChoice(1.5)(zero, x).tolist() == [[0, 1]] * 3  # and tokens likewise
    race = Race(3, mean_k=1.0).train()
    assert race(zero, x)[0].tolist() == [[0, 1, 2], [0, 3, 3], [3, 3, 3], [3, 3, 3]]


def test_one_expert_takes_every_token_it_may() -> None:
    x = torch.randn(2, 5, D)
    model = layer("expert choice", 3, torch.float32, "softmax_topk", 1.0)
    model.router.bias = torch.nn.Parameter(torch.tensor([50.0, 0, 0]))
    routing = model.route(x)
    assert routing.tokens.shape == (3, 4)  # ceil(5 / 3) tokens of each sample, whatever the router wants
    assert (routing.experts == 0).sum() == 4


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(0, 5), st.integers(0, 4), st.integers(0, 50))
def test_both_forms_of_a_choice_agree(experts: int, tokens: int, taken: int, seed: int) -> None:
    draws = torch.Generator().manual_seed(seed)
    count = min(taken, tokens)
    index = torch.stack([torch.randperm(tokens, generator=draws)[:count] for _ in range(experts)])
    slots = to_token_choice(index, tokens)
    assert slots.shape == (tokens, experts)
    for t in range(tokens):
        for e in range(experts):
            assert int(slots[t, e]) == (e if t in index[e].tolist() else experts)


@pytest.mark.parametrize("mode", MODES)
def test_empty_slots_neither_weigh_nor_learn(mode: str) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    experts = torch.tensor([[0, 4], [4, 4], [1, 2], [3, 0], [4, 2]])
    gates = normalise(logits, experts, mode, partial=True)
    assert not gates[experts == 4].any()
    assert gates.isfinite().all()
    for row, chosen in enumerate(experts.tolist()):
        alone = [e for e in chosen if e < 4]
        if alone:
            wanted = normalise(logits[row], torch.tensor(alone), mode)
            assert torch.allclose(gates[row][experts[row] < 4], wanted)
    if not gates.requires_grad:
        assert mode == "unit"
        return
    (gradient,) = torch.autograd.grad((gates * torch.arange(10.0).view(5, 2)).sum(), logits)
    assert bool(gradient.isfinite().all())
    assert not gradient[1].any()


@settings(max_examples=15)
@given(st.sampled_from([k for k in KINDS if not k.endswith(("batch", "fixed"))]), st.integers(2, 4))
def test_evaluation_does_not_look_at_the_batch(kind: str, batch: int) -> None:
    model = layer(kind, 4, torch.float64, "softmax_topk", 1.0).eval()
    assert model.selector.batch_invariant
    x = torch.randn(batch, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        together: Any = model(x)
        for b in range(batch):
            assert torch.allclose(together[b : b + 1], model(x[b : b + 1]), atol=1e-12)
