"""Collect a routing trace from runs of a routed model.

Legend: L routed layers, E experts of a layer, T tokens, K experts per token, P bins of positions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moefx.errors import InputError, NothingMatched, OptionError
from moefx.passes.placement.count import POSITION_BINS
from moefx.passes.placement.stacks import expert_count
from moefx.passes.placement.trace import Array, RoutingTrace
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

    Runs outside ``at`` are not counted. Several runs at one sigma add up. Choices are compared with those of the
    ``at`` before if its sigma was higher, as in a sampler's loop. Counting does not wait for the device, and what is
    kept does not grow with the number of runs.

    Args:
        model: a model with routed FFNs.
        branches: 2 if the halves of each call's batch are the same samples under both guidance conditions.
    """

    def __init__(self, model: nn.Module, *, branches: int = 1) -> None:
        if branches not in (1, 2):
            raise OptionError("collect a routing trace", found=f"branches = {branches}", do="use 1 or 2")
        self._layers = routed_layers(model)
        self._experts = tuple(expert_count(layer) for layer in self._layers.values())
        self._branches = branches
        self._by_level: dict[tuple[str, int], dict[float, Tensor]] = {}
        self._in_all: dict[tuple[str, int], Tensor] = {}
        self._sigma: float | None = None
        self._hooks: list[RemovableHandle] = []
        self._shape: tuple[int, ...] = ()
        self._before: tuple[int, Tensor] | None = None
        self._calls: Counter[int] = Counter()
        self._step: dict[tuple[int, int], Tensor] = {}
        self._last_step: dict[tuple[int, int], Tensor] = {}
        self._last_sigma = -math.inf

    def __enter__(self) -> TraceCollector:
        for index, layer in enumerate(self._layers.values()):
            self._hooks.append(layer.register_forward_pre_hook(self._look))
            self._hooks.append(layer.experts.register_forward_pre_hook(self._counter(index)))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def at(self, sigma: float) -> Iterator[None]:
        """Count the runs in this context as runs at noise level ``sigma``."""
        before, self._sigma = self._sigma, float(sigma)
        self._calls.clear()
        self._before, self._step = None, {}
        if self._sigma >= self._last_sigma:
            self._last_step = {}
        try:
            yield
        finally:
            self._last_step, self._last_sigma = self._step, self._sigma
            self._sigma = before

    def trace(self) -> RoutingTrace:
        """Return what was counted.

        Raises:
            InputError: nothing was.
        """
        sigmas = sorted({sigma for counts in self._by_level.values() for sigma in counts}, reverse=True)
        if not sigmas:
            raise InputError("collect a routing trace", found="no run", do="run the model inside collector.at(sigma)")
        depth, most = len(self._experts), max(self._experts)
        return RoutingTrace(
            np.array(sigmas),
            tuple(self._layers),
            self._experts,
            self._levels("load", sigmas, most),
            affinity=self._tables("affinity", (depth - 1, most, most)),
            coactivation=self._tables("coactivation", (depth, most, most)),
            persistence=self._levels("persistence", sigmas, 2),
            overlap=self._levels("overlap", sigmas, 2) if self._branches == 2 else None,
            position=self._tables("position", (depth, POSITION_BINS, most)),
        )

    def _levels(self, name: str, sigmas: list[float], width: int) -> Array:
        table = np.zeros((len(sigmas), len(self._experts), width))
        for (kind, index), counts in self._by_level.items():
            for s, sigma in enumerate(sigmas):
                if kind == name and sigma in counts:
                    found = counts[sigma].cpu().numpy()
                    table[s, index, : len(found)] = found
        return table

    def _tables(self, name: str, shape: tuple[int, int, int]) -> Array:
        table = np.zeros(shape)
        for (kind, index), counts in self._in_all.items():
            if kind == name:
                table[index, : counts.shape[0], : counts.shape[1]] = counts.cpu().numpy()
        return table

    def _look(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember how tokens make up samples: the experts see them in one row."""
        self._shape = tuple(args[0].shape) if args else ()

    def _counter(self, index: int) -> Any:
        def count(experts: nn.Module, args: tuple[Any, ...]) -> None:
            if self._sigma is not None:
                self._count(index, args[1].detach())

        return count

    def _count(self, index: int, chosen_TK: Tensor) -> None:
        total = self._experts[index]
        # The last number is that of slots without an expert: counted, then left out.
        chosen_TK = torch.where((chosen_TK >= 0) & (chosen_TK < total), chosen_TK, total)
        self._add_level("load", index, _counts(chosen_TK, total + 1)[:-1])
        pairs = _joint(chosen_TK, chosen_TK, total, total)
        self._add("coactivation", index, pairs.fill_diagonal_(0))
        if self._before is not None and self._before[0] == index - 1 and len(self._before[1]) == len(chosen_TK):
            flows = _joint(self._before[1], chosen_TK, self._experts[index - 1], total)
            self._add("affinity", index - 1, flows / chosen_TK.shape[1])
        self._before = (index, chosen_TK)
        self._compare(index, chosen_TK, total)
        if len(self._shape) > 2:
            self._add("position", index, self._positions(chosen_TK, total))

    def _compare(self, index: int, chosen_TK: Tensor, total: int) -> None:
        """Compare the choices with the level before, and those of the two guidance branches."""
        key = (index, self._calls[index])
        self._calls[index] += 1
        self._step[key] = chosen_TK
        last = self._last_step.get(key)
        if last is not None and last.shape == chosen_TK.shape:
            self._add_level("persistence", index, _shared(chosen_TK, last, total))
        if self._branches == 2 and len(chosen_TK) % 2 == 0:
            first, second = chosen_TK.chunk(2)
            self._add_level("overlap", index, _shared(first, second, total))

    def _positions(self, chosen_TK: Tensor, total: int) -> Tensor:
        tokens = math.prod(self._shape[1:-1])
        number_T = torch.arange(len(chosen_TK), device=chosen_TK.device) % tokens
        cell = (number_T * POSITION_BINS // tokens).unsqueeze(1) * (total + 1) + chosen_TK
        return _counts(cell, POSITION_BINS * (total + 1)).view(POSITION_BINS, total + 1)[:, :-1]

    def _add_level(self, name: str, index: int, counts: Tensor) -> None:
        assert self._sigma is not None
        levels = self._by_level.setdefault((name, index), {})
        levels[self._sigma] = levels[self._sigma] + counts if self._sigma in levels else counts

    def _add(self, name: str, index: int, counts: Tensor) -> None:
        known = self._in_all.get((name, index))
        self._in_all[name, index] = counts if known is None else known + counts


def _counts(numbers: Tensor, total: int) -> Tensor:
    """Return how often each number in [0, total) occurs; ``bincount`` would wait for the device."""
    flat = numbers.reshape(-1)
    return torch.zeros(total, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def _joint(a_TK: Tensor, b_TK: Tensor, first: int, second: int) -> Tensor:
    """Return how many tokens chose each pair, ``[first, second]``."""
    cell = a_TK.unsqueeze(2) * (second + 1) + b_TK.unsqueeze(1)
    return _counts(cell, (first + 1) * (second + 1)).view(first + 1, second + 1)[:-1, :-1].contiguous()


def _shared(now_TK: Tensor, other_TK: Tensor, total: int) -> Tensor:
    """Return the slots of ``now`` whose expert is among ``other``'s, and the slots compared, ``[2]``."""
    real_TK = now_TK < total
    same_TK = (now_TK.unsqueeze(2) == other_TK.unsqueeze(1)).any(dim=2) & real_TK
    return torch.stack([same_TK.sum(), real_TK.sum()])
