"""Routing that is known beforehand: what is left of a routed layer when its choice is one for all tokens.

A layer whose router reads the timestep alone makes the same choice for every token and every sample of a sampler step.
Then there is nothing to sort and nothing to gather: the chosen experts are one dense FFN.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moefx.errors import OptionError
from moefx.routing.experts import Experts
from moefx.routing.weights import FFNWeights


@runtime_checkable
class Foldable(Protocol):
    """A module that some of its arguments decide: given their values, a static module does its work.

    Attributes:
        deciding: positions of the arguments that decide; the layer can be folded where they depend on the timestep
            alone.
    """

    deciding: tuple[int, ...]

    def fold(self, values: tuple[Tensor, ...], shared: dict[Hashable, Any]) -> tuple[Hashable, nn.Module]:
        """Return the choice, and a module that maps the first argument to what this one returns under that choice.

        Args:
            values: of the deciding arguments, for one sample, ``[1, ...]``.
            shared: what the static modules of this layer share, such as weights; the layer may add to it.
        """


def reads_tokens(router: object) -> bool:
    """Whether a router scores by the tokens themselves: by its ``reads``, and without them assumed."""
    return "token" in getattr(router, "reads", ("token",))


Pairs = tuple[tuple[int, float], ...]


def chosen_pairs(chosen: Tensor, gates: Tensor, count: int) -> Pairs:
    """Return the (expert, gate) of slots ``[K]`` that hold one of ``count`` experts, by expert."""
    slots = zip(chosen.tolist(), gates.tolist(), strict=True)
    return tuple(sorted((int(e), float(g)) for e, g in slots if 0 <= e < count))


class FusedWeights(nn.Module):
    """The matrices of a static FFN, which several may share."""

    w_in: Tensor
    b_in: Tensor | None
    w_gate: Tensor | None
    b_gate: Tensor | None
    w_out: Tensor
    b_out: Tensor | None

    def __init__(self, weights: FFNWeights) -> None:
        super().__init__()
        for name in ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out"):
            value = getattr(weights, name)
            self.register_buffer(name, None if value is None else value.detach(), persistent=False)


class FusedFFN(nn.Module):
    """Chosen experts as one FFN: ``y = W_out (g ⊙ act(W_in x + b_in)) + b_out``, g repeated over each expert's units.

    Args:
        weights: of the fused network; ``w_in`` ``[K·m, D]``. Several FusedFFNs may share one module.
        gates: ``[K]``; None where every gate is 1.
        act: pointwise, ``act(up)`` or ``act(up, gate)``.
    """

    scale: Tensor | None

    def __init__(self, weights: FusedWeights, gates: Tensor | None, act: Callable[..., Any]) -> None:
        super().__init__()
        self.weights, self.act = weights, act
        scale = None if gates is None else gates.repeat_interleave(weights.w_in.shape[0] // gates.shape[0])
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D_o]``."""
        w = self.weights
        up = F.linear(x, w.w_in, w.b_in)
        h = self.act(up) if w.w_gate is None else self.act(up, F.linear(x, w.w_gate, w.b_gate))
        if self.scale is not None:
            h = (h * self.scale).to(h.dtype)
        y: Tensor = F.linear(h, w.w_out, w.b_out)
        return y


def _side_by_side(experts: Experts, chosen: tuple[int, ...]) -> FFNWeights:
    """Return the matrices of K experts beside each other: views of the stacked ones for K = 1, else copies."""
    rows = {
        name: None if (stacked := getattr(experts, name)) is None else _beside(stacked, chosen, 0)
        for name in ("w_in", "b_in", "w_gate", "b_gate")
    }
    return FFNWeights(**rows, w_out=_beside(experts.w_out, chosen, 1), b_out=experts.b_out)  # type: ignore[arg-type]


def _beside(stacked: Tensor, chosen: tuple[int, ...], dim: int) -> Tensor:
    parts = [stacked.detach()[e] for e in chosen] or [stacked.detach()[0].narrow(dim, 0, 0)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=dim)


def fuse(experts: Experts, chosen: Tensor, gates: Tensor, shared: dict[Hashable, Any]) -> tuple[Hashable, FusedFFN]:
    """Return (choice, static FFN) for expert indices and gates ``[K]``; indices outside [0, E) contribute nothing.

    Weights are made once per set of experts and kept in ``shared``; gates belong to each static FFN.
    """
    pairs = chosen_pairs(chosen, gates, experts.num_experts)
    names = tuple(e for e, _ in pairs)
    if names not in shared:
        shared[names] = FusedWeights(_side_by_side(experts, names))
    plain = all(g == 1.0 for _, g in pairs)
    values = None if plain else torch.tensor([g for _, g in pairs], dtype=gates.dtype, device=gates.device)
    return pairs, FusedFFN(shared[names], values, experts.act)


def folds(experts: object) -> bool:
    """Whether experts become one static module when their choice is known."""
    return isinstance(experts, Experts) or hasattr(experts, "fold")


def fold_experts(
    experts: Any, chosen: Tensor, gates: Tensor, shared: dict[Hashable, Any]
) -> tuple[Hashable, nn.Module]:
    """Return (choice, static module) for expert indices and gates ``[K]``, as the experts' own kind does it.

    Raises:
        OptionError: it does not.
    """
    if not folds(experts):
        raise OptionError("fold experts", found=type(experts).__name__, do="give their class a fold")
    if isinstance(experts, Experts):
        return fuse(experts, chosen, gates, shared)
    made: tuple[Hashable, nn.Module] = experts.fold(chosen, gates, shared)
    return made


class Sum(nn.Module):
    """A static FFN beside a shared one: ``y = static(x) + s · shared(x)``."""

    def __init__(self, static: nn.Module, shared: nn.Module, scale: float) -> None:
        super().__init__()
        self.static, self.shared, self.scale = static, shared, scale

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., D]`` to ``[..., D_o]``."""
        shared: Tensor = self.shared(x)
        y: Tensor = self.static(x) + (shared if self.scale == 1.0 else shared * self.scale)
        return y


class FirstArgument(nn.Module):
    """Stand where a routed layer stood: called with what it read to choose (``taps``), hand on the tokens."""

    def __init__(self, static: nn.Module, taps: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.static, self.taps = static, taps

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """Return ``static(x)``."""
        y: Tensor = self.static(x)
        return y


class Constant(nn.Module):
    """A tensor, whatever it is called with, in the dtype of the first argument."""

    value: Tensor
    same_arguments = True

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value.detach(), persistent=False)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """Return the tensor."""
        return self.value.to(x.dtype)


class ConstantGates(nn.Module):
    """Gates that are the same for every token: ``[1, 1, H]``, whatever it is called with."""

    values: Tensor

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("values", values.detach().reshape(-1), persistent=False)

    def forward(self, *_: Any) -> Tensor:
        """Return the gates."""
        return self.values.view(1, 1, -1)

    def on(self) -> tuple[int, ...]:
        """Return the positions of the gates that are not zero."""
        return tuple(torch.nonzero(self.values).flatten().tolist())

    def only(self, chosen: tuple[int, ...]) -> ConstantGates:
        """Return some of the gates."""
        return ConstantGates(self.values[list(chosen)])
