"""Neuron-level sparsity: the hidden layer of an FFN loses neurons per token, by rank or by threshold, or per sample.

Sources: The Lazy Neuron (arXiv 2210.06313), CHESS (arXiv 2409.01366), Read-ME (arXiv 2410.19123).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from moefx.errors import InputError
from moefx.passes.analysis.site import Site
from moefx.passes.calibration.layer import LayerStatistics, hidden
from moefx.passes.rewrite.base import Context, Contract, Costs, Options, register_pass
from moefx.passes.rewrite.dense import (
    GatedActivation,
    dense_weights,
    ffn_counts,
    ffn_sizes,
    hidden_function,
)
from moefx.passes.rewrite.ffn import FFNPass
from moefx.routing import fit
from moefx.routing.experts import DenseFFN
from moefx.routing.layout import OnAxis
from moefx.routing.neurons import NeuronSubsets, ThresholdNeurons, TopNeurons
from moefx.routing.router import LinearRouter
from moefx.routing.weights import FFNWeights


class NeuronOptions(Options):
    """Options of :class:`SparseNeurons`."""

    rule: Literal["top-k", "threshold", "subset"] = Field("top-k", description="how neurons are chosen")
    keep: float = Field(0.5, gt=0, le=1, description="share of the neurons that stay; with thresholds, on average")
    experts: int = Field(8, ge=1, le=4096, description="subset: number of subsets, one per noise level")
    timestep_thresholds: int = Field(1, ge=1, le=4096, description="thresholds over equal parts of the timesteps")
    timestep_steps: float = Field(1000.0, gt=0, description="timesteps are in [0, timestep_steps)")
    max_error: float = Field(2.0, gt=0, description="refuse a start further from the dense model than this")
    every: int = Field(1, ge=1, description="rewrite every n-th matching site")

    @model_validator(mode="after")
    def _thresholds_only(self) -> NeuronOptions:
        if self.timestep_thresholds > 1 and self.rule != "threshold":
            raise ValueError("only rule='threshold' has thresholds")
        return self


@register_pass
class SparseNeurons(FFNPass):
    """Let an FFN use a part of its neurons."""

    name = "sparse-neurons"
    summary = "FFN -> the same with only some neurons per token or sample; approximate"
    provides = frozenset({"routed-ffns"})
    Options = NeuronOptions
    options: NeuronOptions

    @property
    def taps(self) -> tuple[str, ...]:
        """The timestep, if thresholds depend on it."""
        return ("timestep",) if self.options.timestep_thresholds > 1 else ()

    def accepts(self, tap: str, value: Tensor) -> bool:
        """Return whether the timestep is a raw one: an embedding has no interval."""
        return value.ndim <= 1

    @property
    def needs_calibration(self) -> bool:
        """Thresholds and subsets are measured."""
        return self.options.rule != "top-k"

    def misfit(self, site: Site) -> str:
        """Return why the options do not fit this FFN."""
        if self.options.rule == "threshold" and "w_gate" in site.operands and site.operands["act"].arity != 1:
            return "its gate does not factor into a function of the gate times the value"
        return ""

    def contract(self) -> Contract:
        """Exact if all neurons stay."""
        if self.options.keep == 1:
            return Contract("exact", 0.0, "every neuron stays")
        return Contract("approximate", self.options.max_error, "some neurons are left out")

    def costs(self, site: Site, tap_width: int = 0) -> Costs:
        """Return parameters and the multiply-adds that a token needs; eager modules compute masked neurons too."""
        o = self.options
        dim, width = ffn_sizes(site)[:2]
        parameters, compute = ffn_counts(site)
        if o.rule == "subset":
            router = o.experts * dim
            return Costs(parameters, parameters + router + o.experts, compute, int(compute * o.keep) + router)
        # What decides is computed for every neuron: the gate, or the up projection where there is none.
        decides = width * dim
        if o.rule == "top-k" and "w_gate" in site.operands:
            decides *= 2
        return Costs(parameters, parameters, compute, decides + int((compute - decides) * o.keep))

    def build(self, context: Context) -> nn.Module:
        """Return the sparse FFN that stands where ``context.site`` stood."""
        o, site = self.options, context.site
        dense, act = dense_weights(site, context.graph), hidden_function(site)
        if "rest" in site.operands:
            dense = _without_output_bias(dense)
        layer: nn.Module
        if o.rule == "top-k":
            layer = TopNeurons(dense, act, max(1, round(o.keep * dense.hidden)))
        elif o.rule == "threshold":
            gate = act.act if isinstance(act, GatedActivation) else None
            threshold = self._thresholds(context, dense, gate or act)
            layer = ThresholdNeurons(dense, act, threshold, gate=gate, steps=o.timestep_steps)
        else:
            layer = self._subsets(context, dense, act)
        axis = int(site.shapes["axis"])
        whole = OnAxis(layer, axis) if axis != len(site.shapes["x"]) - 1 else layer
        return whole.to(dense.w_in.device).train(context.graph.root.training)

    def _layer_statistics(self, context: Context, dense: FFNWeights) -> LayerStatistics | None:
        """Return what was measured; None while a saved model is loaded."""
        if self.calibration is None or dense.w_in.is_meta:
            return None
        layer = self.calibration.layer(context.name)
        if layer.sizes[:2] != (dense.dim, dense.hidden):
            raise InputError(
                f"make {context.name} sparse", found=f"statistics of sizes {layer.sizes}", do="calibrate this model"
            )
        return layer

    def _thresholds(self, context: Context, dense: FFNWeights, act: Any) -> Tensor:
        """Return t ``[n, F]``: per interval, the quantile of ``a_i² E[up_i²]`` over its tokens and neurons."""
        o = self.options
        found = torch.full((o.timestep_thresholds, dense.hidden), -1.0)
        layer = self._layer_statistics(context, dense)
        if layer is None or o.keep == 1:
            return found
        assert self.calibration is not None
        row = self._rows(layer.sample.group % self.calibration.buckets, o.timestep_thresholds)
        up, h = hidden(dense, hidden_function(context.site), layer.sample.x)
        a = h
        if dense.w_gate is not None:
            gates = FFNWeights(w_in=dense.w_gate, w_out=dense.w_out, b_in=dense.b_gate)
            a = hidden(gates, act, layer.sample.x)[1]
        for n in range(o.timestep_thresholds):
            mine = row == n
            chosen = a[mine] if mine.any() else a
            # Where there is no gate the factor is one: a scalar threshold for all neurons.
            second = up[mine if mine.any() else slice(None)].square().mean(0) if dense.w_gate is not None else None
            weight = torch.ones(dense.hidden) if second is None else second.clamp_min(1e-12)
            score = chosen.square() * weight
            tau = fit.share_cut(score, o.keep)
            found[n] = (max(tau, 0.0) / weight.double()).sqrt().float()
        return found

    def _rows(self, bucket: Tensor, rows: int) -> Tensor:
        assert self.calibration is not None
        if self.calibration.buckets % rows or (
            rows > 1 and self.calibration.span != (0.0, self.options.timestep_steps)
        ):
            raise InputError(
                f"use {rows} intervals over {self.options.timestep_steps:g} timesteps",
                found=f"{self.calibration.buckets} buckets over {self.calibration.span}",
                do="make the buckets a multiple, and timestep_steps the range of the timesteps",
            )
        return bucket // (self.calibration.buckets // rows)

    def _subsets(self, context: Context, dense: FFNWeights, act: Any) -> nn.Module:
        """Return a network with a subset of neurons per noise level, and a router that tells the level of a sample."""
        o = self.options
        width = max(1, round(o.keep * dense.hidden))
        subsets = torch.arange(width).repeat(o.experts, 1)
        router = LinearRouter(dense.dim, o.experts, bias=True, std=0.0)
        layer = self._layer_statistics(context, dense)
        if layer is not None:
            assert self.calibration is not None
            buckets = self.calibration.buckets
            group = self._domains(torch.arange(layer.groups) % buckets)
            subsets = torch.stack([_most_active(layer, group == e, width) for e in range(o.experts)])
            domain = self._domains(layer.sample.group % buckets)
            weight, bias = fit.softmax_regression(layer.sample.x, domain, o.experts)
            with torch.no_grad():
                assert router.weight is not None
                assert router.bias is not None
                router.weight.copy_(weight)
                router.bias.copy_(bias)
        return NeuronSubsets(router, DenseFFN(dense, act), subsets)

    def _domains(self, bucket: Tensor) -> Tensor:
        assert self.calibration is not None
        if self.calibration.buckets % self.options.experts:
            raise InputError(
                f"make {self.options.experts} subsets of neurons",
                found=f"{self.calibration.buckets} timestep buckets",
                do="calibrate with a multiple of as many buckets as experts",
            )
        return bucket // (self.calibration.buckets // self.options.experts)


def _most_active(layer: LayerStatistics, mine: Tensor, width: int) -> Tensor:
    """Return the neurons of largest mean |h| over some groups, in order."""
    count, mean = layer.magnitude.count[mine], layer.magnitude.mean[mine]
    total = (mean * count.unsqueeze(1)).sum(0)
    return total.sort(descending=True, stable=True).indices[:width].sort().values


def _without_output_bias(dense: FFNWeights) -> FFNWeights:
    """The shared output projection keeps its bias."""
    return FFNWeights(w_in=dense.w_in, w_out=dense.w_out, w_gate=dense.w_gate, b_in=dense.b_in, b_gate=dense.b_gate)
