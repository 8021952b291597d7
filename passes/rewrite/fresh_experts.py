"""Experts by design: a dense FFN becomes freshly drawn experts of any width, with or without a dense FFN beside them.

For systems that are designed routed and trained as such. Nothing of the dense FFN need remain; kept as the shared
expert next to experts whose output projection starts at zero it is exact. To start from copies use ``upcycle``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn

from moefx.passes.analysis.site import Site
from moefx.passes.rewrite.base import Context, Contract, Costs, register_pass
from moefx.passes.rewrite.dense import dense_weights, ffn_counts, ffn_sizes, hidden_function
from moefx.passes.rewrite.ffn import RoutedFFNPass
from moefx.passes.rewrite.routing_build import mean_experts, router_parameters, routing, routing_warnings
from moefx.passes.rewrite.routing_options import TOP_K, RoutingOptions
from moefx.routing.activation import Gated
from moefx.routing.cheap import CheapExperts
from moefx.routing.experts import DenseFFN, Experts
from moefx.routing.initialise import zero_output
from moefx.routing.layout import OnAxis
from moefx.routing.moe import RoutedFFN
from moefx.routing.unconditional import Unconditional, UnconditionalRouter
from moefx.routing.weights import FFNWeights, random_weights


class FreshOptions(RoutingOptions):
    """Options of :class:`FreshExperts`."""

    hidden: float = Field(1.0, gt=0, le=16, description="hidden width of an expert over that of the dense FFN")
    form: Literal["same", "swiglu"] = Field("same", description="the dense FFN's activation, or SwiGLU without biases")
    shared: Literal["none", "fresh", "dense"] = Field("none", description="FFN that every token passes")
    shared_hidden: float = Field(1.0, gt=0, le=16, description="its width over that of the dense FFN, if fresh")
    zero_output: bool = Field(False, description="experts add nothing at the start")
    zero_experts: int = Field(0, ge=0, description="of the experts, how many return 0")
    copy_experts: int = Field(0, ge=0, description="of the experts, how many return the token")
    constant_experts: int = Field(0, ge=0, description="of the experts, how many mix the token with a learnt vector")
    tau: float = Field(0.75, gt=0, le=1, description="weight of those cheap experts in the term weighted_balance")
    unconditional: Literal["none", "given", "label"] = Field(
        "none",
        description="the last expert serves samples without a condition alone: those that the caller names (given), or "
        "those with null_label (label)",
    )
    null_label: int | None = Field(None, ge=0, description="label that stands for no condition, often the last")
    max_error: float = Field(100.0, gt=0, description="refuse a start further from the dense model than this")

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of the values the layer needs from elsewhere, each once."""
        return tuple(dict.fromkeys((*super().taps, *["label"] * (self.unconditional == "label"))))

    @property
    def of_conditional(self) -> FreshOptions:
        """The same options for the experts that samples with a condition choose among."""
        return self.model_copy(update={"experts": self.experts - (self.unconditional != "none")})

    @property
    def cheap(self) -> int:
        """Number of experts that compute nothing."""
        return self.zero_experts + self.copy_experts + self.constant_experts

    @model_validator(mode="after")
    def _some_compute(self) -> FreshOptions:
        if self.cheap and (self.cheap >= self.experts or self.granularity > 1):
            raise ValueError("cheap experts are counted among experts, need an FFN beside them, and granularity = 1")
        if "weighted_balance" in (self.losses or {}) and not self.cheap:
            raise ValueError("the term weighted_balance needs cheap experts")
        return self

    @model_validator(mode="after")
    def _own_expert(self) -> FreshOptions:
        if (self.unconditional == "label") != (self.null_label is not None):
            raise ValueError("null_label goes with unconditional = label")
        fits = self.selector in TOP_K and self.mode in ("identity", "unit") and self.top_k < self.experts
        fits = fits and self.granularity == 1 and self.state == "none"
        if self.unconditional != "none" and not (fits and not self.cheap and not self.always):
            raise ValueError(
                "an unconditional expert needs a selector of the top-k kind over the other experts, normalise = "
                "identity or unit, granularity = 1, state = none, and neither cheap experts nor always"
            )
        return self


