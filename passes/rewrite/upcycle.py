"""Upcycling: a dense FFN becomes copies of itself behind a router, and computes the same until it is trained.

Sources: Sparse Upcycling (arXiv 2212.05055), granular virtual groups (arXiv 2410.07524, in the form that needs no
weight scaling), Drop-Upcycling (arXiv 2502.19261, one index set per expert).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import nn

from moefx.passes.analysis.site import Site
from moefx.passes.rewrite.base import Context, Contract, Costs, register_pass
from moefx.passes.rewrite.cut import extract, mixes_tokens
from moefx.passes.rewrite.dense import dense_weights, ffn_counts, ffn_sizes, hidden_function
from moefx.passes.rewrite.ffn import RoutedFFNPass
from moefx.passes.rewrite.routing_build import mean_experts, router_parameters, routing, routing_warnings
from moefx.passes.rewrite.routing_options import ALIASES, TOP_K, RoutingOptions
from moefx.routing.experts import DenseFFN, Experts
from moefx.routing.initialise import add_noise, arrange_shared, granular_copies, partially_reinitialise
from moefx.routing.layout import OnAxis
from moefx.routing.moe import RoutedFFN
from moefx.routing.normalise import SUM_TO_ONE
from moefx.routing.samples import ModuleExperts, RoutedSamples

MODES = ALIASES


class UpcycleOptions(RoutingOptions):
    """Options of :class:`Upcycle`."""

    shared: int = Field(0, ge=0, description="full copies of the dense FFN that every token passes")
    untie: bool = Field(False, description="give each member of a group its own router row, equal at the start")
    noise: float = Field(0.0, ge=0, description="noise on each expert, relative to the std of its matrices")
    noise_fraction: float = Field(1.0, ge=0, le=1, description="fraction of the neurons that get noise")
    reinitialise: float = Field(0.0, ge=0, le=1, description="fraction of each expert's neurons drawn anew")
    independent_sets: bool = Field(False, description="draw those neurons per matrix, as the released code did")
    max_error: float = Field(1.0, gt=0, description="refuse a start further from the dense model than this")

    @model_validator(mode="after")
    def _untied_top_k(self) -> UpcycleOptions:
        linear = self.scorer == "linear" and self.state == "none"
        if self.untie and (self.selector != "top-k" or not linear or "token" not in self.reads):
            raise ValueError(
                "untie goes with selector = top-k, scorer = linear, state = none and a router that reads the token"
            )
        return self

    @property
    def plain_copies(self) -> bool:
        """Whether the experts are whole copies, with nothing beside them."""
        return self.granularity == 1 and self.shared == 0 and self.reinitialise == 0

    @property
    def identical(self) -> bool:
        """Whether the experts start as equal copies."""
        return self.noise == 0 and self.reinitialise == 0


@register_pass
class Upcycle(RoutedFFNPass):
    """Replace an FFN by routed copies of itself."""

    name = "upcycle"
    summary = "FFN -> routed copies of itself; exact at the start unless noise or re-initialisation is asked for"
    provides = frozenset({"routed-ffns"})
    Options = UpcycleOptions
    options: UpcycleOptions

    def refuse_mixing(self, site: Site) -> str:
        """Return why whole samples cannot be routed, which is all that an FFN mixing its tokens allows."""
        if not self.options.plain_copies:
            return (
                "a depthwise convolution between its projections mixes tokens, so only whole samples can be routed: "
                "that needs granularity=1, shared=0 and no re-initialisation"
            )
        if self.options.selector not in TOP_K or set(self.taps) - {"timestep"}:
            return "a depthwise convolution mixes its tokens: only selectors of the top-k kind route whole samples"
        if self.options.state != "none":
            return "a depthwise convolution mixes its tokens: only routers without memory route whole samples"
        return ""

    def misfit(self, site: Site) -> str:
        """Return why the options do not fit this FFN."""
        hidden = ffn_sizes(site)[1]
        if hidden % self.options.granularity:
            divisors = [g for g in range(1, 33) if hidden % g == 0]
            return (
                f"its width {hidden} is not divisible by granularity {self.options.granularity}; possible: {divisors}"
            )
        return ""

    def contract(self) -> Contract:
        """Exact where the algebra says so, else approximate up to ``max_error``."""
        o = self.options
        chosen = o.top_k // o.granularity
        plain = o.selector == "top-k" and o.scorer == "linear" and o.state != "recurrent" and not o.always
        uniform = (
            plain and o.mode == "softmax_topk" and o.router_init == "zero" and math.isclose(o.scale, o.groups / chosen)
        )
        if o.identical and (o.gates_sum_to_one or uniform):
            return Contract("exact", 0.0, "equal copies whose gates sum to one")
        if o.identical:
            return Contract("approximate", o.max_error, f"the gates of {o.selector}, {o.mode} need not sum to one")
        return Contract("approximate", o.max_error, "the experts differ from the dense FFN by noise or fresh neurons")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and multiply-adds per token."""
        o = self.options
        dim, _, out, _ = ffn_sizes(site)
        parameters, compute = ffn_counts(site)
        bias = out if "b_out" in site.operands else 0
        rows = o.experts if o.untie else o.groups
        router = router_parameters(o, dim, tap_width, rows=rows)
        after = (parameters - bias) * (o.groups + o.shared) + bias + router
        active = int(compute * mean_experts(o)) // o.granularity + compute * o.shared + router
        return Costs(parameters, after, compute, active)

    def warnings(self) -> list[str]:
        """Warn of a router that cannot learn (theorem T5), and of losing tokens' symmetry."""
        o = self.options
        found = routing_warnings(o)
        if o.experts == 1 or not o.identical or o.mode not in SUM_TO_ONE:
            return found
        return [
            *found,
            "equal experts under renormalised gates give the router exactly zero task gradient until the experts "
            "differ: train with moefx.aux_loss, or start with noise=1e-3 or reinitialise=0.1, or choose one copy per "
            "token (top_k = granularity), whose default gate N10 trains the router",
        ]

    def build(self, context: Context) -> nn.Module:
        """Return the routed FFN that stands where ``context.site`` stood."""
        o, site = self.options, context.site
        if mixes_tokens(site):
            return self._build_samples(context)
        dense = dense_weights(site, context.graph)
        if "rest" in site.operands:
            # The shared output projection keeps its bias: it is hoisted out of the experts.
            dense = replace(dense, b_out=None)
        weights = granular_copies(dense, o.groups, o.granularity)
        if o.reinitialise:
            draws = context.generator("reinitialise")
            weights = partially_reinitialise(weights, draws, r=o.reinitialise, independent_sets=o.independent_sets)
        if o.noise:
            weights = add_noise(weights, context.generator("noise"), sigma=o.noise, fraction=o.noise_fraction)
        act = hidden_function(site)
        shared: nn.Module | None = None
        scale, shared_scale = o.scale, 1.0
        if o.shared:
            shared_weights, weights, shared_scale, kept = arrange_shared(dense, weights, o.shared)
            shared, scale = DenseFFN(shared_weights, act), scale * kept
        slots = routing(o, context, dense.dim, dense.w_in.device, rows=o.experts if o.untie else 0)
        routed = RoutedFFN(
            experts=Experts(weights, act),
            granularity=1 if o.untie else o.granularity,
            shared=shared,
            shared_scale=shared_scale,
            **slots | {"scale": scale * (o.granularity if o.untie and o.mode in SUM_TO_ONE else 1)},
        )
        axis = int(site.shapes["axis"])
        if axis != len(site.shapes["x"]) - 1:
            return OnAxis(routed, axis).train(context.graph.root.training)
        return routed.train(context.graph.root.training)

    def _build_samples(self, context: Context) -> nn.Module:
        """Return copies of the whole module, routed by sample."""
        o = self.options
        module = context.graph.root if context.whole else extract(context)
        experts = ModuleExperts(module, o.experts)
        if o.noise:
            draws = context.generator("noise")
            for parameter in experts.parameters():
                parameter.data += (
                    o.noise * parameter.std() * torch.randn(parameter.shape, generator=draws).to(parameter)
                )
        device = next(module.parameters()).device
        slots = routing(o, context, int(context.site.shapes["D"]), device)
        axis = int(context.site.shapes["axis"])
        return RoutedSamples(experts=experts, axis=axis, **slots).train(context.graph.root.training)
