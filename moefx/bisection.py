"""Which site a pipeline goes wrong at: the rewrites applied to ever fewer sites, half of them each time.

A contract says what one site may lose, yet a model of forty sites that are each within theirs can still be unusable,
and a recipe may be wrong at one site only. This finds the first site whose rewrite makes the difference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from moefx.api import plan, transform, untransform
from moefx.errors import InputError, VerifyError
from moefx.graph.signature import Inputs
from moefx.model.handle import handle_of

Verdict = Callable[[nn.Module], str | None]


@dataclass(frozen=True)
class Culprit:
    """The first site whose rewrite makes a model wrong, and what is wrong with it then."""

    site: str
    index: int  # counted from 0, in the order of the plan
    sites: int
    reason: str

    def __str__(self) -> str:
        return f"site {self.index + 1} of {self.sites}, {self.site}: {self.reason}"


def bisect(model: nn.Module, inputs: Inputs = None, *, wrong: Verdict | None = None, **rewrite: Any) -> Culprit | None:
    """Return the first site of a plan that makes ``model`` wrong, or None if the whole rewrite is right.

    The first sites of the plan are rewritten together, and how many of them it takes is found in ⌈log₂ sites⌉ + 1
    transforms. That holds if a wrong model stays wrong when more of it is rewritten; where errors of sites cancel, some
    site is named at which right turns to wrong. The model is left as it was.

    Args:
        model: a dense model.
        inputs: as :func:`moefx.transform` takes them.
        wrong: takes the rewritten model and says what is wrong with it, or None. A contract that does not hold
            (:class:`moefx.errors.VerifyError`) is wrong anyway.
        rewrite: recipe, passes, only, skip, seed and options of :func:`moefx.transform`.

    Raises:
        InputError: the model is transformed already, or wrong before anything is rewritten.
        MoefxError: whatever :func:`moefx.plan` and :func:`moefx.transform` raise, apart from broken contracts.
    """
    if handle_of(model) is not None:
        raise InputError("bisect a rewrite", found="a transformed model", do="pass the dense one, or untransform it")
    if wrong is not None and (reason := wrong(model)) is not None:
        raise InputError("bisect a rewrite", found=f"the dense model is wrong: {reason}", do="mend the check first")
    names = list(dict.fromkeys(site.name for site in plan(model, inputs, **rewrite).sites))

    def reason_after(count: int) -> str | None:
        return _reason(model, inputs, wrong, rewrite | {"only": names[:count]})

    right, bad, reason = 0, len(names), reason_after(len(names))
    if reason is None:
        return None
    while bad - right > 1:
        middle = (right + bad) // 2
        found = reason_after(middle)
        if found is None:
            right = middle
        else:
            bad, reason = middle, found
    return Culprit(names[bad - 1], bad - 1, len(names), reason)


def _reason(model: nn.Module, inputs: Inputs, wrong: Verdict | None, rewrite: dict[str, Any]) -> str | None:
    try:
        transform(model, inputs, **rewrite)
    except VerifyError as error:
        return f"{error.asked}: {error.found}"
    try:
        return None if wrong is None else wrong(model)
    finally:
        untransform(model)
