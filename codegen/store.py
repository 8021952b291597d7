"""Emitted modules on disk and in memory.

A kernel compiler and a debugger need a file for the source they show.  The file is never trusted: what runs is the text
that was just emitted, and a file that differs from it is written again.
"""

from __future__ import annotations

import contextlib
import functools
import linecache
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from moefx.codegen.spec import digest

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Return the folder of emitted sources: ``MOEFX_CACHE_DIR``, or ``moefx`` in the user's cache folder."""
    named = os.environ.get("MOEFX_CACHE_DIR")
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA")
    if base is None and sys.platform == "darwin":
        base = str(Path("~/Library/Caches").expanduser())
    return (Path(base) if base else Path("~/.cache").expanduser()) / "moefx"


@functools.cache
def _warn_once(folder: Path, reason: str) -> None:
    logger.warning(
        "moefx cannot write kernels to %s (%s); they are kept in memory. Set MOEFX_CACHE_DIR.", folder, reason
    )


def write(path: Path, text: str) -> bool:
    """Write a file of the cache atomically; say once, and return false, if the folder refuses."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
    except OSError as error:
        _warn_once(path.parent, error.strerror or type(error).__name__)
        return False
    return True


def save(source: str, stem: str) -> Path | None:
    """Keep a module's source and return its path, or ``None`` if it can be kept in memory only."""
    path = cache_folder() / "kernels" / f"{stem}_{digest(source)[:12]}.py"
    with contextlib.suppress(OSError):
        if path.read_text() == source:
            return path
    return path if write(path, source) else None


@functools.cache
def load(source: str, stem: str) -> ModuleType:
    """Execute an emitted module, once per process, and return it."""
    path = save(source, stem)
    name = str(path) if path else f"<moefx kernel {stem} {digest(source)[:12]}>"
    # The lines are registered in both cases: Triton reads a kernel's source back, and the file may be gone by then.
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    module = ModuleType(f"moefx_kernel_{stem}")
    module.__file__ = name
    # Triton and inspect look a function's module up by name.
    sys.modules[module.__name__] = module
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def clear() -> None:
    """Forget the modules of this process; files stay."""
    load.cache_clear()
    _warn_once.cache_clear()
