"""From routing options to modules: router, selector, loss terms, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moefx.passes.rewrite.base import Context
from moefx.passes.rewrite.routing_options import RoutingOptions
from moefx.routing.by_expert import ExpertChoice, PredictedChoice
from moefx.routing.initialise import normal_rows, untie
from moefx.routing.moe import Loss
from moefx.routing.over_time import OverTime
from moefx.routing.recurrent import FollowingRouter, GRUCell, GRUScorer, ResidualScorer
from moefx.routing.router import LinearRouter
from moefx.routing.scorers import (
    CosineScorer,
    LinearScorer,
    MLPScorer,
    NormScorer,
    NoRouter,
    RandomScorer,
    Router,
    TableRouter,
)
from moefx.routing.selectors import (
    All,
    Forced,
    GroupLimitedTopK,
    GumbelSigmoid,
    Interval,
    Multinomial,
    NoisyTopK,
    Race,
    Selector,
    Threshold,
    TopK,
    TopP,
)
from moefx.routing.terms import BUILT_IN, TERMS

TIMESTEP_WIDTH = 256


def routing(o: RoutingOptions, context: Context, dim: int, device: torch.device, *, rows: int = 0) -> dict[str, Any]:
    """Return the keyword arguments of `RoutedFFN` that follow from the options.

    Args:
        o: the options.
        context: of the edit: taps and random numbers.
        dim: D.
        device: where the modules go.
        rows: N, if it is not ``o.groups``.
    """
    count = rows or o.groups
    return {
        "router": build_router(o, context, dim, count, device),
        "selector": build_selector(o, context, dim, count).to(device),
        "mode": o.mode,
        "scale": o.scale,
        "selection_bias": o.selection_bias,
        "non_finite": o.non_finite,
        "losses": loss_terms(o.losses),
        "coefficients": o.losses,
    }


def loss_terms(losses: Mapping[str, float] | None) -> dict[str, Loss]:
    """Return the terms that a layer must compute besides the built-in ones."""
    return {name: TERMS[name] for name in losses or {} if name not in BUILT_IN}


def build_selector(o: RoutingOptions, context: Context, dim: int, count: int) -> Selector:
    """Return the selector over ``count`` experts."""
    k = o.top_k // o.granularity * (count // o.groups)
    made: Selector
    if o.selector == "group-limited":
        made = GroupLimitedTopK(k, groups=o.select_groups, keep=o.keep_groups)
    elif o.selector == "noisy-top-k":
        made = NoisyTopK(k, noise=o.router_noise)
    elif o.selector == "multinomial":
        made = Multinomial(k)
    elif o.selector == "top-p":
        made = TopP(o.top_p, width=o.max_per_token)
    elif o.selector == "threshold":
        made = Threshold(count, cut=o.threshold, width=o.max_per_token)
    elif o.selector == "race":
        made = Race(count, mean_k=o.capacity, width=o.max_per_token)
    elif o.selector == "gumbel-sigmoid":
        made = GumbelSigmoid(width=o.max_per_token)
    elif o.selector == "all":
        made = All()
    elif o.selector == "interval":
        made = Interval(o.intervals, steps=o.timesteps, bounds=o.inner_bounds)
    elif o.selector == "expert-choice":
        made = ExpertChoice(o.capacity, pool=o.pool, noise=o.router_noise > 0)
    elif o.selector == "predicted":
        made = PredictedChoice(dim, count, o.capacity, generator=context.generator("predictor"))
    else:
        made = TopK(k)
    if o.over_time:
        made = OverTime(made, o.over_time, steps=o.timesteps)
    return Forced(o.always, made) if o.always else made


def build_router(o: RoutingOptions, context: Context, dim: int, count: int, device: torch.device) -> nn.Module:
    """Return the router over ``count`` experts."""
    if o.by_rule:
        return NoRouter(count)
    if o.scorer == "table":
        return TableRouter(count, entries=max(o.intervals or [10]), steps=o.timesteps).to(device)
    if o.state == "shared" and context.layer % (o.share_every or context.layer + 1):
        return FollowingRouter(count, tuple(name for name in o.reads if name != "token")).to(device)
    plain = o.scorer == "linear" and o.state == "none"
    if plain and set(o.reads) <= {"token", "timestep"} and "token" in o.reads:
        return _linear_router(o, context, dim, count, device)
    widths = {name: dim if name == "token" else _tap_width(context, name) for name in o.reads}
    embed = {name: TIMESTEP_WIDTH for name in o.reads if name == "timestep" and _is_raw(context)}
    scorer = _with_memory(o, context, sum(widths.values()), count)
    return Router(scorer, o.reads, embed=embed, timestep_scale=1000.0 / o.timesteps).to(device)


def _with_memory(o: RoutingOptions, context: Context, width: int, count: int) -> nn.Module:
    """Return the scorer, with what it knows of the layer before."""
    draws = context.generator("router")
    if o.state != "recurrent":
        scorer = _scorer(o, width, count, draws)
        residual = o.state == "residual" and context.layer > 0
        return scorer if o.state == "none" else ResidualScorer(scorer, count, residual=residual)
    if "cell" not in context.common:
        context.common["cell"] = GRUCell(o.state_width, generator=replace(context, name="").generator("cell"))
    std = 0.0 if o.router_init == "zero" else o.router_std
    return GRUScorer(width, count, context.common["cell"], std=std, generator=draws)


def _scorer(o: RoutingOptions, width: int, count: int, draws: torch.Generator) -> nn.Module:
    std = 0.0 if o.router_init == "zero" else o.router_std
    if o.scorer == "mlp":
        made = MLPScorer(
            width, count, hidden=hidden_width(o, width), act=o.scorer_act, std=o.router_std, generator=draws
        )
        if not std:
            nn.init.zeros_(made.w_out)
        return made
    if o.scorer == "cosine":
        return CosineScorer(width, count, std=std, generator=draws)
    if o.scorer == "norm":
        return NormScorer(width, count)
    if o.scorer == "random":
        return RandomScorer(count)
    return LinearScorer(width, count, std=std, generator=draws)


def hidden_width(o: RoutingOptions, width: int) -> int:
    """Return the hidden width of an mlp scorer."""
    return o.scorer_hidden or 2 * width


def _linear_router(o: RoutingOptions, context: Context, dim: int, count: int, device: torch.device) -> LinearRouter:
    reads_tap = "timestep" in o.reads
    router = LinearRouter(
        dim,
        count,
        tap_dim=_tap_width(context, "timestep") if reads_tap else 0,
        embed_timestep=reads_tap and _is_raw(context),
        timestep_scale=1000.0 / o.timesteps,
        std=0.0,
        device=device,
    )
    if o.router_init != "zero" and router.weight is not None:
        rows = normal_rows(o.groups, dim, context.generator("router"), std=o.router_std)
        with torch.no_grad():
            router.weight.copy_(untie(rows, count // o.groups) if count > o.groups else rows)
    return router


def _is_raw(context: Context) -> bool:
    return bool(context.taps["timestep"].meta["val"].ndim <= 1)


def _tap_width(context: Context, name: str) -> int:
    value = context.taps[name].meta["val"]
    return TIMESTEP_WIDTH if value.ndim <= 1 else int(value.shape[-1])


def router_parameters(o: RoutingOptions, dim: int, tap_width: int, *, rows: int = 0) -> int:
    """Return the parameters of router and selector; ``tap_width`` as for `Pass.costs`."""
    if o.by_rule:
        return 0
    count = rows or o.groups
    taps = [name for name in o.reads if name != "token"]
    width = dim * ("token" in o.reads) + ((tap_width or TIMESTEP_WIDTH) if taps else 0)
    predictor = dim * dim + dim + dim * count + count if o.selector == "predicted" else 0
    if o.scorer == "table":
        return max(o.intervals or [10]) * count + predictor
    if o.state == "recurrent":
        return (width + count) * o.state_width + predictor
    if o.scorer == "mlp":
        hidden = hidden_width(o, width)
        return width * hidden + hidden + hidden * count + count + predictor
    return (0 if o.scorer in ("norm", "random") else width * count) + predictor


def state_costs(o: RoutingOptions, dim: int, tap_width: int, layer: int) -> tuple[int, int]:
    """Return the parameters and multiply-adds per token that memory adds to `router_parameters` in one layer."""
    if o.state == "residual" and layer:
        return o.groups**2, o.groups**2
    if o.state == "recurrent":  # the first layer counts the cell of all
        products = 6 * o.state_width**2
        return 0 if layer else products + 6 * o.state_width, products
    if o.state == "shared" and layer % (o.share_every or layer + 1):
        saved = router_parameters(o, dim, tap_width)
        return -saved, -saved
    return 0, 0


def mean_experts(o: RoutingOptions) -> float:
    """Return how many experts a token gets on average, as far as the options say it."""
    if o.over_time:
        share = sum(o.over_time) / len(o.over_time)
        return share * mean_experts(o.model_copy(update={"over_time": []}))
    if o.selector in ("expert-choice", "predicted", "race"):
        return min(o.capacity * o.granularity, o.experts)
    if o.selector == "all":
        return o.experts
    if o.selector == "interval":
        return len(o.intervals) * o.granularity
    if o.selector == "top-p":  # of an undecided router
        return min(-(-o.top_p * o.groups // 1) * o.granularity, o.experts)
    if o.selector in ("threshold", "gumbel-sigmoid"):  # half of the scores are above zero
        return o.experts / 2
    return o.top_k + len(o.always) * o.granularity


def routing_warnings(o: RoutingOptions) -> list[str]:
    """Return what the user should know about a choice of routing."""
    if o.batch_invariant:
        return []
    return [
        f"with {o.selector} per {o.pool} a sample's result depends on what else is in its batch, guidance halves "
        "included: use pool='sample' to sample images"
    ]


def accepts_tap(o: RoutingOptions, name: str, value: torch.Tensor) -> bool:
    """Tell whether ``value`` will do for the tap ``name``: intervals and tables need a raw timestep."""
    return not (name == "timestep" and o.needs_raw_timestep) or value.ndim <= 1
