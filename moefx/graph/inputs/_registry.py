"""Registry of input makers, and `synthesise`, which chooses one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from moefx.errors import InputError
from moefx.graph.inputs._arguments import by_rules
from moefx.graph.inputs._request import Request

Maker = Callable[[Request], dict[str, Any]]

_MAKERS: dict[type[nn.Module] | str, Maker] = {}


def register_inputs(*classes: type[nn.Module] | str) -> Callable[[Maker], Maker]:
    """Register a maker of example inputs for one or more model classes, given as classes or as class names.

    The maker takes a `Request` and returns the keyword arguments of ``forward``. Subclasses inherit it. A later
    registration for the same class replaces the earlier one.

        @register_inputs(MyDenoiser)
        def my_inputs(request):
            return {"x": request.normal(request.batch, 4, 8, 8), "t": request.steps()}
    """
    if not classes or not all(isinstance(c, (type, str)) for c in classes):
        raise InputError(
            "register_inputs wants model classes or class names",
            found=repr(classes),
            do='write @register_inputs("MyDenoiser") or @register_inputs(MyDenoiser), with the parentheses',
        )

    def register(maker: Maker) -> Maker:
        _MAKERS.update(dict.fromkeys(classes, maker))
        return maker

    return register


def registered() -> list[str]:
    """Return the names of the classes with a maker of their own, sorted."""
    return sorted(c if isinstance(c, str) else c.__name__ for c in _MAKERS)


def synthesise(model: nn.Module, *, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Return keyword arguments with which ``model(**kwargs)`` runs, on the model's device and in its float type.

    Sizes are small and mutually distinct (2 samples, 7 text tokens, 4 x 6 image tokens, 3 frames) except where the
    model fixes one, and equal calls give equal tensors; torch's global random state is neither read nor changed.

    Raises InputError, which names the argument to pass, if the class is unknown and its ``forward`` has an argument
    that the rules do not cover.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            "synthesise wants a torch.nn.Module", found=type(model).__name__, do="pass the denoiser itself"
        )
    if isinstance(batch, bool) or not isinstance(batch, int) or batch < 1:
        raise InputError("the batch size must be a positive integer", found=repr(batch), do="pass batch=2, for example")
    # A module wrapped by torch.compile has the signature of the wrapper.
    model = getattr(model, "_orig_mod", model)
    request = Request(model, batch, seed)
    maker = _find(type(model))
    return maker(request) if maker else by_rules(request)


def _find(kind: type) -> Maker | None:
    for base in kind.__mro__:
        for key in (base, base.__name__):
            if key in _MAKERS:
                return _MAKERS[key]
    return None
