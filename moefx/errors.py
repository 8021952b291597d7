"""Every error moefx raises on purpose.

A message has three parts: what was asked, what was found and where, and what to do about it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MoefxError(Exception):
    """Base of all moefx errors; ``exit_code`` is what the command line returns for it."""

    exit_code = 2

    def __init__(self, asked: str, *, found: str = "", do: str = "") -> None:
        self.asked, self.found, self.do = asked, found, do
        lines = (asked, found and f"  found: {found}", do and f"  do: {do}")
        super().__init__("\n".join(line for line in lines if line))


class InputError(MoefxError):
    """The model or its example inputs are missing, or of the wrong type, shape, dtype or device."""


class CaptureError(MoefxError):
    """The model cannot be traced faithfully; the message shows the user's own source line."""


class GuardError(CaptureError):
    """A captured graph was called outside the range for which it is valid."""


class PlanError(MoefxError):
    """A plan is impossible for this model: options, sites or a second application of a pass."""


class NothingMatched(PlanError):
    """No site of the model matches what was asked."""

    exit_code = 3


class OptionError(PlanError):
    """An option is unknown or its value is impossible."""


class VerifyError(MoefxError):
    """A rewrite broke the contract it stated."""

    exit_code = 4


class UnsafeInputError(MoefxError):
    """A saved folder, plan or dump is missing, damaged, of another model or of a newer version."""

    exit_code = 5


class MoefxWarning(UserWarning):
    """Something that a user can act on."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"did you mean 'x'? "`` followed by the known names, for use in the ``do`` part of an error."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"
