"""Routed layers written out token by token, without moefx's code: what the routing tests compare with."""

import torch
from torch import Tensor


def gates(logits: Tensor, mode: str, k: int, u: Tensor | None = None) -> tuple[list[int], list[Tensor]]:
    """Return (experts, gates) of one token's logits [E], straight from the formulas."""
    ranked = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))
    chosen = ranked[:k]
    exps = [(logits[e] - logits.max()).exp() for e in range(len(logits))]
    p = [value / sum(exps) for value in exps]
    sigmoid = [1 / (1 + (-logits[e]).exp()) for e in range(len(logits))]
    mass = sum(exps[e] for e in chosen)
    sigmoid_mass = sum(sigmoid[e] for e in chosen)
    table = {
        "topk_softmax": lambda e: exps[e] / mass,
        "softmax_topk_renorm": lambda e: p[e] / sum(p[i] for i in chosen),
        "softmax_topk": lambda e: p[e],
        "sigmoid_topk_renorm": lambda e: sigmoid[e] / sigmoid_mass,
        "sigmoid_topk": lambda e: sigmoid[e],
        "unit": lambda e: torch.ones_like(p[e]),
        "soft": lambda e: p[e],
        "one_plus_su": lambda e: 1 + p[e] * u[e],
        "ste": lambda e: torch.ones_like(p[e]),
        "sigmoid_ste": lambda e: torch.ones_like(p[e]),
        "identity": lambda e: logits[e],
        "one_plus_tanh": lambda e: 1.2 - 0.4 / ((2 * logits[e]).exp() + 1),
    }
    return chosen, [table[mode](e) for e in chosen]


def ffn(weights, act, x: Tensor, expert: int | None = None) -> Tensor:
    """One FFN applied to one token, without its output bias."""

    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor if expert is None else tensor[expert]

    up = part(weights.w_in) @ x + (0 if weights.b_in is None else part(weights.b_in))
    if weights.w_gate is None:
        return part(weights.w_out) @ act(up)
    gate = part(weights.w_gate) @ x + (0 if weights.b_gate is None else part(weights.b_gate))
    return part(weights.w_out) @ act(up, gate)


def dense(weights, act, x: Tensor) -> Tensor:
    """The dense FFN with its bias, token by token, any leading shape."""
    tokens = [
        ffn(weights, act, token) + (0 if weights.b_out is None else weights.b_out)
        for token in x.reshape(-1, x.shape[-1])
    ]
    return torch.stack(tokens).reshape(*x.shape[:-1], -1)


def routed(weights, act, x: Tensor, logits: Tensor, mode: str, k: int, scale: float = 1.0) -> Tensor:
    """The routed FFN, token by token; ``logits`` [..., E] has the leading shape of ``x``."""
    rows = []
    for token, row in zip(x.reshape(-1, x.shape[-1]), logits.reshape(-1, logits.shape[-1]), strict=True):
        chosen, values = gates(row, mode, k, torch.zeros_like(row))
        y = sum(scale * g * ffn(weights, act, token, e) for e, g in zip(chosen, values, strict=True))
        rows.append(y + (0 if weights.b_out is None else weights.b_out))
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()
