"""The routing options that every pass over FFNs shares: the same names everywhere, checked in one place.

A pass says what an expert is; these options say how tokens find their experts. `moefx.passes.rewrite.routing_build`
turns them into modules.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from moefx.errors import OptionError
from moefx.passes.rewrite.base import Options
from moefx.routing.finite import check_policy
from moefx.routing.intervals import schedule_bounds
from moefx.routing.normalise import MODES, SUM_TO_ONE, default_mode
from moefx.routing.terms import check_terms

# The names of conversion tables, kept as aliases of the readable ones.
ALIASES = {
    "N1": "topk_softmax",
    "N2": "softmax_topk_renorm",
    "N3": "softmax_topk",
    "N4": "sigmoid_topk_renorm",
    "N5": "sigmoid_topk",
    "N6": "unit",
    "N8": "soft",
    "N9": "one_plus_su",
    "N10": "ste",
}
UNIT = frozenset({"unit", "ste", "one_plus_su", "sigmoid_ste"})
READABLE = ("token", "timestep", "condition", "pooled", "text", "unmodulated")
SelectorName = Literal[
    "top-k", "group-limited", "noisy-top-k", "multinomial", "top-p", "threshold", "gumbel-sigmoid", "race", "all",
    "interval", "expert-choice", "predicted",
]  # fmt: skip
TOP_K = frozenset({"top-k", "group-limited", "noisy-top-k", "multinomial"})
# These draw anew in every layer.
RANDOM = frozenset({"noisy-top-k", "multinomial", "gumbel-sigmoid"})
# These never leave a token without an expert.
COVERING = TOP_K | {"top-p", "all", "interval"}
_DEFAULT_MODES = {"gumbel-sigmoid": "sigmoid_ste", "all": "soft", "interval": "unit"}


class RoutingOptions(Options):
    """How tokens find their experts."""

    experts: int = Field(8, ge=1, le=65536, description="number of routed experts E")
    top_k: int = Field(2, ge=1, description="experts per token K, for selectors that take a number")
    granularity: int = Field(1, ge=1, description="experts come in tied groups of G that share a gate")
    router_input: str = Field("token", description=f"what the router reads, joined by +: {', '.join(READABLE)}")
    scorer: Literal["linear", "mlp", "cosine", "norm", "random", "table"] = Field("linear", description="its function")
    scorer_hidden: int | None = Field(None, ge=1, description="hidden width of an mlp scorer; None: twice its input")
    scorer_act: Literal["gelu", "silu", "tanh", "relu"] = Field("gelu", description="activation of an mlp scorer")
    state: Literal["none", "residual", "recurrent", "shared"] = Field(
        "none",
        description="what a router hands to the next layer's. residual: its logits, which are added; recurrent: the "
        "state of a GRU that all layers share; shared: its logits, which the next layers use as theirs",
    )
    state_width: int = Field(256, ge=1, description="recurrent: width of the state")
    share_every: int = Field(0, ge=0, description="shared: a new decision every n layers; 0: one for all layers")
    router_init: Literal["normal", "zero", "tied"] = Field(
        "normal", description="start of the router's rows; tied: normal, and equal within a group (see untie)"
    )
    router_std: float = Field(0.02, ge=0, description="standard deviation of a normal start")
    selector: SelectorName = Field("top-k", description="which experts a token gets, or which tokens an expert gets")
    select_groups: int = Field(1, ge=1, description="group-limited: number of groups of experts")
    keep_groups: int = Field(1, ge=1, description="group-limited: groups a token may use")
    router_noise: float = Field(0.0, ge=0, description="noisy-top-k: deviation of the noise; expert-choice: on if > 0")
    top_p: float = Field(0.4, gt=0, description="top-p: probability that the chosen experts reach")
    threshold: float = Field(0.0, description="threshold: score that an expert must exceed")
    capacity: float = Field(1.0, ge=0, description="expert-choice, predicted, race: mean experts per token")
    pool: Literal["sample", "batch"] | int = Field("sample", description="expert-choice: tokens that compete")
    max_per_token: int | None = Field(None, ge=1, description="top-p, threshold, race: most experts of a token")
    intervals: list[int] = Field([], description="interval: numbers of timestep intervals; their sum is E")
    bounds: list[float] | None = Field(None, description="interval: inner boundaries of the first partition")
    cut: Literal["time", "log-snr", "clusters"] = Field(
        "time",
        description="interval: cut the first partition by equal times, equal log-SNR, or clusters of log-SNR (ANT)",
    )
    noise_schedule: Literal["linear", "scaled-linear", "flow"] = Field("linear", description="whose log-SNR cut means")
    timesteps: float = Field(1000.0, gt=0, description="raw timesteps are in [0, this); 1 if they are sigma")
    over_time: list[float] = Field(
        [],
        description="share of top_k or of the capacity, for equal intervals of the timestep from t = 0; []: all of it",
    )
    always: list[int] = Field([], description="experts that every token gets, beside what the selector takes")
    normalise: str | None = Field(None, description="gate normalisation, or N1 … N10; None: exact where possible")
    scale: float = Field(1.0, gt=0, description="factor on every gate")
    selection_bias: bool = Field(False, description="keep a bias for selection only (loss-free balancing)")
    losses: dict[str, float] | None = Field(None, description="coefficients of auxiliary terms; None: balance 0.01")
    non_finite: str = Field("propagate", description="what NaN or infinite logits do: propagate, raise, shared")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")

    @field_validator("normalise")
    @classmethod
    def _mode(cls, value: str | None) -> str | None:
        if value is None:
            return None
        name = ALIASES.get(value, value)
        if name not in MODES:
            raise ValueError(f"unknown mode, use one of {', '.join([*ALIASES, *MODES])}")
        return name

    @field_validator("router_input")
    @classmethod
    def _readable(cls, value: str) -> str:
        parts = value.split("+")
        if not set(parts) <= set(READABLE) or len(set(parts)) < len(parts):
            raise ValueError(f"join by + some of {', '.join(READABLE)}, each once")
        return value

    @field_validator("losses", "non_finite")
    @classmethod
    def _known(cls, value: dict[str, float] | str | None) -> dict[str, float] | str | None:
        try:
            if isinstance(value, dict):
                check_terms(list(value))
            elif value is not None:
                check_policy(value)
        except OptionError as error:
            raise ValueError(f"{error.found}: {error.do}") from error
        return value

    @model_validator(mode="after")
    def _fit(self) -> RoutingOptions:
        problem = _conflict(self)
        if problem:
            raise ValueError(problem)
        return self

    @property
    def groups(self) -> int:
        """N, what the router chooses among."""
        return self.experts // self.granularity

    @property
    def by_rule(self) -> bool:
        """Whether the timestep's interval is all that decides, so that no router is needed."""
        return self.selector == "interval" and self.mode == "unit"

    @property
    def reads(self) -> tuple[str, ...]:
        """What the router reads, in order."""
        return () if self.scorer == "table" or self.by_rule else tuple(self.router_input.split("+"))

    @property
    def mode(self) -> str:
        """The normalisation mode in force."""
        if self.normalise is not None:
            return self.normalise
        if self.selector in TOP_K and not self.always:
            return default_mode(self.groups, self.top_k // self.granularity)
        return _DEFAULT_MODES.get(self.selector, "softmax_topk_renorm")

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the values the layer needs from elsewhere, each once."""
        taps = [name for name in self.reads if name != "token"]
        return tuple(dict.fromkeys(taps + ["timestep"] * self.needs_raw_timestep))

    @property
    def inner_bounds(self) -> list[float] | None:
        """The inner boundaries of the first partition of timesteps; None for equal intervals."""
        if self.cut == "time" or self.bounds is not None:
            return self.bounds
        return list(schedule_bounds(self.intervals[0], self.cut, self.noise_schedule, self.timesteps))

    @property
    def needs_raw_timestep(self) -> bool:
        """Whether an embedding of the timestep is not enough."""
        return self.selector == "interval" or self.scorer == "table" or bool(self.over_time)

    @property
    def batch_invariant(self) -> bool:
        """Whether a sample's result in evaluation is the same whatever else is in its batch."""
        return self.selector != "expert-choice" or self.pool == "sample"

    @property
    def gates_sum_to_one(self) -> bool:
        """Whether every token's gates sum to one, so that copies of one FFN are that FFN."""
        if self.scale != 1.0 or not self._covers:
            return False
        slots = self.top_k // self.granularity if self.selector in TOP_K else len(self.intervals)
        return self.mode in SUM_TO_ONE or (
            self.mode in UNIT and slots == 1 and self.selector in TOP_K | {"interval"} and not self.always
        )

    @property
    def _covers(self) -> bool:
        full = self.selector == "expert-choice" and self.capacity >= self.groups and not self.over_time
        return self.selector in COVERING or bool(self.always) or full


def _conflict(o: RoutingOptions) -> str:
    """Return why the options do not fit together; ``""`` if they do."""
    chosen = o.selector in TOP_K
    if chosen and o.top_k > o.experts:
        return f"top_k = {o.top_k} of only {o.experts} experts"
    if o.experts % o.granularity or (chosen and o.top_k % o.granularity):
        return f"experts and top_k must be multiples of granularity = {o.granularity}"
    if o.selector == "group-limited":
        each = o.groups // o.select_groups
        if o.groups % o.select_groups or o.keep_groups > o.select_groups:
            return f"select_groups = {o.select_groups} must divide {o.groups} experts, and keep_groups be at most that"
        if o.top_k // o.granularity > o.keep_groups * each:
            return f"top_k = {o.top_k} of the {o.keep_groups * each} experts in {o.keep_groups} groups"
    if o.selection_bias and o.selector not in TOP_K | {"expert-choice"}:
        return f"selection_bias shifts a ranking, which {o.selector} does not make"
    if o.selector == "interval" and sum(o.intervals) != o.groups:
        return f"intervals = {o.intervals} must add up to the {o.groups} experts"
    if o.cut != "time" and (o.selector != "interval" or o.bounds is not None):
        return f"cut = {o.cut} makes the bounds of selector = interval: give no bounds"
    if o.over_time and not (chosen or (o.selector == "expert-choice" and o.pool == "sample")):
        return "over_time goes with selectors of the top-k kind and expert-choice per sample"
    if any(not 0 < share <= 1 for share in o.over_time):
        return f"over_time = {o.over_time} must be shares in (0, 1]"
    if o.selector == "predicted" and o.always:
        return "always does not go with selectors by expert"
    if o.selector == "expert-choice" and (o.always or (isinstance(o.pool, int) and o.pool < 1)):
        return "expert-choice takes no always, and a pool of at least one token"
    if o.mode == "soft" and not (o.selector == "all" or (chosen and o.top_k == o.experts)):
        return "normalise = soft weighs all experts: use selector = all, or top_k = experts"
    if any(not 0 <= e < o.groups for e in o.always):
        return f"always = {o.always} of {o.groups} experts"
    if o.state != "none" and o.scorer == "table":
        return "a table has no state to hand on"
    if o.state == "recurrent" and o.scorer != "linear":
        return f"with state = recurrent the GRU scores: leave out scorer = {o.scorer}"
    if o.state == "shared" and (o.selection_bias or o.selector in RANDOM or o.scorer == "random"):
        return "a shared decision needs a selector that does not draw, and no selection_bias of each layer"
    if o.scorer != "cosine" and "contrastive" in (o.losses or {}):
        return "the contrastive term needs scorer = cosine"
    if o.selector != "predicted" and "predictor" in (o.losses or {}):
        return "the predictor term needs selector = predicted"
    return ""
