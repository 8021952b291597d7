"""Global patches that exist only while a trace runs: one lock, one owner thread, always restored."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moefx.errors import GuardError
from moefx.graph.proxy import ScalarProxy, TensorProxy, find_tracer

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
_LIBRARIES = ("torch", "moefx", "builtins")
_LEAF_FUNCTIONS = (
    ("torch.nn.attention.flex_attention", "flex_attention"),
    ("torch.nn.attention.varlen", "varlen_attn"),
)


_RUNNING: list[tuple[int, GuidedTracer]] = []


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let a trace that this thread is in the middle of record nothing: another one starts inside its forward."""
    with contextlib.ExitStack() as stack:
        for owner, tracer in _RUNNING:
            if owner == threading.get_ident():
                stack.enter_context(tracer.pause())
        yield


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
            _watch_mode(undo, active, tracer)
            functions = _patch_functions(replace, active, tracer)
            _patch_user_imports(replace, functions, tracer)
            if tracer.symbolic_int:
                _shadow_int(undo, active, tracer)
            _patch_autocast(replace, active, tracer)
            # torch logs a traceback of every operation that does not fit its inputs; the error that follows says it.
            replace(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True)
            _RUNNING.append((owner, tracer))
            yield
        finally:
            _RUNNING[:] = [running for running in _RUNNING if running[1] is not tracer]
            for step in reversed(undo):
                step()


def _patch_modules(replace: Callable[..., None], active: Callable[[], bool], tracer: GuidedTracer) -> None:
    call, getattr_, setattr_ = nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__

    def traced_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if active() and id(module) in tracer.paths:
            return tracer.call_module(module, args, kwargs, call)
        return call(module, *args, **kwargs)

    def traced_getattr(module: nn.Module, name: str) -> Any:
        found = getattr_(module, name)
        if isinstance(found, torch.Tensor) and type(found) is not TensorProxy and active():
            return tracer.attribute(found)
        return found

    def traced_setattr(module: nn.Module, name: str, value: Any) -> None:
        if active() and id(module) in tracer.paths:
            tracer.check_assignment(module, name, value)
        setattr_(module, name, value)

    replace(nn.Module, "__call__", traced_call)
    replace(nn.Module, "__setattr__", traced_setattr)
    replace(nn.Module, "__getattr__", traced_getattr)


def _watch_mode(undo: list[Callable[[], None]], active: Callable[[], bool], tracer: GuidedTracer) -> None:
    """Notice whether anything asks the root for its own mode, which only a property of its class can see."""
    kind = type(tracer.root)
    if hasattr(kind, "training"):
        tracer.reads_mode = True
        return

    def read(module: nn.Module) -> Any:
        if module is tracer.root and active():
            tracer.reads_mode = True
        try:
            return module.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None

    def write(module: nn.Module, value: bool) -> None:
        module.__dict__["training"] = value

    undo.append(lambda: delattr(kind, "training"))
    setattr(kind, "training", property(read, write))  # noqa: B010 - instances alone have it to mypy


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
        def plain(arg: Any) -> Any:
            return tuple(plain(a) for a in arg) if isinstance(arg, tuple) else tracer.specialise(arg)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return original(*(plain(a) for a in args), **kwargs)

        return wrapper

    for name in FACTORIES:
        patch(torch, name, always)
    for name in ("sqrt", "log", "log2", "exp", "pow", "prod"):
        patch(math, name, on_scalars)
    for name in ("finfo", "iinfo", "broadcast_shapes"):
        patch(torch, name, unwrapped)
    for module_name, name in _LEAF_FUNCTIONS:
        if module_name in sys.modules:
            patch(sys.modules[module_name], name, always)
    return made


def _patch_user_imports(replace: Callable[..., None], functions: dict[int, Any], tracer: GuidedTracer) -> None:
    """Patch the same functions where the model's own files imported them by name."""
    for file in _own_files(tracer.root):
        for name, value in list(vars(file).items()):
            if id(value) in functions and not isinstance(file, type):
                replace(file, name, functions[id(value)])


def _shadow_int(undo: list[Callable[[], None]], active: Callable[[], bool], tracer: GuidedTracer) -> None:
    """Give the model's own files an ``int`` of their own, which leaves numbers of the graph in it."""

    class Shadow(type):
        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            number = active() and len(args) == 1 and not kwargs and type(args[0]) is ScalarProxy
            return tracer.scalar(int, args[0]) if number else int(*args, **kwargs)

        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, int)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, int)

        def __eq__(cls, other: object) -> bool:
            return other is cls or other is int

        def __hash__(cls) -> int:
            return hash(int)

    shadow = Shadow("int", (), {})
    for file in _own_files(tracer.root):
        if not isinstance(file, type) and "int" not in vars(file):
            undo.append(functools.partial(delattr, file, "int"))
            setattr(file, "int", shadow)  # noqa: B010 - a module has no such name to mypy


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

    init: Any = torch.autocast.__init__

    def plain_init(block: Any, *args: Any, **kwargs: Any) -> None:
        args = tuple(_known_device(tracer.specialise(a)) for a in args)
        init(block, *args, **{k: _known_device(tracer.specialise(v)) for k, v in kwargs.items()})

    replace(torch.autocast, "__init__", plain_init)
    replace(torch.autocast, "__enter__", traced_enter)
    replace(torch.autocast, "__exit__", traced_leave)


