"""Experts whose weights come from a slower memory, as a graph has them: begun, ended, given up.

Legend: E experts of a layer, T tokens, K slots per token, P experts that stay on the device, S that are streamed.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from moefx.offloading.layout import stacked
from moefx.offloading.store import Store, Weights
from moefx.routing.experts import Experts

Loaded = tuple[Weights, Any]


class StreamedWeights:
    """The weights of one layer's experts: some on the device, all in a store.

    Args:
        experts: whose parameters are emptied by :meth:`release`.
        index: of the layer in the store.
        pins: experts that stay, ascending.
        store: where all of them lie.
        device: where to compute.
        loader: does the copying, one layer after another.
    """

    def __init__(
        self,
        experts: Experts,
        index: int,
        pins: tuple[int, ...],
        store: Store,
        device: torch.device,
        loader: ThreadPoolExecutor,
    ) -> None:
        self.experts, self.index, self.store, self.device, self.loader = experts, index, store, device, loader
        self.streamed = tuple(e for e in range(experts.num_experts) if e not in set(pins))
        self.pinned = {name: t.detach()[list(pins)].to(device) for name, t in stacked(experts).items()}
        self.held = 0
        self._copies = None if device.type == "cpu" else torch.Stream(device=device)

    def __repr__(self) -> str:
        return f"layer {self.index}"

    @property
    def bytes(self) -> int:
        """Of the streamed experts."""
        return sum(t[0].nbytes for t in self.store.layers[self.index].values()) * len(self.streamed)

    def release(self) -> None:
        """Let go of the parameters on the device."""
        for parameter in stacked(self.experts).values():
            parameter.data = parameter.data.new_empty(0)

    def restore(self) -> None:
        """Bring all parameters back onto the device."""
        for name, parameter in stacked(self.experts).items():
            parameter.data = self.store.layers[self.index][name].to(self.device, copy=True)

    def load(self) -> Loaded:
        """Copy the streamed experts into memory of their own."""
        stream: AbstractContextManager[Any] = nullcontext() if self._copies is None else self._copies
        with stream:
            made: Weights = {}
            for name, whole in self.store.layers[self.index].items():
                made[name] = torch.empty((len(self.streamed), *whole.shape[1:]), dtype=whole.dtype, device=self.device)
            for i, expert in enumerate(self.streamed):
                self.store.read(self.index, expert, {name: t[i] for name, t in made.items()})
            return made, None if self._copies is None else self._copies.record_event()


def begin_load(weights: StreamedWeights, after: object) -> Future[Loaded]:
    """Begin to copy the streamed experts of a layer; ``after`` is what had to be given up for their room."""
    weights.held += 1
    return weights.loader.submit(weights.load)


def end_load(weights: StreamedWeights, loading: Future[Loaded]) -> Weights:
    """Wait for that, and return the stacked weights by name."""
    made, copied = loading.result()
    if copied is not None:
        torch.accelerator.current_stream(weights.device).wait_event(copied)
        for tensor in made.values():
            tensor.record_stream(torch.accelerator.current_stream(weights.device))
    return made


def evict(loaded: Weights, weights: StreamedWeights, after: object) -> None:
    """Give up the streamed experts of a layer; ``after`` is what they made."""
    weights.held -= 1
    loaded.clear()


def some_of(experts_TK: Tensor, place_E: Tensor) -> Tensor:
    """Return the place of each chosen expert among some experts, -1 for the others."""
    known = (experts_TK >= 0) & (experts_TK < len(place_E))
    return torch.where(known, place_E[experts_TK.clamp(0, len(place_E) - 1)], -1)


def places(experts: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Return the place of each of ``count`` experts in a list of some, -1 for those that are not in it."""
    found = torch.full((count,), -1, dtype=torch.int64)
    found[list(experts)] = torch.arange(len(experts))
    return found.to(device)


def stacked_module(model: nn.Module, path: str) -> Experts:
    """Return the experts' module at a path."""
    found = model.get_submodule(path)
    assert type(found) is Experts, path
    return found
