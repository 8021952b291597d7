"""Global patches that exist only while a trace runs: one lock, one owner thread, always restored."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moefx.graph.proxy import Proxy, ScalarProxy

if TYPE_CHECKING:
    from moefx.graph.tracer import GuidedTracer

_LOCK = threading.RLock()

FACTORIES = (
    *(
        "arange",
        "zeros",
        "ones",
        "empty",
        "full",
        "linspace",
        "logspace",
        "eye",
        "tensor",
        "as_tensor",
        "scalar_tensor",
    ),
    *("rand", "randn", "randint", "randperm", "tril_indices", "triu_indices", "from_numpy", "hann_window"),
    *("complex", "polar", "empty_strided"),
)
_LEAF_FUNCTIONS = (
    ("torch.nn.attention.flex_attention", "flex_attention"),
    ("torch.nn.attention.varlen", "varlen_attn"),
)


@contextlib.contextmanager
def patched(tracer: GuidedTracer) -> Iterator[None]:
    """Route module calls, parameter reads, factory functions and autocast blocks of this thread through ``tracer``."""
    owner = threading.get_ident()
    undo: list[Callable[[], None]] = []

    def replace(holder: Any, name: str, new: Any) -> None:
        old = holder.__dict__[name] if name in vars(holder) else getattr(holder, name)
        undo.append(lambda: setattr(holder, name, old))
        setattr(holder, name, new)

    def active() -> bool:
        return threading.get_ident() == owner and not tracer.paused

    with _LOCK:
        try:
            _patch_modules(replace, active, tracer)
            functions = _patch_functions(replace, active, tracer)
            _patch_user_imports(replace, functions, tracer)
            _patch_autocast(replace, active, tracer)
            yield
        finally:
            for step in reversed(undo):
                step()


def _patch_modules(replace: Callable[..., None], active: Callable[[], bool], tracer: GuidedTracer) -> None:
    call, getattr_ = nn.Module.__call__, nn.Module.__getattr__

    def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if active() and id(module) in tracer.paths:
            return tracer.call_module(module, args, kwargs, call)
        return call(module, *args, **kwargs)

    def traced_getattr(module: nn.Module, name: str) -> Any:
        found = getattr_(module, name)
        if isinstance(found, torch.Tensor) and not isinstance(found, Proxy) and active():
            return tracer.attribute(found)
        return found

    replace(nn.Module, "__call__", traced_call)
    replace(nn.Module, "__getattr__", traced_getattr)


def _patch_functions(replace: Callable[..., None], active: Callable[[], bool], tracer: GuidedTracer) -> dict[int, Any]:
    """Patch functions that do not dispatch on proxies; return ``id(original) -> replacement``."""
    made: dict[int, Any] = {}

    def patch(holder: Any, name: str, wrap: Callable[[Any], Any]) -> None:
        original = getattr(holder, name, None)
        if original is not None:
            made[id(original)] = wrap(original)
            replace(holder, name, made[id(original)])

    def always(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return tracer.call_function(original, args, kwargs) if active() else original(*args, **kwargs)

        return wrapper

    def on_scalars(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            scalars = active() and not kwargs and any(type(a) is ScalarProxy for a in args)
            return tracer.scalar(original, *args) if scalars else original(*args, **kwargs)

        return wrapper

    def unwrapped(original: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            args = tuple(tracer.specialise(a) if type(a) is ScalarProxy else a for a in args)
            return original(*args, **kwargs)

        return wrapper

    for name in FACTORIES:
        patch(torch, name, always)
    for name in ("sqrt", "log", "log2", "exp", "pow", "prod"):
        patch(math, name, on_scalars)
    for name in ("finfo", "iinfo"):
        patch(torch, name, unwrapped)
    for module_name, name in _LEAF_FUNCTIONS:
        if module_name in sys.modules:
            patch(sys.modules[module_name], name, always)
    return made


def _patch_user_imports(replace: Callable[..., None], functions: dict[int, Any], tracer: GuidedTracer) -> None:
    """Patch the same functions where the model's own files imported them by name."""
    for file_name in {type(m).__module__ for m in tracer.root.modules()}:
        file = sys.modules.get(file_name)
        if file is None or file_name.partition(".")[0] in ("torch", "moefx"):
            continue
        for name, value in list(vars(file).items()):
            if id(value) in functions:
                replace(file, name, functions[id(value)])


def _patch_autocast(replace: Callable[..., None], active: Callable[[], bool], tracer: GuidedTracer) -> None:
    enter: Any = torch.autocast.__enter__
    leave: Any = torch.autocast.__exit__

    def traced_enter(block: Any) -> Any:
        if active():
            tracer.autocasts.append((block.device, block.fast_dtype, block._enabled))
        return enter(block)

    def traced_leave(block: Any, *exc: Any) -> Any:
        if active() and tracer.autocasts:
            tracer.autocasts.pop()
        return leave(block, *exc)

    replace(torch.autocast, "__enter__", traced_enter)
    replace(torch.autocast, "__exit__", traced_leave)


def clear_caches(root: nn.Module) -> None:
    """Empty function caches in the model's own files: one may hold a proxy of a finished trace."""
    types = {type(m) for m in root.modules()}
    holders: list[Any] = [*types, *(sys.modules.get(t.__module__) for t in types)]
    for holder in holders:
        if holder is None or getattr(holder, "__module__", getattr(holder, "__name__", "")).startswith("torch."):
            continue
        for value in list(vars(holder).values()):
            if callable(getattr(value, "cache_clear", None)) and not isinstance(value, Proxy):
                value.cache_clear()


class Snapshot:
    """The Python attributes of every module, to undo what a forward wrote into them while it saw proxies."""

    def __init__(self, root: nn.Module) -> None:
        self._saved = [(m, {k: _shallow(v) for k, v in m.__dict__.items()}) for m in root.modules()]

    def restore(self) -> list[str]:
        """Put every attribute back; return the names of those that had changed to hold a proxy."""
        changed = []
        for module, saved in self._saved:
            for key, (value, copy) in saved.items():
                if module.__dict__.get(key, _MISSING) is not value:
                    changed.append(f"{type(module).__name__}.{key}")
                    module.__dict__[key] = value
                if copy is not None and key not in ("_parameters", "_buffers", "_modules") and _differs(value, copy):
                    changed.append(f"{type(module).__name__}.{key}")
                    value.clear()
                    value.update(copy) if isinstance(value, dict) else value.extend(copy)
            for key in [k for k in module.__dict__ if k not in saved]:
                changed.append(f"{type(module).__name__}.{key}")
                del module.__dict__[key]
        return changed


_MISSING = object()


def _shallow(value: Any) -> tuple[Any, Any]:
    return value, (type(value)(value) if type(value) in (dict, list) else None)


def _differs(value: Any, copy: Any) -> bool:
    if len(value) != len(copy):
        return True
    if isinstance(value, dict):
        return any(value.get(k, _MISSING) is not v for k, v in copy.items())
    return any(a is not b for a, b in zip(value, copy, strict=True))