def _known_device(value: Any) -> Any:
    # autocast knows no meta device; a graph traced there is never run, so any other will do.
    return "cpu" if value == "meta" else value


@dataclass(frozen=True)
class Written:
    """A plain Python attribute that forward changes: the trace saw its ``value`` and knows of no other."""

    holder: Any
    name: str
    value: Any

    def check(self) -> None:
        """Raise :class:`GuardError` unless the attribute is what the trace saw."""
        now = getattr(self.holder, self.name, None)
        if type(now) is not type(self.value) or now != self.value:
            raise GuardError(
                "run a captured graph of a forward that changes the module's state",
                found=f"{type(self.holder).__name__}.{self.name} = {now!r}, captured with {self.value!r}",
                do="trace the model again",
            )


class Snapshot:
    """The Python state of every module, to undo what a forward wrote into it while it saw proxies.

    Plain helper objects that modules hold (rotary tables, processors) are included: some fill a cache at first use.
    """

    def __init__(self, root: nn.Module) -> None:
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._shared: list[tuple[Any, Any]] = []
        self._seen: set[int] = set()
        for module in root.modules():
            self._keep(module)
        for holder in _own_files(root):
            self._look_shallow(vars(holder).values())

    def _keep(self, holder: Any) -> None:
        self._seen.add(id(holder))
        self._attributes.append((holder, dict(holder.__dict__)))
        for value in holder.__dict__.values():
            self._look(value)

    def _look(self, value: Any) -> None:
        if id(value) in self._seen or isinstance(value, nn.Module):
            return
        if type(value) in (dict, list):
            self._seen.add(id(value))
            self._containers.append((value, type(value)(value)))
            for item in value.values() if isinstance(value, dict) else value:
                self._look(item)
        elif type(getattr(value, "__dict__", None)) is dict and not _is_foreign(value):
            self._keep(value)

    def _look_shallow(self, values: Iterable[Any]) -> None:
        """Keep the caches that files and classes of the model hold as plain dicts and lists."""
        for value in list(values):
            if type(value) in (dict, list) and id(value) not in self._seen:
                self._seen.add(id(value))
                self._shared.append((value, type(value)(value)))

    def restore(self) -> tuple[list[str], list[Written]]:
        """Put everything back; return the names of what had changed, and which of them are plain Python values."""
        changed: list[str] = []
        written: list[Written] = []
        for holder, saved in self._attributes:
            now = holder.__dict__
            keys = [k for k, v in now.items() if saved.get(k, _MISSING) is not v]
            for key in keys:
                del now[key]
            now.update(saved)
            changed += [f"{type(holder).__name__}.{key}" for key in keys]
            values = [(key, getattr(holder, key, None)) for key in keys]
            written += [Written(holder, k, v) for k, v in values if isinstance(v, bool | int | float | str)]
        # Others may write to what files share, so that is put back only where it holds values of a trace.
        shared = [(now, saved) for now, saved in self._shared if _differs(now, saved) and find_tracer(now) is not None]
        for container, saved in [*self._containers, *shared]:
            if _differs(container, saved):
                changed.append(f"a {type(container).__name__} of the model")
                container.clear()
                container.update(saved) if isinstance(container, dict) else container.extend(saved)
        return changed, written


def _own_files(root: nn.Module) -> list[Any]:
    """Return the classes of the model's modules and the files they are written in, without torch's and ours."""
    types = {t for m in root.modules() for t in type(m).__mro__ if t.__module__.partition(".")[0] not in _LIBRARIES}
    files = {t.__module__: sys.modules.get(t.__module__) for t in types}
    return [*types, *(file for file in files.values() if file is not None)]


def _is_foreign(value: Any) -> bool:
    home = type(value).__module__.partition(".")[0]
    return isinstance(value, type | torch.Tensor) or home in ("builtins", "torch", "functools", "types", "collections")


_MISSING = object()


def _differs(value: Any, copy: Any) -> bool:
    if len(value) != len(copy):
        return True
    if isinstance(value, dict):
        return any(value.get(k, _MISSING) is not v for k, v in copy.items())
    return any(a is not b for a, b in zip(value, copy, strict=True))
