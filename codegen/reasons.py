"""Why something was not lowered."""

from __future__ import annotations

from moefx.errors import MoefxError


class CannotLower(MoefxError):
    """A region or a part of it has no kernel; the dialect ops compute it instead, with the same result."""
