"""Collect a routing trace from runs of a routed model.

Legend: L routed layers, E experts of a layer, T tokens, K experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moefx.errors import InputError, NothingMatched
from moefx.passes.placement.trace import RoutingTrace
from moefx.routing.moe import RoutedFFN


def routed_layers(model: nn.Module) -> dict[str, RoutedFFN]:
    """Return the routed FFNs of ``model`` by dotted name, in order.

    Raises:
        NothingMatched: there are none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RoutedFFN)}
    if not layers:
        raise NothingMatched(
            f"place the experts of {type(model).__name__}",
            found="it has no routed FFN",
            do="call moefx.transform(model) first",
        )
    return layers


class TraceCollector:
    """Count which experts are chosen, by noise level, while a model runs.

    ::

        with TraceCollector(model) as collector:
            for sigma in sigmas:
                with collector.at(sigma):
                    model(x, sigma)
        trace = collector.trace()

    Runs outside ``at`` are not counted. Several runs at one sigma add up. Counting does not wait for the device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = routed_layers(model)
        self._counts: dict[float, dict[str, Tensor]] = {}
        self._sigma: float | None = None
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> TraceCollector:
        for name, layer in self._layers.items():
            self._hooks.append(layer.experts.register_forward_pre_hook(self._counter(name)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def at(self, sigma: float) -> Iterator[None]:
        """Count the runs in this context as runs at noise level ``sigma``."""
        before, self._sigma = self._sigma, float(sigma)
        try:
            yield
        finally:
            self._sigma = before

    def trace(self) -> RoutingTrace:
        """Return what was counted.

        Raises:
            InputError: nothing was.
        """
        if not self._counts:
            raise InputError("collect a routing trace", found="no run", do="run the model inside collector.at(sigma)")
        experts = tuple(layer.experts.num_experts for layer in self._layers.values())
        sigmas = sorted(self._counts, reverse=True)
        load = np.zeros((len(sigmas), len(experts), max(experts)))
        for s, sigma in enumerate(sigmas):
            for i, name in enumerate(self._layers):
                if name in self._counts[sigma]:
                    load[s, i, : experts[i]] = self._counts[sigma][name][:-1].cpu().numpy()
        return RoutingTrace(np.array(sigmas), tuple(self._layers), experts, load)

    def _counter(self, name: str) -> Any:
        def count(experts: nn.Module, args: tuple[Any, ...]) -> None:
            if self._sigma is None:
                return
            chosen_TK, total = args[1], self._layers[name].experts.num_experts
            flat = chosen_TK.detach().reshape(-1)
            flat = torch.where((flat >= 0) & (flat < total), flat, total)  # the last count is of dropped slots
            counts = self._counts.setdefault(self._sigma, {})
            if name not in counts:
                counts[name] = torch.zeros(total + 1, dtype=torch.int64, device=flat.device)
            counts[name].scatter_add_(0, flat, torch.ones_like(flat))

        return count
