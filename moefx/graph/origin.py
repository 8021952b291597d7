"""Where a node came from, and which module invocations a trace went through."""

from __future__ import annotations

import linecache
import os
import sys
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import torch
from torch.fx import Node

# Frames of these folders are never the user's own line.
HIDDEN = tuple(os.path.dirname(os.path.abspath(f)) + os.sep for f in (__file__, str(torch.__file__)))


@dataclass(frozen=True)
class Origin:
    """Provenance of one node.

    ``path`` and ``call_index`` name the innermost module invocation around it (``""`` is the traced module itself),
    ``source`` is ``"file.py:line"`` in the user's model, ``rules`` are the rewrite rules that made the node.
    """

    path: str
    call_index: int = 0
    source: str = ""
    rules: tuple[str, ...] = ()

    def stamped(self, rule: str) -> Origin:
        """Return this origin with one more rule."""
        return replace(self, rules=(*self.rules, rule))


@dataclass(frozen=True)
class ModuleCall:
    """One invocation of a module that the trace went through.

    ``args``, ``kwargs`` and ``output`` are pytrees whose tensors are ``fx.Node``; ``nodes`` lie inside the invocation.
    """

    path: str
    index: int
    type_name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    nodes: tuple[Node, ...]

    @property
    def name(self) -> str:
        """The module path, with ``#i`` for every call after the first."""
        return self.path if self.index == 0 else f"{self.path}#{self.index}"


def origin_of(node: Node) -> Origin:
    """Return the origin of ``node`` (an empty one for nodes that a foreign tracer made without provenance)."""
    origin = node.meta.get("moefx")
    return origin if isinstance(origin, Origin) else Origin("")


def user_source() -> str:
    """Return ``"file.py:line"`` of the innermost frame that belongs neither to torch nor to the tracer."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        filename = frame.f_code.co_filename
        if not filename.startswith(HIDDEN) and not filename.startswith("<"):
            return f"{short_path(filename)}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


_short: dict[str, str] = {}
_long: dict[str, str] = {}


def short_path(filename: str) -> str:
    """Shorten a file name so that it does not depend on where things are installed."""
    if filename not in _short:
        _, mark, tail = filename.rpartition("site-packages" + os.sep)
        below = os.path.relpath(filename) if filename.startswith(os.getcwd() + os.sep) else os.path.basename(filename)
        _short[filename] = tail if mark else below
        _long[_short[filename]] = filename
    return _short[filename]


def source_text(source: str) -> str:
    """Return the source line that ``"file.py:line"`` names, or ``""`` when the file is not at hand."""
    name, _, line = source.rpartition(":")
    return linecache.getline(_long.get(name, name), int(line)).strip() if line.isdigit() else ""


def show_source(source: str) -> str:
    """Return ``source`` with its text, for messages."""
    text = source_text(source)
    return f"{source}  `{text}`" if text else source
