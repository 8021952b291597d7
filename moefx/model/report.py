"""The receipt of a transform: what was matched, made, proved and measured."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from moefx.model.plan import Plan


class SiteCheck(BaseModel):
    """One site compared with its dense original on random inputs."""

    model_config = ConfigDict(frozen=True)
    name: str
    contract: str
    error: float
    bound: float
    dtype: str


class Report(BaseModel):
    """What :func:`moefx.transform` did."""

    model_config = ConfigDict(frozen=True)
    plan: Plan
    checks: tuple[SiteCheck, ...] = ()
    model_error: float | None = None
    model_bound: float | None = None
    unverified: str = ""
    seconds: dict[str, float] = {}

    def proof_summary(self) -> str:
        """Return one line on what was proved."""
        if self.unverified:
            return f"not verified: {self.unverified}"
        worst = max((c.error for c in self.checks), default=0.0)
        whole = (
            "" if self.model_error is None else f"; whole model {self.model_error:.2e} (bound {self.model_bound:.1e})"
        )
        return f"{len(self.checks)} sites checked, worst relative error {worst:.2e}{whole}"

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return self.model_dump_json(indent=1)

    def __str__(self) -> str:
        from moefx.inspect.tables import report_text

        return report_text(self)
