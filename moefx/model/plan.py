"""A plan: pure data that says what would be rewritten, where, by which rule, and what it would cost.

It is printable, diffable and JSON, and it is all that a saved model needs besides its weights.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from moefx import __version__
from moefx.errors import UnsafeInputError
from moefx.passes.analysis.segments import SegmentLayout
from moefx.passes.analysis.tokens import TokenLayout

SCHEMA = 1
JSON = dict[str, Any]


class _Data(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TapPlan(_Data):
    """A value that a replacement reads from elsewhere: its name, and the node of the block's graph that has it."""

    name: str
    node: str
    rank: int
    width: int


class CarriedPlan(_Data):
    """A value that passes from module to module as the argument ``name``.

    It is the tap ``node`` in the forward of ``source``, or with ``node = ""`` a state that each of ``blocks`` takes
    from the one before and returns beside its output; ``value`` says what tensor. Such a state begins as None, or where
    streams are merged as those in ``begins``, in the order of their tokens; what its layers have in common, such as a
    recurrent cell, they then have from ``like``, the main one of these.
    """

    name: str
    source: str
    blocks: tuple[str, ...]
    value: JSON
    node: str = ""
    begins: tuple[str, ...] = ()
    like: str = ""


class CarrierPlan(_Data):
    """A module whose forward passes values on: how it is called."""

    path: str
    inputs: JSON


class SitePlan(_Data):
    """One site to rewrite.

    ``module`` is the module that is replaced as a whole, ``block`` the one whose own forward is rewritten (with the
    children in ``expand`` written out); a site has one or both. ``weights`` identify the site inside the block;
    ``state`` names the carried value by which its router knows the one of the layer before. ``options`` replace those
    of the pass at this site. ``tokens`` says where the tokens of a whole block are, ``segment`` those of several,
    ``layer`` which of the ``layers`` blocks it is, and ``span`` how many from there on it is about: ``saved_fraction``
    of the dense cost of each is saved. Counts are per token for compute, in elements for parameters.
    """

    name: str
    kind: str
    flavour: str
    role: str
    rule: str
    tier: Literal["module", "block", "call"]
    module: str | None
    module_inputs: JSON | None = None
    block: str | None = None
    block_inputs: JSON | None = None
    expand: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    taps: tuple[TapPlan, ...] = ()
    tokens: TokenLayout | None = None
    segment: SegmentLayout | None = None
    state: str = ""
    layer: int = 0
    layers: int = 1
    span: int = 1
    options: JSON = {}
    saved_fraction: float = 0.0
    calls: int = 1
    parameters_before: int
    parameters_after: int
    active_before: int
    active_after: int


def taken_apart(outer: SitePlan, inner: SitePlan) -> str:
    """Return the module that ``inner`` rewrites and ``outer`` writes out in the forward around it; "" if none."""
    path = inner.module or inner.block or ""
    written = [f"{outer.block}.{child}".lstrip(".") for child in outer.expand]
    hit = next((w for w in written if path == w or path.startswith(f"{w}.")), "")
    return hit if outer.rule != inner.rule else ""


class SkippedSite(_Data):
    """A site, or almost a site, that stays dense, and why."""

    name: str
    kind: str
    rule: str
    reason: str
    source: str = ""


class PassPlan(_Data):
    """One pass with its options."""

    name: str
    options: JSON


class Cost(_Data):
    """Totals of the whole model; FLOPs are for one forward of the example inputs (a multiply-add counts two)."""

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    flops_before: int
    flops_after: int

    @property
    def flops_ratio(self) -> float:
        """Active FLOPs after, over FLOPs before."""
        return self.flops_after / self.flops_before if self.flops_before else 1.0


class Plan(_Data):
    """What :func:`moefx.plan` returns and :func:`moefx.transform` applies.

    ``expected_loss`` is what a choice by budget is expected to lose, summed over the sites; see `moefx.model.expected`.
    """

    schema_version: int = SCHEMA
    moefx_version: str = __version__
    model: str
    recipe: str | None
    seed: int
    passes: tuple[PassPlan, ...]
    sites: tuple[SitePlan, ...]
    carried: tuple[CarriedPlan, ...] = ()
    carriers: tuple[CarrierPlan, ...] = ()
    skipped: tuple[SkippedSite, ...]
    warnings: tuple[str, ...]
    cost: Cost
    expected_loss: float | None = None

    def to_json(self) -> str:
        """Return the plan as JSON text, the same for the same plan."""
        return self.model_dump_json(indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Read a plan back.

        Raises:
            UnsafeInputError: the text is no plan, or a newer version wrote it.
        """
        try:
            plan = Plan.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(p) for p in first["loc"])
            raise UnsafeInputError(
                "read a moefx plan", found=f"{where or 'text'}: {first['msg']}", do="save the model again"
            ) from error
        if plan.schema_version > SCHEMA:
            raise UnsafeInputError(
                "read a moefx plan",
                found=f"schema {plan.schema_version} of moefx {plan.moefx_version}, this is schema {SCHEMA}",
                do="upgrade moefx",
            )
        return plan

    def __str__(self) -> str:
        from moefx.inspect.tables import plan_text

        return plan_text(self)
