"""Splitting: a dense FFN becomes slices of itself behind a router, with the same parameters and fewer of them active.

With every slice at weight 1 a split is exact; below that it is not, and what it loses depends on which neurons share a
slice, how well the router foresees which slices matter, and what stands in for those left out. Each of these is an
option; the published methods are settings of them, and `moefx.calibrate` provides the data.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from moefx.errors import InputError
from moefx.passes.analysis.site import Site
from moefx.passes.rewrite._slicing import Slicing
from moefx.passes.rewrite.base import Context, Contract, Costs, Options, register_pass
from moefx.passes.rewrite.dense import dense_weights, ffn_counts, ffn_sizes, hidden_function
from moefx.passes.rewrite.ffn import FFNPass
from moefx.passes.rewrite.ratios import Ratio, steps
from moefx.passes.rewrite.routing_options import ALIASES, UNIT
from moefx.routing.layout import OnAxis
from moefx.routing.normalise import MODES
from moefx.routing.precision import at_least_float32


class SplitOptions(Options):
    """Options of :class:`Split`."""

    experts: int = Field(12, ge=1, le=65536, description="number of routed slices E")
    shared: int = Field(4, ge=0, le=65536, description="width of the shared network, in slices")
    top_k: int = Field(4, ge=1, description="slices per token; with a threshold, on average")
    partition: Literal["contiguous", "random", "dealt", "clusters", "coactivation", "markers", "claimed"] = Field(
        "clusters", description="which neurons share a slice"
    )
    features: Literal["weights", "activations"] = Field("weights", description="what clusters compare")
    importance: Literal["magnitude", "usage", "taylor", "variance"] = Field(
        "variance", description="which neurons the shared network gets; variance: of h, times the square of its column"
    )
    over: Literal["mean", "max"] = Field("mean", description="importance over noise levels and branches")
    router: Literal["normal", "ridge", "logistic", "mlp", "tanh", "neurons"] = Field(
        "ridge", description="normal is random, ridge and logistic are regressions, neurons is analytic"
    )
    target: Literal["norm", "log", "mass"] = Field(
        "norm", description="what the router foresees: the norm of what a slice adds, its log, or positive activation"
    )
    router_hidden: int = Field(128, ge=1, description="hidden width of an mlp router")
    router_steps: int = Field(500, ge=1, description="training steps of an mlp or tanh router")
    router_std: float = Field(0.02, ge=0, description="standard deviation of a random router")
    selector: Literal["top-k", "relative", "threshold"] = Field("top-k", description="how scores become a choice")
    tau: float | None = Field(None, ge=0, le=1, description="of a relative threshold; None: calibrated to top_k")
    width: int | None = Field(None, ge=1, description="most slices per token with a threshold; None: all")
    timestep_thresholds: int = Field(
        1, ge=1, le=4096, description="thresholds over the range of timesteps, equal parts"
    )
    timestep_steps: float = Field(1000.0, gt=0, description="timesteps are in [0, timestep_steps)")
    normalise: str = Field("unit", description="gate normalisation, N1 … N10 or its name")
    scale: float = Field(1.0, gt=0, description="factor on every gate")
    compensation: Literal["none", "mean"] = Field("none", description="what stands in for a slice left out")
    channels: Literal["none", "affine", "moments"] = Field("none", description="calibration of the output's channels")
    balance: float = Field(0.0, ge=0, description="coefficient of the balance loss")
    selection_bias: bool = Field(False, description="keep a bias for selection only (loss-free balancing)")
    max_error: float = Field(2.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")

    @model_validator(mode="after")
    def _possible(self) -> SplitOptions:
        if self.top_k > self.experts:
            raise ValueError(f"top_k = {self.top_k} of only {self.experts} slices")
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.normalise}, use one of {', '.join([*ALIASES, *MODES])}")
        if self.router == "normal" and self.selector != "top-k":
            raise ValueError("a threshold needs a router that was fitted: ridge, logistic, mlp, tanh or neurons")
        return self

    @property
    def mode(self) -> str:
        """The normalisation mode in force."""
        return ALIASES.get(self.normalise, self.normalise)

    @property
    def slices(self) -> int:
        """E and the slices of the shared network."""
        return self.experts + self.shared

    @property
    def measured(self) -> bool:
        """Whether anything depends on calibration data."""
        by_data = self.partition in ("dealt", "coactivation", "markers", "claimed")
        by_data |= self.partition == "clusters" and self.features == "activations"
        corrected = self.compensation != "none" or self.channels != "none"
        return by_data or self.shared > 0 or self.router != "normal" or self.selector != "top-k" or corrected


@register_pass
class Split(FFNPass):
    """Replace an FFN by routed slices of itself."""

    name = "split"
    summary = "FFN -> routed slices of itself and a shared slice; fewer active parameters, approximate"
    provides = frozenset({"routed-ffns"})
    unit = "neurons"
    Options = SplitOptions
    options: SplitOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep, if thresholds depend on it."""
        return ("timestep",) if self.options.timestep_thresholds > 1 else ()

    def accepts(self, tap: str, value: torch.Tensor) -> bool:
        """Return whether the timestep is a raw one: an embedding has no interval."""
        return value.ndim <= 1

    @property
    def needs_calibration(self) -> bool:
        """Whether data decides anything."""
        return self.options.measured

    def misfit(self, site: Site) -> str:
        """Return why the options do not fit this FFN."""
        hidden, slices = ffn_sizes(site)[1], self.options.slices
        if hidden % slices:
            divisors = [n for n in range(1, 65) if hidden % n == 0]
            return f"its width {hidden} is not divisible by experts + shared = {slices}; possible: {divisors}"
        return ""

    def contract(self) -> Contract:
        """Exact if every slice runs at weight 1."""
        o = self.options
        if o.top_k == o.experts and o.selector == "top-k" and o.mode in UNIT and o.scale == 1:
            return Contract("exact", 0.0, "every slice at weight 1")
        return Contract("approximate", o.max_error, "some slices do not run")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and multiply-adds per token; with a threshold, those of the average it was set to."""
        o = self.options
        dim, _, out, _ = ffn_sizes(site)
        parameters, compute = ffn_counts(site)
        constants = o.experts * out if o.compensation == "mean" else 0
        added = _hoisted(o) and ("b_out" not in site.operands or bool(site.operands.get("rest")))
        router = {
            "mlp": o.router_hidden * (dim + o.experts + 1) + o.experts,
            "tanh": o.experts * (dim + o.experts),
            "neurons": o.experts * (dim * (2 if "w_gate" in site.operands else 1)),
        }.get(o.router, o.experts * dim)
        biases = o.experts if o.router in ("ridge", "logistic") else 0
        if o.router == "neurons":
            biases = o.experts * sum(name in site.operands for name in ("b_in", "b_gate"))
        scales = o.experts if o.mode == "one_plus_su" else 0
        after = parameters + router + biases + scales + constants + out * added
        return Costs(parameters, after, compute, compute * (o.shared + o.top_k) // o.slices + router)

    def ratios(self, site: Site) -> list[Ratio]:
        """Return numbers of slices per token."""
        o = self.options
        return [Ratio({"top_k": k}, (o.shared + k) / o.slices) for k in steps(o.experts)]

    def warnings(self) -> list[str]:
        """Warn of factors that make a split worse."""
        o = self.options
        if o.scale > 1 and o.mode == "unit":
            return [
                f"scale={o.scale:g} multiplies slices that already have their full size; a mean that stands in for the "
                "others (compensation='mean') is closer unless all slices are alike"
            ]
        return []

    def build(self, context: Context) -> nn.Module:
        """Return the split FFN that stands where ``context.site`` stood.

        Without calibration (a saved model is being loaded) the structure is the same, and the state dict has the rest.
        """
        o, site = self.options, context.site
        dense = dense_weights(site, context.graph)
        # The bias of a projection that is shared with something else stays with that projection.
        own = None if "rest" in site.operands else dense.b_out
        if own is None and _hoisted(o):
            own = torch.zeros(dense.out_dim, dtype=dense.w_out.dtype, device=dense.w_out.device)
        slicing = Slicing(o, replace(dense, b_out=own), hidden_function(site), context.generator, o.timestep_thresholds)
        if self.calibration is not None and o.measured and not dense.w_in.is_meta:
            self._measure(slicing, context.name)
        layer = slicing.build()
        axis = int(site.shapes["axis"])
        whole = OnAxis(layer, axis) if axis != len(site.shapes["x"]) - 1 else layer
        return whole.train(context.graph.root.training)

    def _measure(self, slicing: Slicing, name: str) -> None:
        """Give ``slicing`` the statistics of its layer."""
        calibration, o = self.calibration, self.options
        assert calibration is not None
        layer = slicing.statistics = calibration.layer(name)
        dense = slicing.dense
        if layer.sizes != (dense.dim, dense.hidden, dense.out_dim) or not len(layer.sample.x):
            raise InputError(
                f"split {name} by its calibration",
                found=f"statistics of a network of sizes {layer.sizes}, {len(layer.sample.x)} tokens",
                do="calibrate this model",
            )
        if slicing.rows > 1 and (calibration.buckets % slicing.rows or calibration.span != (0.0, o.timestep_steps)):
            raise InputError(
                f"set {slicing.rows} thresholds over {o.timestep_steps:g} timesteps",
                found=f"{calibration.buckets} buckets over {calibration.span}",
                do="make the buckets a multiple of timestep_thresholds, and timestep_steps the range of the timesteps",
            )
        slicing.tokens = layer.sample.x.to(dense.w_in.device, at_least_float32(dense.w_in))
        bucket = layer.sample.group % calibration.buckets
        slicing.bucket = bucket.to(dense.w_in.device) // (calibration.buckets // slicing.rows)


def _hoisted(options: SplitOptions) -> bool:
    return options.compensation != "none" or options.channels != "none"
