"""A routed model for a fixed list of timesteps: a static model per distinct choice, and the routed one for the rest."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from moefx.errors import GuardError, InputError, nearest
from moefx.graph.signature import CallSpec


class Promise:
    """Inputs that were promised to stay what they were; checked at every call."""

    def __init__(self, spec: CallSpec, names: Sequence[str]) -> None:
        known = [tensor.name for tensor in spec.tensors]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InputError(f"fix the input {unknown[0]!r}", found="no such tensor", do=nearest(unknown[0], known))
        self.spec = spec
        self.rows = {known.index(name): one_sample(spec.examples[known.index(name)]) for name in names}

    def kept(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call passes the promised values, for every sample."""
        if not self.rows:
            return True
        try:
            values = self.spec.tensors_of(args, kwargs)
        except GuardError:
            return False
        return all(bool((values[i].cpu() == row.cpu()).all()) for i, row in self.rows.items())


class Specialised(nn.Module):
    """A routed model for a fixed list of timesteps; called like the model.

    The variant is looked up by the timestep argument: free on the CPU, a wait for the device if it lives elsewhere,
    which :meth:`at` avoids. Another timestep, or a batch with several, runs the routed model itself: slower, never
    wrong, and counted in ``fallbacks``. Attributes that it lacks are the routed model's (``config``, ``dtype``).

    Attributes:
        routed: the model it was made from, as it was.
        variants: the static models; weights that are not sliced or fused are the routed model's own.
        variant_of: which variant serves a timestep.
        left: routed modules that stay routed, and why.
        fallbacks: calls that the routed model had to serve.
    """

    def __init__(
        self,
        routed: nn.Module,
        variants: Sequence[nn.Module],
        variant_of: dict[float, int],
        left: dict[str, str],
        name: str,
        promise: Promise,
    ) -> None:
        super().__init__()
        self.routed, self.variants = routed, nn.ModuleList(variants)
        self.variant_of, self.left, self.fallbacks = dict(variant_of), dict(left), 0
        self._argument, self._promise = name, promise
        self._position = _position(routed, name)
        self._fixed: int | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the variant of this call's timestep."""
        index = self._fixed if self._fixed is not None else self._index(args, kwargs)
        return (self.routed if index is None else self.variants[index])(*args, **kwargs)

    @contextmanager
    def at(self, timestep: float) -> Iterator[Specialised]:
        """Run the variant of ``timestep`` inside the block, without looking at the argument.

        Raises:
            InputError: the model was not specialised for it.
        """
        timestep = rounded(timestep)
        if timestep not in self.variant_of:
            known = ", ".join(f"{t:g}" for t in self.variant_of)
            raise InputError(f"run at timestep {timestep:g}", found=f"variants for {known}", do="specialise for it")
        before, self._fixed = self._fixed, self.variant_of[timestep]
        try:
            yield self
        finally:
            self._fixed = before

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile every variant and the routed model, with the arguments of ``torch.compile``."""
        for model in (*self.variants, self.routed):
            model.compile(*args, **kwargs)

    def _index(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
        value = kwargs[self._argument] if self._argument in kwargs else args[self._position]
        times = set(value.flatten().tolist()) if isinstance(value, Tensor) else {value}
        found = self.variant_of.get(rounded(times.pop())) if len(times) == 1 else None
        found = found if self._promise.kept(args, kwargs) else None
        self.fallbacks += found is None
        return found

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("routed"), name)

    def extra_repr(self) -> str:
        """Describe the model in ``print``."""
        return f"{len(self.variant_of)} timesteps, {len(self.variants)} variants, {len(self.left)} modules stay routed"


def rounded(timestep: float) -> float:
    """Return the float32 nearest to a timestep: a list of Python numbers and the tensor made of it agree."""
    return float(np.float32(timestep))


def one_sample(value: Tensor) -> Tensor:
    """Return the first row of a value that has rows."""
    return value[:1] if value.ndim else value


def _position(model: nn.Module, name: str) -> int:
    return list(inspect.signature(model.forward).parameters).index(name)
