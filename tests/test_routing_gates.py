"""Gates and selections against their formulas."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_oracle import gates

from moefx.errors import OptionError
from moefx.routing import MODES, default_mode, expand_groups, group_limited_top_k, normalise, top_k
from moefx.routing.normalise import SUM_TO_ONE, probabilities, selection_scores


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (4, 1), (5, 3), (6, 6)])
def test_every_mode_follows_its_formula(mode: str, experts: int, k: int) -> None:
    logits = torch.randn(7, experts, dtype=torch.float64) * 3
    k = experts if mode == "soft" else k
    u = torch.randn(experts, dtype=torch.float64) if mode == "one_plus_su" else None
    chosen = top_k(logits, k)
    ours = normalise(logits, chosen, mode, scale=1.5, u=u)
    for token in range(7):
        experts_of, values = gates(logits[token], mode, k, u)
        assert chosen[token].tolist() == experts_of
        torch.testing.assert_close(ours[token], 1.5 * torch.stack(values), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mode", sorted(SUM_TO_ONE))
@given(st.sampled_from([1.0, 30.0, 200.0, 1e4]), st.integers(1, 6), st.booleans())
def test_gates_sum_to_one_at_any_scale_of_the_logits(mode: str, size: float, k: int, negative: bool) -> None:
    logits = torch.randn(16, 6) * size - (5 * size if negative else 0)
    w = normalise(logits, top_k(logits, 6 if mode == "soft" else k), mode)
    assert w.isfinite().all()
    torch.testing.assert_close(w.sum(-1), torch.ones(16), rtol=0, atol=1e-6)


def test_gates_sum_to_one_when_a_bias_selects_experts_without_probability() -> None:
    logits = torch.tensor([[300.0, 0.0, -100.0, -200.0]])
    chosen = torch.tensor([[2, 3]])  # their softmax probabilities are both 0 in float32
    for mode in ("topk_softmax", "softmax_topk_renorm", "sigmoid_topk_renorm"):
        torch.testing.assert_close(normalise(logits, chosen, mode).sum(-1), torch.ones(1))


def test_straight_through_gates_are_one_to_the_bit_and_have_the_gradient_of_the_probability() -> None:
    logits = (torch.randn(500, 7) * 4).requires_grad_()
    chosen = top_k(logits, 2)
    w = normalise(logits, chosen, "ste")
    assert torch.equal(w, torch.ones_like(w))
    (ours,) = torch.autograd.grad(w[:, 0].sum(), logits)
    (expected,) = torch.autograd.grad(logits.softmax(-1).gather(-1, chosen)[:, 0].sum(), logits)
    assert torch.equal(ours, expected)


def test_scale_of_copies_without_renormalisation() -> None:
    """Oracles: Σ w = k/E for a zero router, and 0.563, 0.395, 0.289 for logits of unit variance."""
    zero = torch.zeros(3, 8, dtype=torch.float64)
    assert torch.equal(
        normalise(zero, top_k(zero, 2), "softmax_topk").sum(-1), torch.full((3,), 0.25, dtype=torch.float64)
    )
    assert torch.equal(
        normalise(zero, top_k(zero, 2), "softmax_topk", scale=4).sum(-1), torch.ones(3, dtype=torch.float64)
    )
    for experts, k, expected in ((8, 2, 0.563), (16, 2, 0.395), (128, 8, 0.289)):
        logits = torch.randn(20_000, experts)
        mean = normalise(logits, top_k(logits, k), "softmax_topk").sum(-1).mean()
        assert abs(float(mean) - expected) < 0.005, (experts, k)


def test_only_one_plus_su_takes_u() -> None:
    logits, chosen = torch.zeros(1, 2), torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(OptionError, match="one_plus_su"):
        normalise(logits, chosen, "unit", u=torch.zeros(2))
    with pytest.raises(OptionError, match="one_plus_su"):
        normalise(logits, chosen, "one_plus_su")
    with pytest.raises(OptionError, match="1 of 2 experts"):
        normalise(logits, chosen, "soft")
    with pytest.raises(OptionError, match="did you mean 'softmax_topk'"):
        normalise(logits, chosen, "softmax_top")


def test_default_mode_is_trainable_with_one_expert_per_token() -> None:
    assert default_mode(8, 1) == "ste"
    assert default_mode(8, 2) == default_mode(1, 1) == "softmax_topk_renorm"


@given(st.data())
def test_top_k_breaks_ties_to_the_lowest_index(data: st.DataObject) -> None:
    experts = data.draw(st.integers(1, 40))
    k = data.draw(st.integers(1, experts))
    rows = st.lists(st.sampled_from([-1.0, 0.0, 0.5, float("-inf")]), min_size=experts, max_size=experts)
    scores = torch.tensor(
        data.draw(st.lists(rows, min_size=1, max_size=4)),
        dtype=data.draw(st.sampled_from([torch.float32, torch.float64])),
    )
    for row, chosen in zip(scores.tolist(), top_k(scores, k).tolist(), strict=True):
        assert chosen == sorted(range(experts), key=lambda e: (-row[e], e))[:k]


def test_top_k_of_nothing_and_out_of_range() -> None:
    assert top_k(torch.zeros(0, 4), 2).shape == (0, 2)
    assert top_k(torch.zeros(0, 4), 1).shape == (0, 1)
    for k in (0, 5):
        with pytest.raises(OptionError, match="4 experts"):
            top_k(torch.zeros(1, 4), k)


def test_group_limited_top_k_masks_whole_groups() -> None:
    """DeepSeek-V3 written out: group score = sum of its two best, the others at −inf."""
    scores = torch.randn(50, 12, dtype=torch.float64) - 3  # all negative: a mask of 0 would win
    ours = group_limited_top_k(scores, 4, groups=4, keep=2)
    for row, chosen in zip(scores.tolist(), ours.tolist(), strict=True):
        best = [sum(sorted(row[g * 3 : g * 3 + 3], reverse=True)[:2]) for g in range(4)]
        kept = sorted(range(4), key=lambda g: (-best[g], g))[:2]
        eligible = [e for e in range(12) if e // 3 in kept]
        assert chosen == sorted(eligible, key=lambda e: (-row[e], e))[:4]
    with pytest.raises(OptionError):
        group_limited_top_k(scores, 7, groups=4, keep=2)


def test_groups_expand_to_their_members() -> None:
    experts, w = expand_groups(torch.tensor([[2, 0]]), torch.tensor([[0.75, 0.25]]), 3)
    assert experts.tolist() == [[6, 7, 8, 0, 1, 2]]
    assert w.tolist() == [[0.75] * 3 + [0.25] * 3]


def test_selection_bias_ranks_scores_and_leaves_gates_alone() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    bias = torch.tensor([float("-inf"), 0.0, 1.0])
    for mode, score in (("sigmoid_topk_renorm", logits.sigmoid()), ("softmax_topk", logits.softmax(-1))):
        assert torch.equal(selection_scores(logits, mode, bias), score + bias)
        assert top_k(selection_scores(logits, mode, bias), 2).tolist() == [[2, 1]]
    assert selection_scores(logits, "unit", None) is logits


def test_probabilities_are_a_distribution_for_saturated_sigmoids() -> None:
    logits = torch.tensor([[-200.0, -201.0], [50.0, 60.0]])
    p = probabilities(logits, "sigmoid_topk")
    torch.testing.assert_close(p.sum(-1), torch.ones(2))
    torch.testing.assert_close(p[0], torch.tensor([1.0, -1.0]).mul(0.5).softmax(-1))
