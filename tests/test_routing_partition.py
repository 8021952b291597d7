"""Partitions of neurons, and the regressions behind routers, against brute force and closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefx.errors import OptionError
from moefx.routing import fit, partition
from moefx.routing.scorers import MLPScorer


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups(labels: Tensor, slices: int) -> set[frozenset[int]]:
    return {frozenset(torch.nonzero(labels == e).flatten().tolist()) for e in range(slices)}


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_every_partition_is_balanced(slices: int, width: int, seed: int) -> None:
    neurons = slices * width
    rows, score = draw(neurons, 3, seed=seed), draw(neurons, seed=seed)
    h = draw(20, neurons, seed=seed).clamp_min(0)
    made = [
        partition.contiguous(neurons, slices),
        partition.shuffled(neurons, slices, seed),
        partition.dealt(score, slices),
        partition.balanced_clusters(rows, slices, seed),
        partition.around(rows, rows[:slices], metric="manhattan"),
        partition.coactive(h.T @ h, slices, seed),
        partition.claimed(draw(slices, neurons, seed=seed)),
        partition.assign(draw(neurons, slices, seed=seed).abs(), exact=0),
    ]
    for labels in made:
        assert labels.dtype == torch.int64
        assert torch.bincount(labels, minlength=slices).tolist() == [width] * slices
    assert torch.equal(made[3], partition.balanced_clusters(rows, slices, seed))


def test_planted_clusters_are_found() -> None:
    truth = torch.arange(24) % 4
    centres = 5 * torch.eye(4, 6, dtype=torch.float64)
    rows = centres[truth] + 0.1 * draw(24, 6)
    assert groups(partition.balanced_clusters(rows, 4, 0), 4) == groups(truth, 4)
    h = draw(200, 4, seed=1).clamp_min(0)[:, truth] + 0.01 * draw(200, 24, seed=2).abs()
    assert groups(partition.coactive(h.T @ h, 4, 0), 4) == groups(truth, 4)


@pytest.mark.parametrize("seed", range(5))
def test_assignment_is_the_cheapest_balanced_one(seed: int) -> None:
    cost = draw(6, 3, seed=seed)
    best = min(
        sum(float(cost[f, e]) for f, e in enumerate(labels))
        for labels in set(itertools.permutations([0, 0, 1, 1, 2, 2]))
    )
    found = partition.assign(cost)
    assert float(cost[torch.arange(6), found].sum()) == pytest.approx(best, abs=1e-12)
    # The rounded transport plan is close to it, and never better.
    plan = partition.assign(cost - cost.min(), exact=0)
    spent = float(cost[torch.arange(6), plan].sum())
    assert best - 1e-12 <= spent <= best + 1.0


def test_transport_plan_has_its_margins_and_large_partitions_are_good() -> None:
    cost = draw(40, 5).abs()
    plan = partition.sinkhorn(cost, epsilon=0.1).exp()
    assert torch.allclose(plan.sum(1), torch.ones(40, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(plan.sum(0), torch.full((5,), 8.0, dtype=torch.float64), atol=1e-2)
    exact, rounded = (float(cost[torch.arange(40), partition.assign(cost, exact=n)].sum()) for n in (4096, 0))
    random = float(cost[torch.arange(40), partition.shuffled(40, 5, 0)].sum())
    assert exact <= rounded <= exact + 0.15 * (random - exact)


def test_dealing_and_claiming_by_hand() -> None:
    score = torch.tensor([0.0, 9.0, 1.0, 8.0, 7.0, 2.0])
    assert partition.dealt(score, 2).tolist() == [1, 0, 0, 1, 0, 1]  # ranks 1, 3, 4, 5, 2, 0
    wants = torch.tensor([[5.0, 4.0, 3.0, 0.0], [4.5, 6.0, 1.0, 2.0]])
    # Best pairs in turn: (1, 1), (0, 0), (1, 0) taken, (0, 1) taken, (0, 2): slice 0 is full.
    assert partition.claimed(wants).tolist() == [0, 1, 0, 1]
    with pytest.raises(OptionError, match="unequal"):
        partition.contiguous(7, 2)


def test_ridge_is_the_solution_of_its_normal_equations() -> None:
    x, z = draw(50, 4), draw(50, 3, seed=1)
    W, b = fit.ridge(x, z, penalty=0.1)
    centred = x - x.mean(0)
    weight = 0.1 * centred.square().sum(0).mean()
    gradient = 2 * centred.T @ (x @ W.T + b - z) + 2 * weight * W.T
    assert gradient.abs().max() < 1e-10
    assert (x @ W.T + b - z).mean(0).abs().max() < 1e-12


def test_logistic_and_softmax_regressions_have_no_gradient_left() -> None:
    x, label = draw(80, 4), (draw(80, seed=3) > 0).long()
    for W, b, loss in (
        (*fit.logistic(x, label.double().unsqueeze(1)), torch.nn.functional.binary_cross_entropy_with_logits),
        (*fit.softmax_regression(x, label, 2), torch.nn.functional.cross_entropy),
    ):
        W, b = W.clone().requires_grad_(), b.clone().requires_grad_()
        target = label.double().unsqueeze(1) if len(W) == 1 else torch.nn.functional.one_hot(label, 2).double()
        std = x.std(0)
        (loss(x @ W.T + b, target) + 1e-3 * (W * std).square().mean()).backward()
        assert W.grad.abs().max() < 1e-6
        assert b.grad.abs().max() < 1e-6


def test_a_scorer_learns_a_planted_function() -> None:
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=draws)
    target = torch.relu(x @ torch.randn(5, 3, generator=draws))
    scorer = MLPScorer(5, 3, hidden=32, act="relu", std=0.4, generator=draws)
    before = float((scorer(x) - target).detach().square().mean())
    after = fit.train_scorer(scorer, x, target, draws, steps=400)
    assert after < 0.02 * before


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 1.0), st.integers(0, 99))
def test_cuts_give_their_share(share: float, seed: int) -> None:
    scores = draw(40, 8, seed=seed)
    above = (scores > fit.share_cut(scores, share)).double().mean()
    assert abs(float(above) - share) <= 1 / 320 + 1e-9
    positive = scores.abs() + 1e-3
    tau = fit.relative_cut(positive, max(share, 0.2))
    kept = (positive >= (1 - tau) * positive.max(-1, keepdim=True).values - 1e-12).double().mean()
    assert abs(float(kept) - max(share, 0.2)) <= 2 / 320


def test_equal_loss_gives_concentrated_buckets_less() -> None:
    even = torch.ones(50, 8, dtype=torch.float64) + 0.01 * draw(50, 8).abs()
    peaked = torch.full((50, 8), 0.01, dtype=torch.float64)
    peaked[:, 0] = 1.0
    shares = fit.equal_loss_shares([even, peaked], [even, peaked], 0.5)
    assert shares[0] > shares[1]
    assert sum(shares) / 2 == pytest.approx(0.5, abs=0.02)
    losses = []
    for cost, part in zip((even, peaked), shares, strict=True):
        ranked = cost.flatten().sort(descending=True).values
        losses.append(float(ranked[round(part * 400) :].sum() / ranked.sum()))
    assert losses[0] == pytest.approx(losses[1], abs=0.05)
