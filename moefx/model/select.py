"""Which sites a transform is asked to rewrite: by kind, by name glob, by every n-th."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from moefx.errors import NothingMatched, OptionError, nearest
from moefx.passes.analysis.site import Site

KINDS = ("ffn", "attention", "block")
Patterns = str | Sequence[str] | None


def patterns(value: Patterns, name: str) -> tuple[str, ...]:
    """Normalise ``only`` or ``skip`` to a tuple of patterns.

    Raises:
        OptionError: it is neither a string nor a sequence of strings.
    """
    if value is None:
        return ()
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not found or not all(isinstance(p, str) and p for p in found):
        raise OptionError(f"select sites with {name} = {value!r}", found="not names", do="pass globs or site kinds")
    return found


def matches(site: Site, wanted: Iterable[str]) -> bool:
    """Tell whether one of the patterns is the site's kind, its name, or a glob of its name or module path."""
    return any(p == site.kind or fnmatch.fnmatchcase(site.name, p) or fnmatch.fnmatchcase(site.path, p) for p in wanted)


def check_patterns(wanted: Iterable[str], sites: Sequence[Site], name: str) -> None:
    """Refuse a pattern that matches nothing.

    Raises:
        NothingMatched: the message names the nearest site.
    """
    for pattern in wanted:
        if pattern in KINDS or any(matches(site, (pattern,)) for site in sites):
            continue
        names = sorted({site.name for site in sites})
        known = names if len(names) <= 12 else [*names[:12], f"and {len(names) - 12} more"]
        raise NothingMatched(
            f"select sites with {name} = {pattern!r}", found="no site of that name or path", do=nearest(pattern, known)
        )


def selected(site: Site, only: Sequence[str], skip: Sequence[str]) -> bool:
    """Tell whether ``site`` is asked for."""
    return (not only or matches(site, only)) and not matches(site, skip)
