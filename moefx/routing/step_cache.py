"""A cache over sampler steps: a sub-layer whose output hardly changes gives what it gave before.

HarmoniCa, arXiv 2410.01723. The state is explicit: nothing is cached until a `StepCaches` says which step it is, and it
clears what it kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moefx.errors import InputError, OptionError
from moefx.routing.precision import KeepFloat32


class StepCache(KeepFloat32):
    """Run a sub-layer, or return what it returned at an earlier step of the same sampling run::

        w = sigmoid(table[step]),   g = 1[w > threshold] + w − stopgrad(w)
        y = g · fresh + (1 − g) · cached,   and the cache becomes fresh where w > threshold

    In evaluation the sub-layer is not run at all where w ≤ threshold; which steps these are is read from the table once
    per sampling run. In training both sides are computed, so that the table learns. Step 0 always runs.

    Args:
        steps: sampler steps, the length of the table.
        period: at the start every ``period``-th step is on; 1 is the dense model.
        threshold: on w.
        start: logit of the steps that are on, minus that of those that are off.
        device: as for any module.
    """

    # It runs the sub-layer that it is given, so a trace must go through it.
    calls_back = True

    def __init__(
        self,
        steps: int,
        *,
        period: int = 1,
        threshold: float = 0.1,
        start: float = 5.0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if steps < 1 or period < 1 or not 0 < threshold < 1:
            raise OptionError(
                f"cache {steps} steps, every {period}., threshold {threshold}",
                found="out of range",
                do="steps >= 1, period >= 1, 0 < threshold < 1",
            )
        self.steps, self.threshold = steps, threshold
        on = torch.arange(steps) % period == 0
        self.table = nn.Parameter(torch.where(on, start, -start).to(torch.float32).to(device))
        self.step: int | None = None
        self.branch = ""
        # What forward reads of the step, in forms that a compiled graph serves at every step.
        self._caching, self._due, self._index = False, True, torch.zeros((), dtype=torch.int64)
        self._kept: dict[str, Any] = {}
        self._runs: list[bool] = []

    def at(self, step: int | None, branch: str = "") -> None:
        """Say which step the next call is; None for none, where nothing is cached."""
        self.step, self.branch, self._caching = step, branch, step is not None
        if step == 0:
            self._kept.pop(branch, None)
        if step is not None:
            self._due = self._runs[step]
            self._index = torch.full((), step, dtype=torch.int64, device=self.table.device)

    def forward(self, compute: Callable[[], Any]) -> Any:
        """Return what ``compute()`` returns now, or returned before."""
        if not self._caching:
            return compute()
        forced = self.branch not in self._kept
        runs = forced or self._due
        learns = self.training and torch.is_grad_enabled() and self.table.requires_grad
        if not learns and not runs:
            return self._kept[self.branch]
        fresh = compute()
        if forced or not learns:
            self._kept[self.branch] = fresh
            return fresh
        cached = self._kept[self.branch]
        if runs:
            self._kept[self.branch] = fresh
        w = torch.sigmoid(self.table.index_select(0, self._index.view(1)).squeeze(0))
        g = float(runs) + (w - w.detach())
        return pytree.tree_map(lambda new, old: new * g.to(new.dtype) + old * (1 - g).to(old.dtype), fresh, cached)

    def clear(self) -> None:
        """Forget what was kept, and read the table."""
        self.at(None)
        self._kept = {}
        self._runs = (torch.sigmoid(self.table.detach()) > self.threshold).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"step": None, "_caching": False, "_kept": {}}

    def extra_repr(self) -> str:
        """Describe the cache in ``print(model)``."""
        return f"steps={self.steps}, threshold={self.threshold}"


class StepCaches:
    """All step caches of a model, told together which step of which run it is::

        with StepCaches(model) as caches:
            for i, t in enumerate(scheduler.timesteps):
                caches.step(i)
                noise = model(latents, t, ...)

    Where a step calls the model several times, as for guidance in two calls, each kind of call has a ``branch`` of its
    own: ``caches.step(i, "negative")``. Outside the block the model is the dense one.

    Raises:
        InputError: the model has no step cache.
    """

    def __init__(self, model: nn.Module) -> None:
        self.caches = [module for module in model.modules() if isinstance(module, StepCache)]
        if not self.caches:
            raise InputError(
                "cache over steps", found="no step cache", do="transform the model with recipe 'harmonica'"
            )

    def step(self, index: int, branch: str = "") -> None:
        """Say that the next call is step ``index`` of the run, counted from 0.

        Raises:
            InputError: the tables have no such step.
        """
        steps = min(cache.steps for cache in self.caches)
        if not 0 <= index < steps:
            raise InputError(f"run step {index}", found=f"tables of {steps} steps", do="transform with steps=…")
        for cache in self.caches:
            cache.at(index, branch)

    def clear(self) -> None:
        """Begin a run: forget what was kept, and read the tables again."""
        for cache in self.caches:
            cache.clear()

    def cost(self) -> Tensor:
        """Return ``Σ w`` over sub-layers and steps, which training keeps small (times 7·10⁻⁸ in the paper)."""
        return torch.stack([torch.sigmoid(cache.table).sum() for cache in self.caches]).sum()

    def __enter__(self) -> Self:
        self.clear()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
