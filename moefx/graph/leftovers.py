"""Values of a finished trace that the model's code kept: in a function cache, or in a dict of its own.

A later call of the model would find them there, so they are taken out. Nothing is searched unless something is alive.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

_DEPTH = 6
_CACHED = type(functools.lru_cache(len))


def forget(values: Iterable[weakref.ref[Any]]) -> list[str]:
    """Take ``values`` out of function caches and dicts; return the types of what else still holds some."""
    values = list(values)
    if _alive(values):
        gc.collect()
    if not _alive(values):
        return []
    with _thawed():
        return _take_out(values)


@contextlib.contextmanager
def _thawed() -> Iterator[None]:
    """Let ``gc`` see the objects that ``gc.freeze`` set aside, as servers do after their imports: caches are there."""
    frozen = gc.get_freeze_count()
    gc.unfreeze()
    try:
        yield
    finally:
        if frozen:
            gc.freeze()


def _take_out(values: list[weakref.ref[Any]]) -> list[str]:
    kept = {id(value) for value in _alive(values)}
    for cache in [o for o in gc.get_objects() if type(o) is _CACHED]:
        if _holds(cache, kept, _DEPTH):
            cache.cache_clear()
    for value in _alive(values):
        for holder in gc.get_referrers(value):
            if type(holder) is dict:
                for key in [k for k, v in holder.items() if v is value]:
                    del holder[key]
    return sorted({name for value in _alive(values) for name in _holders(value)})


def _holders(value: Any) -> set[str]:
    ours = (FrameType, weakref.ref)
    return {type(holder).__name__ for holder in gc.get_referrers(value) if not isinstance(holder, ours)}


def _alive(values: Iterable[weakref.ref[Any]]) -> list[Any]:
    return [value for value in (ref() for ref in values) if value is not None]


def _holds(holder: Any, kept: set[int], depth: int) -> bool:
    for inner in gc.get_referents(holder):
        container = isinstance(inner, dict | list | tuple) or type(inner).__name__ == "_lru_list_elem"
        if id(inner) in kept or (depth and container and _holds(inner, kept, depth - 1)):
            return True
    return False