@register_pass
class FreshExperts(RoutedFFNPass):
    """Replace an FFN by freshly drawn experts."""

    name = "fresh-experts"
    summary = "FFN -> freshly drawn routed experts of any width; exact next to the dense FFN with zero_output"
    provides = frozenset({"routed-ffns"})
    Options = FreshOptions
    options: FreshOptions

    def misfit(self, site: Site) -> str:
        """Return why the options do not fit this FFN."""
        dim, _, out, _ = ffn_sizes(site)
        if dim != out and self.options.copy_experts + self.options.constant_experts:
            return f"it maps {dim} to {out} features, which copy and constant experts cannot"
        return ""

    def contract(self) -> Contract:
        """Exact next to the kept dense FFN; otherwise the dense function is given up."""
        o = self.options
        if o.shared == "dense" and o.zero_output and o.copy_experts + o.constant_experts == 0:
            return Contract("exact", 0.0, "the dense FFN, and experts that add nothing yet")
        return Contract("approximate", o.max_error, "the experts are drawn anew: train the model")

    def warnings(self) -> list[str]:
        """Warn of results that depend on the batch, and of an expert that waits to be told whose it is."""
        found = routing_warnings(self.options)
        if self.options.unconditional != "given":
            return found
        return [
            *found,
            "the last expert serves samples without a condition, which no layer guesses: call the model inside "
            "moefx.routing.given(model, unconditional=mask), in training and in sampling",
        ]

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and multiply-adds per token."""
        o = self.options
        dim, _, out, _ = ffn_sizes(site)
        parameters, compute = ffn_counts(site)
        each_parameters, each_compute = self._one(site, o.hidden)
        bias = self._has_bias(site) * out
        shared = {"none": (0, 0), "fresh": self._one(site, o.shared_hidden), "dense": (parameters, compute)}[o.shared]
        if o.shared == "dense" and "rest" in site.operands and "b_out" in site.operands:
            shared = shared[0] - out, shared[1]
        kept = out if "rest" in site.operands and "b_out" in site.operands else 0
        router = router_parameters(o.of_conditional, dim, tap_width)
        cheap = 3 * dim * o.constant_experts
        after = each_parameters * (o.experts - o.cheap) + bias + shared[0] + kept + router + cheap
        busy = mean_experts(o) * (o.experts - o.cheap) / o.experts
        return Costs(parameters, after, compute, int(each_compute * busy) + shared[1] + router)

    def _one(self, site: Site, ratio: float) -> tuple[int, int]:
        """Return parameters without output bias, and multiply-adds, of one FFN of that relative width."""
        dim, hidden, out, inputs = ffn_sizes(site)
        width = _width(hidden, ratio)
        swiglu = self.options.form == "swiglu"
        matrices = width * ((2 if swiglu else inputs) * dim + out)
        biases = 0 if swiglu else sum(width for name in ("b_in", "b_gate") if name in site.operands)
        return matrices + biases, matrices

    def _has_bias(self, site: Site) -> bool:
        o = self.options
        if "rest" in site.operands or o.shared == "dense" or o.zero_output:
            return False
        return o.form == "same" and "b_out" in site.operands

    def build(self, context: Context) -> nn.Module:
        """Return the routed FFN that stands where ``context.site`` stood."""
        o, site = self.options, context.site
        dense = dense_weights(site, context.graph)
        device, act = dense.w_in.device, self._act(site)
        weights = self._draw(context, dense, o.hidden, "experts", o.experts - o.cheap)
        if not self._has_bias(site):
            weights = replace(weights, b_out=None)
        experts: nn.Module = Experts(zero_output(weights) if o.zero_output else weights, act)
        if o.cheap:
            experts = CheapExperts(
                experts,  # type: ignore[arg-type]
                dense.dim,
                zero=o.zero_experts,
                copy=o.copy_experts,
                constant=o.constant_experts,
                tau=o.tau,
                generator=context.generator("cheap"),
            ).to(device)
        shared = self._shared(context, dense)
        routed = RoutedFFN(
            experts=experts, granularity=o.granularity, shared=shared, **self._slots(context, dense.dim, device)
        )
        axis = int(site.shapes["axis"])
        module = routed if axis == len(site.shapes["x"]) - 1 else OnAxis(routed, axis)
        return module.train(context.graph.root.training)

    def _slots(self, context: Context, dim: int, device: torch.device) -> dict[str, Any]:
        """Return how tokens find their experts, the unconditional one apart."""
        o = self.options
        slots = routing(o.of_conditional, context, dim, device)
        if o.unconditional == "none":
            return slots
        selector = Unconditional(slots["selector"], null_label=o.null_label)
        return slots | {"router": UnconditionalRouter(slots["router"]), "selector": selector}

    def _shared(self, context: Context, dense: FFNWeights) -> nn.Module | None:
        o = self.options
        if o.shared == "none":
            return None
        if o.shared == "dense":
            kept = replace(dense, b_out=None) if "rest" in context.site.operands else dense
            return DenseFFN(kept, hidden_function(context.site))
        drawn = self._draw(context, dense, o.shared_hidden, "shared", None)
        return DenseFFN(replace(drawn, b_out=None), self._act(context.site))

    def _draw(self, context: Context, dense: FFNWeights, ratio: float, purpose: str, count: int | None) -> FFNWeights:
        same = self.options.form == "same"
        drawn = random_weights(
            dense.dim,
            _width(dense.hidden, ratio),
            num_experts=count,
            out_dim=dense.out_dim,
            gated=dense.w_gate is not None if same else True,
            bias=same,
            generator=context.generator(purpose),
        )
        if same:
            kept = {name: None for name in ("b_in", "b_gate", "b_out") if getattr(dense, name) is None}
            drawn = replace(drawn, **kept)  # type: ignore[arg-type]
        return drawn.map(lambda tensor: tensor.to(dense.w_in.device, dense.w_in.dtype))

    def _act(self, site: Site) -> Any:
        return hidden_function(site) if self.options.form == "same" else Gated(F.silu)


def _width(hidden: int, ratio: float) -> int:
    return max(1, round(hidden * ratio))
