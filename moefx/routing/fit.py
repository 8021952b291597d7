"""Routers and thresholds from data: regressions on what the slices of a network give for a sample of its tokens.

Legend: S sampled tokens, D_r width of what the router reads, E slices, D_o output width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import InputError
from moefx.routing.weights import FFNWeights


def slice_outputs(weights: FFNWeights, act: Callable[..., Any], x_SD: Tensor) -> Iterator[Tensor]:
    """Yield the output ``[S, D_o]`` of every slice on its own, without the hoisted bias: one at a time in memory."""
    assert weights.num_experts is not None
    x = x_SD.to(weights.w_in.device, torch.promote_types(x_SD.dtype, torch.float32))
    for e in range(weights.num_experts):
        # The output bias is one vector for all slices; it keeps its shape and is left out.
        one = replace(weights, b_out=None).map(lambda t, e=e: t[e].detach().to(x.dtype))  # type: ignore[misc]
        up = F.linear(x, one.w_in, one.b_in)
        h = act(up) if one.w_gate is None else act(up, F.linear(x, one.w_gate, one.b_gate))
        yield h @ one.w_out.mT


def ridge(x_SD: Tensor, target_SE: Tensor, *, penalty: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Return W ``[E, D]`` and b ``[E]`` of least ``Σ‖W x + b − z‖² + λ‖W‖²``, in closed form and float64.

    ``penalty`` is relative: λ = penalty · S · mean variance of x. The bias is not penalised.
    """
    x, z = x_SD.double(), target_SE.double()
    mean_x, mean_z = x.mean(0), z.mean(0)
    x, z = x - mean_x, z - mean_z
    gram = x.mT @ x
    weight = max(float(gram.diagonal().mean()), 1e-30) * penalty
    W = torch.linalg.solve(gram + weight * torch.eye(len(gram), dtype=x.dtype, device=x.device), x.mT @ z).mT
    return W, mean_z - W @ mean_x


def logistic(x_SD: Tensor, target_SE: Tensor, *, penalty: float = 1e-3, iterations: int = 100) -> tuple[Tensor, Tensor]:
    """Return W ``[E, D]`` and b ``[E]`` of least cross-entropy between σ(W x + b) and targets, by L-BFGS.

    Inputs are standardised while fitting, so that ``penalty`` on ‖W‖² means the same for every layer.
    """
    return _classify(x_SD, target_SE, F.binary_cross_entropy_with_logits, penalty, iterations)


def softmax_regression(
    x_SD: Tensor, label_S: Tensor, classes: int, *, penalty: float = 1e-3, iterations: int = 100
) -> tuple[Tensor, Tensor]:
    """Return W ``[E, D]`` and b ``[E]`` of least cross-entropy between softmax(W x + b) and labels, by L-BFGS."""
    target = F.one_hot(label_S, classes).double()
    return _classify(x_SD, target, lambda z, y: F.cross_entropy(z, y), penalty, iterations)


def _classify(
    x_SD: Tensor, target_SE: Tensor, loss: Callable[[Tensor, Tensor], Tensor], penalty: float, iterations: int
) -> tuple[Tensor, Tensor]:
    x, z = x_SD.double(), target_SE.double()
    mean, std = x.mean(0), x.std(0).clamp_min(1e-6)
    x = (x - mean) / std
    W = torch.zeros(z.shape[1], x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    b = torch.zeros(z.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [W, b], max_iter=iterations, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-14
    )

    def measure() -> Tensor:
        optimiser.zero_grad()
        value = loss(F.linear(x, W, b), z) + penalty * W.square().mean()
        torch.autograd.backward(value)
        return value

    with torch.enable_grad():
        optimiser.step(measure)  # type: ignore[no-untyped-call]
    found = W.detach() / std
    return found, b.detach() - found @ mean


def train_scorer(
    scorer: nn.Module,
    x_SD: Tensor,
    target_SE: Tensor,
    seed: int | torch.Generator,
    *,
    loss: Literal["mse", "bce"] = "mse",
    steps: int = 500,
    batch: int = 512,
    rate: float = 1e-2,
) -> float:
    """Fit a scorer to targets by Adam with a linear decay; return the mean loss of the last tenth of the steps.

    Raises:
        InputError: the loss became NaN.
    """
    draws = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    optimiser = torch.optim.Adam(scorer.parameters(), lr=rate)
    measure = F.mse_loss if loss == "mse" else F.binary_cross_entropy_with_logits
    last: list[float] = []
    with torch.enable_grad():
        for step in range(steps):
            index = torch.randint(len(x_SD), (min(batch, len(x_SD)),), generator=draws).to(x_SD.device)
            optimiser.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimiser.zero_grad()
            value = measure(scorer(x_SD[index]), target_SE[index].to(torch.float32))
            torch.autograd.backward(value)
            optimiser.step()
            if step >= steps - max(1, steps // 10):
                last.append(float(value.detach()))
    found = sum(last) / max(1, len(last))
    if found != found:
        raise InputError("train a router", found="a NaN loss", do="lower the rate, or check the calibration data")
    return found


def share_cut(score_SE: Tensor, share: float) -> float:
    """Return the cut above which a fraction ``share`` of all scores lies: midway between two of them, far from both."""
    flat = score_SE.double().flatten().sort().values
    below = len(flat) - round(share * len(flat))
    if below == 0:
        return float(flat[0]) - 1.0
    return float((flat[below - 1] + flat[min(below, len(flat) - 1)]) / 2)


def relative_cut(score_SE: Tensor, share: float) -> float:
    """Return τ for which a fraction ``share`` of the slices scores at least (1 − τ) of the token's best; in [0, 1]."""
    score = score_SE.double().clamp_min(0)
    ratio = 1 - score / score.max(-1, keepdim=True).values.clamp_min(1e-30)
    flat = ratio.flatten().sort().values
    last = min(len(flat), max(1, round(share * len(flat)))) - 1
    return float((flat[last] + flat[min(last + 1, len(flat) - 1)]) / 2)


def equal_loss_shares(scores: list[Tensor], lost: list[Tensor], share: float) -> list[float]:
    """Return the share of slices to run in every bucket of tokens, for one relative loss and a mean share ``share``.

    Left-out slices cost their squared norm, as if they were uncorrelated. A bucket in which few slices carry the output
    gets a small share, so that all buckets lose the same fraction of theirs.

    Args:
        scores: per bucket ``[S_b, E]``, what the selector ranks.
        lost: per bucket ``[S_b, E]``, squared norms of what the slices add.
        share: of all slices, in (0, 1].
    """
    curves = []
    for score, cost in zip(scores, lost, strict=True):
        order = score.double().flatten().sort(descending=True, stable=True).indices
        left = cost.double().flatten()[order].cumsum(0)
        curves.append(1 - left / left[-1].clamp_min(1e-30) if len(left) else left)

    def shares(loss: float) -> list[float]:
        return [float((c > loss).sum() + 1) / len(c) if len(c) else share for c in curves]

    total = sum(len(c) for c in curves)
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        spent = sum(min(1.0, s) * len(c) for s, c in zip(shares(middle), curves, strict=True))
        low, high = (middle, high) if spent > share * total else (low, middle)
    return [min(1.0, s) for s in shares(high)]
