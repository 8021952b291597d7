"""How a captured graph is called: the model's own signature, tensors as placeholders, everything else fixed."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from moefx.errors import CaptureError, GuardError, InputError

Inputs = dict[str, Any] | tuple[Any, ...] | None
STATIC = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, Enum, type(None))


def normalise_inputs(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Split ``inputs`` into positional and keyword arguments.

    Raises:
        InputError: ``inputs`` is neither a dict, nor a tuple, nor a pair ``(tuple, dict)``.
    """
    if isinstance(inputs, dict):
        return (), dict(inputs)
    if isinstance(inputs, tuple):
        if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
            return inputs[0], dict(inputs[1])
        return inputs, {}
    raise InputError(
        f"use example inputs for {type(model).__name__}",
        found=f"an object of type {type(inputs).__name__}",
        do="pass a dict of keyword arguments, a tuple of positional ones, or (tuple, dict)",
    )


@dataclass(frozen=True)
class TensorSpec:
    """What a captured graph demands of one tensor argument."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class CallSpec:
    """Binds calls by the model's signature and checks them against the captured example."""

    def __init__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.owner = type(model).__name__
        self.signature = inspect.signature(model.forward)
        leaves, self.spec = pytree.tree_flatten_with_path(self.bind(args, kwargs))
        self.tensors: list[TensorSpec] = []
        self.static: list[tuple[str, Any] | None] = []
        self.examples: list[torch.Tensor] = []
        taken: set[str] = set()
        for path, leaf in leaves:
            name = _identifier(path, taken)
            if isinstance(leaf, torch.Tensor):
                self.tensors.append(TensorSpec(name, tuple(leaf.shape), leaf.dtype, leaf.device))
                self.examples.append(leaf)
                self.static.append(None)
            elif isinstance(leaf, STATIC):
                self.static.append((name, leaf))
            else:
                found = f"argument {name!r} is a {type(leaf).__name__}, a custom object that a graph cannot hold"
                advice = "pass tensors, numbers, strings, None, or lists, tuples and dicts of them"
                raise CaptureError(f"trace {self.owner}", found=found, do=advice)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return all arguments by name, defaults applied.

        Raises:
            InputError: an argument is missing or unknown.
        """
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            named = [
                (n, p)
                for n, p in self.signature.parameters.items()
                if p.kind < p.VAR_POSITIONAL or p.kind == p.KEYWORD_ONLY
            ]
            needed = [n for n, p in named if p.default is p.empty]
            raise InputError(
                f"call {self.owner}.forward with the given inputs",
                found=f"{error}; given: {len(args)} positional, keywords {sorted(kwargs)}",
                do=f"pass at least {', '.join(needed)}; the signature is {_short_signature(self.signature)}",
            ) from error
        bound.apply_defaults()
        return dict(bound.arguments)

    def rebuild(self, values: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return ``(args, kwargs)`` for ``forward`` with ``values`` in the place of the tensors."""
        rest = iter(values)
        leaves = [next(rest) if static is None else static[1] for static in self.static]
        bound = inspect.BoundArguments(self.signature, pytree.tree_unflatten(leaves, self.spec))
        return bound.args, bound.kwargs

    def tensors_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
        """Return the tensor arguments of a call in placeholder order.

        Raises:
            GuardError: the call differs from the captured one in more than sizes and data.
        """
        leaves, spec = pytree.tree_flatten(self.bind(args, kwargs))
        if spec != self.spec:
            raise self._outside(f"arguments of another structure: {sorted(kwargs)}")
        tensors: list[torch.Tensor] = []
        for leaf, static in zip(leaves, self.static, strict=True):
            if static is None:
                tensors.append(self._check(leaf, self.tensors[len(tensors)]))
            elif type(leaf) is not type(static[1]) or leaf != static[1]:
                raise self._outside(f"{static[0]} = {leaf!r}, captured with {static[1]!r}")
        return tensors

    def _check(self, leaf: Any, want: TensorSpec) -> torch.Tensor:
        if not isinstance(leaf, torch.Tensor):
            raise self._outside(f"{want.name} is {type(leaf).__name__}, captured as a tensor")
        if leaf.dtype != want.dtype or leaf.ndim != len(want.shape) or leaf.device.type != want.device.type:
            raise self._outside(
                f"{want.name} is {leaf.dtype} of shape {tuple(leaf.shape)} on {leaf.device}, "
                f"captured as {want.dtype} of shape {want.shape} on {want.device}"
            )
        return leaf

    def _outside(self, found: str) -> GuardError:
        return GuardError(
            f"run the graph captured from {self.owner}", found=found, do="trace the model again with inputs like these"
        )


def _identifier(path: Any, taken: set[str]) -> str:
    parts = [str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path]
    stem = "".join(c if c.isalnum() else "_" for c in "_".join(parts)) or "input"
    stem = f"arg_{stem}" if stem[0].isdigit() else stem
    name, count = stem, 1
    while name in taken:
        name, count = f"{stem}_{count}", count + 1
    taken.add(name)
    return name


def _short_signature(signature: inspect.Signature) -> str:
    bare = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return f"forward{signature.replace(parameters=bare, return_annotation=signature.empty)}"
