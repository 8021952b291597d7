"""Where the stacked weights of a routed FFN are: what a placement divides, and what every device keeps.

A container of experts may hold further things, each behind another: the constants of left-out slices, experts that
compute nothing, the dense FFN under low-rank deltas. What lies in a stack ``[E, ...]`` is divided; the rest is kept.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from moefx.routing.experts import Experts
from moefx.routing.low_rank import LowRankExperts
from moefx.routing.masks import LinearExperts

# b_out is added once after the experts, on every device.
_HOISTED = "b_out"
_OWN_ONLY = (Experts, LowRankExperts, LinearExperts)


class Stack(NamedTuple):
    """The module with the stacked weights of a layer.

    Args:
        owner: the module whose attribute ``experts`` it is.
        path: its dotted name below the layer.
    """

    owner: nn.Module
    path: str

    @property
    def experts(self) -> Any:
        """The module itself."""
        return self.owner.experts


def stack_of(layer: nn.Module) -> Stack:
    """Return where the stacked weights of a routed FFN are: its experts, or what these wrap."""
    owner, path = layer, "experts"
    while isinstance(inner := getattr(owner.experts, "experts", None), nn.Module) and hasattr(inner, "num_experts"):
        owner, path = owner.experts, f"{path}.experts"  # type: ignore[assignment]
    return Stack(owner, path)


def stacked_parameters(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that have one row per expert, by name; an activation's or a dense FFN's have none."""
    recurse, hoisted = not isinstance(experts, _OWN_ONLY), _HOISTED if isinstance(experts, Experts) else ""
    return {name: p for name, p in experts.named_parameters(recurse=recurse) if name != hoisted}


def expert_count(layer: nn.Module) -> int:
    """Return the number of experts of a routed FFN that have weights of their own; a device may hold only some."""
    return int(stack_of(layer).experts.num_experts)


def row_widths(experts: nn.Module) -> tuple[int, int] | None:
    """Return the numbers that travel to an expert per row, and back; None where they depend on the input."""
    if isinstance(experts, LowRankExperts):
        # One way there serves the maps before the activation, another those after it.
        maps = {name: getattr(experts, f"b_{name}") for name in ("in", "gate", "out")}
        before = [int(b.shape[1]) for name, b in maps.items() if b is not None and name != "out"]
        after = [] if maps["out"] is None else [int(maps["out"].shape[1])]
        hidden, dim = experts.dense.w_in.shape
        return (dim if before else 0) + (hidden if after else 0), sum(before + after)
    if isinstance(experts, LinearExperts):
        return int(experts.weight.shape[2]), int(experts.weight.shape[1])
    if isinstance(experts, Experts):
        return int(experts.w_in.shape[2]), int(experts.w_out.shape[1])
    return None
