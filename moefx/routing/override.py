"""Another choice for a while: fewer experts, certain ranks, certain experts, without building another model.

Uses: a weak prediction from the same model by its second-best experts (SCMoE, arXiv 2405.14507), the effect of one
expert, a cheaper setting for some sampler steps.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from moefx.errors import InputError, OptionError
from moefx.routing.moe import RoutedFFN
from moefx.routing.selectors import Selector, TopK


class Overridden(Selector):
    """A selector that sees some experts only, and of the best only certain ranks.

    What is asked for lives in buffers, so that a compiled model which has met one override does not compile again for
    the next.

    Args:
        selector: the one it stands for.
        num_experts: N.
        width: slots per token where ranks are chosen; 0 leaves the ranks to ``selector``.
        device: of the scores.
    """

    allowed: Tensor
    ranks: Tensor

    def __init__(self, selector: Selector, num_experts: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.selector, self.width = selector, width
        self.by_expert, self.partial = selector.by_expert, True
        self.batch_invariant, self.taps = selector.batch_invariant, selector.taps
        self.register_buffer("allowed", torch.ones(num_experts, dtype=torch.bool, device=device), persistent=False)
        self.register_buffer("ranks", torch.arange(width, device=device), persistent=False)

    def slots(self, num_experts: int) -> int:
        """Return the slots per token."""
        return self.width or self.selector.slots(num_experts)

    def ask(self, ranks: Sequence[int] | None, allowed: Collection[int] | None) -> None:
        """Set what is chosen: 0-based ranks among the allowed experts, and the allowed experts."""
        if ranks is not None:
            wanted = [*ranks, *[-1] * (self.width - len(ranks))]
            self.ranks.copy_(torch.tensor(wanted))
        self.allowed.fill_(allowed is None)
        if allowed is not None:
            self.allowed[torch.tensor(sorted(allowed))] = True

    def forward(self, scores: Tensor, x: Tensor, *taps: Tensor) -> Tensor:
        """Choose as the selector would, among the allowed experts; empty slots where nothing is left."""
        scores = scores.masked_fill(~self.allowed, float("-inf"))
        if not self.width:
            chosen: Tensor = self.selector(scores, x, *taps)
            return chosen
        values, ranked = scores.sort(dim=-1, descending=True, stable=True)
        slots = self.ranks.clamp(min=0).expand(*scores.shape[:-1], self.width)
        empty = (self.ranks < 0) | (values.gather(-1, slots) == float("-inf"))
        return torch.where(empty, scores.shape[-1], ranked.gather(-1, slots))


@contextmanager
def override(
    model: nn.Module,
    *,
    top_k: int | None = None,
    ranks: Sequence[int] | None = None,
    experts: Collection[int] | None = None,
    layers: Collection[str] | None = None,
) -> Iterator[list[str]]:
    """Let routed layers choose otherwise inside the block; yield the names of the layers it applies to.

    Gates are normalised over what is chosen. Nested blocks replace each other layer by layer.

    Args:
        model: a transformed model, or one with `RoutedFFN` layers.
        top_k: experts (or tied groups) per token instead of the layer's own.
        ranks: take these ranks, 0 the best: ``[1]`` is the runner-up alone.
        experts: choose among these experts (or groups) only.
        layers: names of the layers; None for all.

    Raises:
        OptionError: nothing is asked for, or ranks of a selector that has none.
        InputError: no such layer, or an expert or rank that a layer does not have.
    """
    if top_k is not None and ranks is not None:
        raise OptionError("override the routing", found=f"top_k={top_k} and ranks={ranks}", do="give one of them")
    wanted = list(range(top_k)) if top_k is not None else None if ranks is None else list(ranks)
    if (wanted is None or not wanted) and experts is None:
        raise OptionError("override the routing", found="nothing to override", do="give top_k, ranks or experts")
    chosen = _layers(model, layers)
    replacements = [(layer, _replacement(name, layer, wanted, experts)) for name, layer in chosen.items()]
    before = [layer.selector for layer, _ in replacements]
    try:
        for layer, replacement in replacements:
            replacement.ask(wanted, experts)
            layer.selector = replacement
        yield list(chosen)
    finally:
        for (layer, _), selector in zip(replacements, before, strict=True):
            layer.selector = selector


def _layers(model: nn.Module, wanted: Collection[str] | None) -> dict[str, RoutedFFN]:
    found = {name: module for name, module in model.named_modules() if isinstance(module, RoutedFFN)}
    unknown = sorted(set(wanted or ()) - set(found))
    if not found or unknown:
        raise InputError(
            "override the routing",
            found=f"no routed layer {unknown[0]!r}" if unknown else "no routed layer",
            do=f"choose among {', '.join(found)}" if found else "transform the model first",
        )
    return {name: layer for name, layer in found.items() if wanted is None or name in wanted}


def _replacement(
    name: str, layer: RoutedFFN, ranks: Sequence[int] | None, experts: Collection[int] | None
) -> Overridden:
    """Return the layer's selector for overrides, kept on the layer so that a compiled model knows it."""
    plain = layer.selector.selector if isinstance(layer.selector, Overridden) else layer.selector
    total = layer.num_groups
    if ranks is not None and type(plain) is not TopK:
        raise OptionError(
            f"override the ranks of {name!r}",
            found=f"its selector is {type(plain).__name__}",
            do="give experts=, or use a layer that selects its top k",
        )
    bad = [i for i in (*(ranks or ()), *(experts or ())) if not 0 <= i < total]
    if bad or (experts is not None and not experts):
        found = f"index {bad[0]} of {total}" if bad else "no expert allowed"
        raise InputError(f"override the routing of {name!r}", found=found, do=f"use 0 to {total - 1}")
    width = 0 if ranks is None else max(len(ranks), plain.slots(total))
    kept: dict[int, Overridden] = layer.__dict__.setdefault("_overrides", {})
    device = next(layer.experts.parameters()).device
    if width not in kept:
        kept[width] = Overridden(plain, total, width, device)
    return kept[width].train(layer.training).to(device)
